"""What a checkpoint is: its place, its cut over the ranks, and the manifest that makes it whole. Pure.

The ranks cut the replicated state with ``partition`` and write a shard each; ``compose`` joins the facts they
reported and the headers of their files into one ``Manifest``, whose canonical bytes are hashed into the log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from distroml.errors import UNDECODABLE, StoreError
from distroml.model import Checkpoint
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.shard_file import (
    SHARD_FILE,
    Reference,
    Sha256,
    ShardFile,
    ShardHeader,
    Size,
    TensorPlace,
    TensorRecord,
    UnknownFormat,
    check_format,
    check_place,
)

FORMAT = 3
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "LATEST"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
OPTIMIZER_PREFIX = "optimizer."
MODEL_PREFIX = "model."
METRICS_VALUE = "metrics"
"""Where a state's values have the newest value of each metric."""
LEDGER_VALUE = "ledger"
"""Where they have the rolling digest of the sample ids that the steps consumed."""
_SHARD_FILE = re.compile(rf"{SHARD_FILE}\Z")
_REFERENCE = re.compile(rf"ckpt_step_(\d{{8,12}})/{SHARD_FILE}\Z")


class ShardRecord(Struct, frozen=True, kw_only=True):
    """One file of a checkpoint."""

    rank: int
    file: ShardFile
    size_bytes: Size
    header_bytes: Size
    header_sha256: Sha256
    """Of the first ``header_bytes``, which hold the hashes of all that follows."""


class ReferredRecord(ShardRecord, frozen=True, kw_only=True):
    """A file of an earlier checkpoint that has tensors of this one."""

    file: Reference


class Manifest(Struct, frozen=True, kw_only=True):
    """Everything that is needed to restore one checkpoint, and to see that it is whole."""

    format: int = FORMAT
    job_id: str
    run_id: str
    generation: int
    step: int
    epoch: int
    cursor: DataCursor
    world_size: int
    strategy: str
    backend: str
    rng: str = "keyed"
    """Generators are seeded from (seed, step, rank) at each step: there is no generator state."""
    has_optimizer: bool
    values: dict[str, Any]
    """JSON-able part of the state: hyperparameters, the last metrics, the user's own."""
    shards: tuple[ShardRecord, ...]
    referred: tuple[ReferredRecord, ...] = ()
    tensors: tuple[TensorRecord, ...]

    @property
    def files(self) -> tuple[ShardRecord, ...]:
        """All files that have tensors of it."""
        return (*self.shards, *self.referred)

    @property
    def sample_digest(self) -> str:
        """Rolling digest of the sample ids that the steps so far consumed; empty where none was kept."""
        return str(self.values.get(LEDGER_VALUE, ""))


def checkpoints_directory(job_id: str, run_id: str) -> str:
    """Where a run's checkpoints are, relative to the store's root."""
    return f"{job_id}/{run_id}/checkpoints"


def checkpoint_directory(job_id: str, run_id: str, step: int) -> str:
    """Where the checkpoint of ``step`` is, relative to the store's root."""
    return f"{checkpoints_directory(job_id, run_id)}/ckpt_step_{step:08d}"


def file_names(plain: str, generation: int, *, scattered: bool) -> tuple[str, ...]:
    """Names under which a file of a generation may be made; the first one that is free, or is this very file, counts.

    Args:
        plain: the usual name, such as ``manifest.json``.
        scattered: the store has a directory on each node, so that nobody can see whether a name is taken: then the usual
            one is that of the first generation only.
    """
    stem, _, suffix = plain.partition(".")
    own = f"{stem}.g{generation}.{suffix}"
    if scattered:
        return (plain if generation == 1 else own,)
    return (plain, own)


def partition(sizes: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Give each rank whole tensors of about the same number of bytes.

    Largest first, always to the rank with the least so far (Graham, 1969): the largest share is at most one
    tensor above the mean. The names of each share are sorted. Depends on nothing but the arguments.
    """
    loads = [0] * world_size
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], len(shares[rank]), rank))
        loads[rank] += sizes[name]
        shares[rank].append(name)
    return [sorted(share) for share in shares]


def path_of(directory: str, file: str) -> str:
    """Where a file of the checkpoint in ``directory`` is: there, or (a reference) in an earlier one's directory."""
    if "/" in file:
        return f"{directory.rpartition('/')[0]}/{file}"
    return f"{directory}/{file}"


def referred_directories(directory: str, files: Iterable[str]) -> tuple[str, ...]:
    """Directories of the earlier checkpoints that references of the one in ``directory`` lead to, sorted."""
    paths = {path_of(directory, file).rpartition("/")[0] for file in files if "/" in file}
    return tuple(sorted(paths))


def base_for(
    job_id: str, run_id: str, step: int, checkpoint: Checkpoint, manifest: Manifest
) -> dict[str, TensorRecord]:
    """The tensors of ``checkpoint`` that one of ``step`` of the run may refer to, as it would name them."""
    parent, _, directory = checkpoint.directory.rpartition("/")
    if parent != checkpoints_directory(job_id, run_id) or manifest.step >= step:
        return {}
    return {
        tensor.name: tensor
        if "/" in tensor.file
        else msgspec.structs.replace(tensor, file=f"{directory}/{tensor.file}")
        for tensor in manifest.tensors
        if tensor.codec == "none" or tensor.content_blake3
    }


def compose(
    generation: int,
    facts: Sequence[ShardFact],
    headers: Mapping[str, ShardHeader],
    referred: Mapping[str, ShardHeader] | None = None,
) -> Manifest:
    """Join the reported shards of one step into a manifest.

    Args:
        facts: one per rank, in any order.
        headers: of each fact's file.
        referred: of each file of earlier checkpoints that the shards refer to.

    Raises:
        ValueError: the shards are not exactly those of one step of one run, or refer to what is not there; says why.
    """
    shards = sorted(facts, key=lambda fact: fact.rank)
    if not shards:
        raise ValueError("there are no shards")
    first = headers[shards[0].file].note
    ranks = [fact.rank for fact in shards]
    if ranks != list(range(first.world_size)):
        raise ValueError(f"ranks 0 to {first.world_size - 1} are needed, there are {ranks}")
    tensors: dict[str, TensorRecord] = {}
    for fact in shards:
        header = headers[fact.file]
        _check_shard(fact, header, first)
        own = [_record(place, fact.file) for place in header.tensors]
        for record in (*own, *header.note.references):
            if record.name in tensors:
                raise ValueError(f"tensor '{record.name}' is in two shards")
            tensors[record.name] = record
    used = sorted({record.file for record in tensors.values() if "/" in record.file})
    there = {
        file: {place.name: place for place in header.tensors}
        for file, header in (referred or {}).items()
    }
    for record in tensors.values():
        if "/" in record.file:
            place = there.get(record.file, {}).get(record.name)
            _check_reference(record, first, (referred or {}).get(record.file), place)
    return Manifest(
        job_id=first.job_id,
        run_id=first.run_id,
        generation=generation,
        step=first.step,
        epoch=first.cursor.epoch,
        cursor=first.cursor,
        world_size=first.world_size,
        strategy=first.strategy,
        backend=first.backend,
        has_optimizer=any(name.startswith(OPTIMIZER_PREFIX) for name in tensors),
        values=first.values or {},
        shards=tuple(
            ShardRecord(
                rank=fact.rank,
                file=fact.file,
                size_bytes=fact.size_bytes,
                header_bytes=headers[fact.file].header_bytes,
                header_sha256=fact.sha256,
            )
            for fact in shards
        ),
        referred=tuple(
            ReferredRecord(
                rank=header.note.rank,
                file=file,
                size_bytes=header.file_bytes,
                header_bytes=header.header_bytes,
                header_sha256=header.sha256,
            )
            for file, header in ((file, (referred or {})[file]) for file in used)
        ),
        tensors=tuple(tensors[name] for name in sorted(tensors)),
    )


def _record(place: TensorPlace, file: str) -> TensorRecord:
    return TensorRecord(**msgspec.structs.asdict(place), file=file)


def _check_shard(fact: ShardFact, header: ShardHeader, first: Any) -> None:
    note = header.note
    same = ("job_id", "run_id", "step", "cursor", "world_size", "strategy", "backend")
    for field in same:
        if getattr(note, field) != getattr(first, field):
            raise ValueError(
                f"{fact.file} has {field} {getattr(note, field)!r}, "
                f"rank 0's shard has {getattr(first, field)!r}"
            )
    if (note.rank, note.step) != (fact.rank, fact.step):
        raise ValueError(
            f"{fact.file} is of rank {note.rank}, step {note.step}; "
            f"it was reported as rank {fact.rank}, step {fact.step}"
        )
    if header.file_bytes != fact.size_bytes:
        raise ValueError(
            f"{fact.file} should have {header.file_bytes} bytes by its header, "
            f"{fact.size_bytes} were reported"
        )
    if header.sha256 != fact.sha256:
        raise ValueError(
            f"{fact.file} has a header of SHA-256 {header.sha256}, {fact.sha256} was reported"
        )
    if not _SHARD_FILE.match(fact.file):
        raise ValueError(f"'{fact.file}' is not the name of a shard")


def _check_reference(
    record: TensorRecord, first: Any, header: ShardHeader | None, there: TensorPlace | None
) -> None:
    """What a shard refers to must be in an earlier checkpoint of the run, exactly as it says."""
    what = f"tensor '{record.name}' refers to {record.file}"
    step = _step_referred_to(record.file, first.step)
    if header is None:
        raise ValueError(f"{what}, which was not found")
    note = header.note
    if (note.job_id, note.run_id, note.step) != (first.job_id, first.run_id, step):
        raise ValueError(f"{what}, which is of run {note.run_id}, step {note.step}")
    if there is None or _record(there, record.file) != record:
        raise ValueError(f"{what}, which does not have it there")


def _step_referred_to(file: str, step: int) -> int:
    """Of a reference in the checkpoint of ``step``."""
    match = _REFERENCE.match(file)
    if match is None:
        raise ValueError(f"'{file}' is not a file of an earlier checkpoint of the run")
    if int(match[1]) >= step:
        raise ValueError(f"it refers to {file}, which is not earlier than step {step}")
    return int(match[1])


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON: the same manifest always gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


_decoder = msgspec.json.Decoder(Manifest)
"""Made here, once: see ``shard_file``."""


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest back and check that it is consistent in itself.

    Nothing that it says is believed before: a reader may allocate what its tensors need, which lie side by side in
    files of the sizes that it gives, inside of the run.

    Raises:
        UnknownFormat: it is one of another version.
        ValueError: it is no manifest, or contradicts itself; says why.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        check_format(data, FORMAT, "format")
        manifest = _decoder.decode(data)
    except UnknownFormat:
        raise
    except UNDECODABLE as error:
        raise ValueError(f"it cannot be decoded: {error}") from None
    files = {file.file: file for file in manifest.files}
    if len(files) != len(manifest.files):
        raise ValueError("it names a shard file twice")
    for record in manifest.referred:
        _step_referred_to(record.file, manifest.step)
    seen: set[str] = set()
    for tensor in manifest.tensors:
        if tensor.name in seen:
            raise ValueError(f"it names tensor '{tensor.name}' twice")
        seen.add(tensor.name)
        check_place(tensor)
    _check_layout(manifest.tensors, files)
    return manifest


def of_another_version(path: str, error: UnknownFormat, **extra: Any) -> StoreError:
    """What to raise for a file that this version cannot read: no reason to go on from an older checkpoint."""
    return StoreError(
        f"{path} is of another version of DistroML ({error}). Nothing is wrong with it: "
        "start the version that wrote it.",
        path=path,
        **extra,
    )


def _check_layout(tensors: Iterable[TensorRecord], files: Mapping[str, ShardRecord]) -> None:
    """Each tensor lies in the data of its file, and on no other."""
    ends: dict[str, int] = {}
    for tensor in sorted(tensors, key=lambda one: (one.file, one.offset, one.length)):
        file = files.get(tensor.file)
        if file is None or tensor.offset < file.header_bytes:
            raise ValueError(f"tensor '{tensor.name}' lies outside of its file")
        if tensor.offset < ends.get(tensor.file, 0):
            raise ValueError(f"tensor '{tensor.name}' overlaps another one in {tensor.file}")
        ends[tensor.file] = tensor.offset + tensor.length
        if ends[tensor.file] > file.size_bytes:
            raise ValueError(f"tensor '{tensor.name}' lies outside of its file")
