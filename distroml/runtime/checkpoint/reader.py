"""Read a committed checkpoint back and verify every byte against what the log and the manifest say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from distroml.errors import CorruptCheckpoint, StoreError
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.manifest import Manifest, ShardRecord, decode_manifest
from distroml.runtime.checkpoint.shard_file import TensorBytes
from distroml.runtime.checkpoint.store import CheckpointStore, MissingFile


def read_manifest(store: CheckpointStore, checkpoint: Checkpoint) -> Manifest:
    """The manifest that ``checkpoint`` committed.

    Raises:
        CorruptCheckpoint: missing, or other bytes than those committed; names file and hashes.
        StoreError: the store cannot be read.
    """
    path = f"{checkpoint.directory}/{checkpoint.manifest}"
    try:
        data = store.read(path)
    except MissingFile:
        raise _corrupt(checkpoint, path, "is missing") from None
    _verify(checkpoint, path, data, checkpoint.manifest_sha256)
    try:
        manifest = decode_manifest(data)
    except ValueError as error:
        raise _corrupt(checkpoint, path, f"is not usable: {error}") from None
    if manifest.step != checkpoint.step:
        raise _corrupt(checkpoint, path, f"is of step {manifest.step}, not {checkpoint.step}")
    return manifest


def read_tensors(
    store: CheckpointStore, checkpoint: Checkpoint, manifest: Manifest
) -> Iterator[TensorBytes]:
    """All tensors, shard by shard; each shard is verified before its first tensor is handed out.

    The data are views of one buffer per shard and may be kept.

    Raises:
        CorruptCheckpoint: a shard is missing, short, long or altered; names file, place and hashes.
        StoreError: the store cannot be read.
    """
    for shard in manifest.shards:
        data = _read_shard(store, checkpoint, shard)
        for tensor in manifest.tensors:
            if tensor.file == shard.file:
                yield TensorBytes(
                    tensor.name,
                    tensor.dtype,
                    tensor.shape,
                    data[tensor.offset : tensor.offset + tensor.length],
                )


def _read_shard(store: CheckpointStore, checkpoint: Checkpoint, shard: ShardRecord) -> memoryview:
    path = f"{checkpoint.directory}/{shard.file}"
    try:
        size = store.size(path)
        if size != shard.size_bytes:
            raise _corrupt(
                checkpoint, path, f"has {size} bytes instead of {shard.size_bytes}", offset=size
            )
        data = memoryview(bytearray(size))
        count = store.read_into(path, data)
    except MissingFile:
        raise _corrupt(checkpoint, path, "is missing") from None
    if count != size:
        raise _corrupt(checkpoint, path, f"ends after {count} of {size} bytes", offset=count)
    _verify(checkpoint, path, data, shard.sha256)
    return data


def _verify(
    checkpoint: Checkpoint, path: str, data: bytes | memoryview, expected_sha256: str
) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected_sha256:
        raise _corrupt(
            checkpoint,
            path,
            f"(bytes 0 to {len(data)}) has SHA-256 {actual}, committed was {expected_sha256}",
            expected_sha256=expected_sha256,
            actual_sha256=actual,
        )


def _corrupt(checkpoint: Checkpoint, path: str, what: str, **extra: str | int) -> StoreError:
    return CorruptCheckpoint(
        f"Checkpoint of step {checkpoint.step}: {path} {what}. It will not be restored again.",
        path=path,
        checkpoint_step=checkpoint.step,
        **extra,  # type: ignore[arg-type]
    )
