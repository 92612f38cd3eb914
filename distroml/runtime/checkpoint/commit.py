"""The coordinator's side of a checkpoint: when all shards are durable, write the manifest.

Both functions block on the store and are called in a thread. The manifest is not the commit: the
``CommitCheckpoint`` entry that carries the returned record is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from distroml.errors import CorruptCheckpoint, StoreError
from distroml.model import Checkpoint
from distroml.reports import ShardFact
from distroml.runtime.checkpoint.concurrently import for_each
from distroml.runtime.checkpoint.manifest import (
    LATEST_FILE,
    MANIFEST_FILE,
    METRICS_VALUE,
    Manifest,
    checkpoint_directory,
    compose,
    decode_manifest,
    encode_manifest,
    file_names,
    of_another_version,
    path_of,
    referred_directories,
)
from distroml.runtime.checkpoint.shard_check import header_of
from distroml.runtime.checkpoint.shard_file import ShardHeader, UnknownFormat
from distroml.runtime.checkpoint.stores.interface import CheckpointStore, MissingFile
from distroml.runtime.checkpoint.stores.opening import LOCAL


class UnfitShards(StoreError):
    """No checkpoint can be made of these shards, however often it is tried."""


def write_manifest(
    store: CheckpointStore,
    *,
    job_id: str,
    run_id: str,
    generation: int,
    shards: Sequence[ShardFact],
    committed_at: float,
    best_metric: str = "",
    store_name: str = LOCAL,
    scattered: bool = False,
) -> Checkpoint:
    """Make the manifest of ``shards`` durable and return what the log should commit.

    Safe to repeat, also by another leader: the same shards give the same bytes. Where a dead generation left
    another manifest of this step, the new one is named after its generation.

    Args:
        shards: the durable shards of one step, one per rank of the generation.
        committed_at: Unix seconds; only passed on.
        best_metric: whose value at this step the record should have, where the state has it.
        store_name: what specs call ``store``.
        scattered: as of ``file_names``.

    Raises:
        UnfitShards: they do not fit together.
        StoreError: the store failed.
    """
    if not shards:
        raise UnfitShards("A checkpoint without shards cannot be committed.")
    directory = checkpoint_directory(job_id, run_id, shards[0].step)
    headers = _by_file(partial(_read_shard, store, directory), [fact.file for fact in shards])
    used = {record.file for header in headers.values() for record in header.note.references}
    try:
        referred = _by_file(partial(_read_referred, store, directory), sorted(used))
        manifest = compose(generation, shards, headers, referred)
    except ValueError as error:
        raise UnfitShards(f"The shards in {directory} do not fit together: {error}.") from None
    if (manifest.job_id, manifest.run_id) != (job_id, run_id):
        raise UnfitShards(f"The shards in {directory} belong to run {manifest.run_id}.")
    data = encode_manifest(manifest)
    file = _put(store, directory, generation, data, scattered=scattered)
    return msgspec.structs.replace(
        record_of(manifest, directory, file, data, metric=best_metric),
        committed_at=committed_at,
        store=store_name,
        save_request=max(shard.save_request for shard in shards),
    )


def recover(
    store: CheckpointStore, directory: str, manifest_file: str = MANIFEST_FILE
) -> Checkpoint:
    """The record of a checkpoint that no log tells of, from what is in its directory.

    Without the log's hash of the manifest all of it is compared with the headers of the shards, whose hashes it has, but for
    its generation, which they leave out.

    Raises:
        CorruptCheckpoint: the manifest is not that of the files; says where they differ.
        StoreError: the store failed, or another version wrote the files.
    """
    path = f"{directory}/{manifest_file}"
    try:
        data = store.read(path)
        told = decode_manifest(data)
        facts = [
            ShardFact(
                step=told.step,
                cursor=told.cursor,
                rank=shard.rank,
                file=shard.file,
                size_bytes=shard.size_bytes,
                sha256=shard.header_sha256,
            )
            for shard in told.shards
        ]
        headers = _by_file(
            lambda file: header_of(store, f"{directory}/{file}"), [fact.file for fact in facts]
        )
        referred = _by_file(
            partial(_read_referred, store, directory), [one.file for one in told.referred]
        )
        found = encode_manifest(compose(told.generation, facts, headers, referred))
        if found != data:
            raise ValueError("its tensors or values differ from those of its shards")
    except MissingFile as error:
        raise CorruptCheckpoint(f"{path} is not usable: {error.detail}", path=path) from None
    except UnknownFormat as error:
        raise of_another_version(path, error) from None
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is not usable: {error}.", path=path) from None
    return record_of(told, directory, manifest_file, data)


def metric_of(manifest: Manifest, name: str) -> float | None:
    """The newest value of a metric in the state that was saved; None where there is none, or it is no number."""
    metrics = manifest.values.get(METRICS_VALUE)
    value = metrics.get(name) if isinstance(metrics, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def publish_latest(store: CheckpointStore, checkpoint: Checkpoint) -> None:
    """Point ``LATEST`` of the run at a committed checkpoint: for people, and for an import where no log is left.

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


def read_header(store: CheckpointStore, path: str) -> ShardHeader:
    """The header of the shard under ``path``.

    Raises:
        StoreError: the store failed, or it is not a shard.
    """
    try:
        return header_of(store, path)
    except ValueError as error:
        raise StoreError(f"{path} is not a usable shard: {error}.", path=path) from None


def _by_file(read: Callable[[str], ShardHeader], files: Sequence[str]) -> dict[str, ShardHeader]:
    return dict(zip(files, for_each(read, files), strict=True))


def _read_shard(store: CheckpointStore, directory: str, file: str) -> ShardHeader:
    return read_header(store, f"{directory}/{file}")


def _read_referred(store: CheckpointStore, directory: str, file: str) -> ShardHeader:
    path = path_of(directory, file)
    header = read_header(store, path)
    size_bytes = store.size(path)
    if size_bytes != header.file_bytes:
        raise ValueError(f"{file} has {size_bytes} bytes instead of {header.file_bytes}")
    return header


def record_of(
    manifest: Manifest, directory: str, file: str, data: bytes, *, metric: str = ""
) -> Checkpoint:
    """What there is to say of a checkpoint by its manifest; when and where it was committed is up to the caller.

    Args:
        file: the manifest's name in ``directory``.
        data: the manifest, encoded.
        metric: the name of the one by which checkpoints of the run are compared.
    """
    return Checkpoint(
        step=manifest.step,
        epoch=manifest.epoch,
        generation=manifest.generation,
        directory=directory,
        manifest=file,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data) + sum(shard.size_bytes for shard in manifest.shards),
        shards=len(manifest.shards),
        committed_at=0.0,
        metric=metric_of(manifest, metric),
        refers_to=referred_directories(directory, (one.file for one in manifest.referred)),
    )


def _put(
    store: CheckpointStore, directory: str, generation: int, data: bytes, *, scattered: bool
) -> str:
    digest = hashlib.sha256(data).hexdigest()
    for file in file_names(MANIFEST_FILE, generation, scattered=scattered):
        if store.put_if_absent(f"{directory}/{file}", [data]).sha256 == digest:
            return file
    raise UnfitShards(f"{directory}/{file} exists with other bytes.")
