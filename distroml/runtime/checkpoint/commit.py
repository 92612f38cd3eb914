"""The coordinator's side of a checkpoint: when all shards are durable, write the manifest.

Both functions block on the store and are called in a thread. The manifest is not the commit: the
``CommitCheckpoint`` entry that carries the returned record is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from distroml.errors import StoreError
from distroml.model import Checkpoint
from distroml.reports import ShardFact
from distroml.runtime.checkpoint.manifest import (
    LATEST_FILE,
    MANIFEST_FILE,
    checkpoint_directory,
    compose,
    encode_manifest,
)
from distroml.runtime.checkpoint.shard_file import (
    LENGTH,
    ShardHeader,
    header_length,
    parse_safetensors_header,
)
from distroml.runtime.checkpoint.store import CheckpointStore


def write_manifest(
    store: CheckpointStore,
    *,
    job_id: str,
    run_id: str,
    generation: int,
    shards: Sequence[ShardFact],
    committed_at: float,
) -> Checkpoint:
    """Make the manifest of ``shards`` durable and return what the log should commit.

    Safe to repeat, also by another leader: the same shards give the same bytes. Where a dead generation left
    another manifest of this step, the new one is named after its generation.

    Args:
        shards: the durable shards of one step, one per rank of the generation.
        committed_at: Unix seconds; only passed on.

    Raises:
        StoreError: the store failed, or the shards do not fit together.
    """
    if not shards:
        raise StoreError("A checkpoint without shards cannot be committed.")
    directory = checkpoint_directory(job_id, run_id, shards[0].step)
    headers = {fact.file: _read_header(store, f"{directory}/{fact.file}") for fact in shards}
    try:
        manifest = compose(generation, shards, headers)
    except ValueError as error:
        raise StoreError(f"The shards in {directory} do not fit together: {error}.") from None
    if (manifest.job_id, manifest.run_id) != (job_id, run_id):
        raise StoreError(f"The shards in {directory} belong to run {manifest.run_id}.")
    data = encode_manifest(manifest)
    digest = hashlib.sha256(data).hexdigest()
    return Checkpoint(
        step=manifest.step,
        epoch=manifest.epoch,
        generation=generation,
        directory=directory,
        manifest=_put(store, directory, generation, data, digest),
        manifest_sha256=digest,
        size_bytes=len(data) + sum(shard.size_bytes for shard in manifest.shards),
        shards=len(manifest.shards),
        committed_at=committed_at,
    )


def publish_latest(store: CheckpointStore, checkpoint: Checkpoint) -> None:
    """Point ``LATEST`` of the run at a committed checkpoint; for people, nothing reads it back.

    Raises:
        StoreError: the store failed.
    """
    parent = checkpoint.directory.rpartition("/")[0]
    record = {
        "step": checkpoint.step,
        "directory": checkpoint.directory.rpartition("/")[2],
        "manifest": checkpoint.manifest,
        "manifest_sha256": checkpoint.manifest_sha256,
    }
    store.put_latest(f"{parent}/{LATEST_FILE}", msgspec.json.encode(record) + b"\n")


def _read_header(store: CheckpointStore, path: str) -> ShardHeader:
    try:
        size = header_length(store.read(path, 0, LENGTH.size))
        return parse_safetensors_header(store.read(path, 0, size))
    except ValueError as error:
        raise StoreError(f"{path} is not a usable shard: {error}.", path=path) from None


def _put(store: CheckpointStore, directory: str, generation: int, data: bytes, digest: str) -> str:
    for file in (MANIFEST_FILE, f"manifest.g{generation}.json"):
        if store.put_if_absent(f"{directory}/{file}", [data]).sha256 == digest:
            return file
    raise StoreError(f"{directory}/{file} exists with other bytes.")
