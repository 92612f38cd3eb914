"""What a checkpoint is: its place, its cut over the ranks, and the manifest that makes it whole. Pure.

The ranks cut the replicated state with ``partition`` and write a shard each; ``compose`` joins the facts they
reported and the headers of their files into one ``Manifest``, whose canonical bytes are hashed into the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.shard_file import Shape, ShardHeader, size_of

FORMAT = 1
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "LATEST"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
OPTIMIZER_PREFIX = "optimizer."


class ShardRecord(Struct, frozen=True, kw_only=True):
    """One file of a checkpoint."""

    rank: int
    file: str
    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: str


class TensorRecord(Struct, frozen=True, kw_only=True):
    """One tensor of the state and where its bytes are."""

    name: str
    dtype: str
    """As in safetensors: F32, BF16, I64, ..."""
    shape: Shape
    file: str
    offset: int
    """From the start of ``file``, in bytes."""
    length: int
    sha256: str


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
    tensors: tuple[TensorRecord, ...]


def checkpoints_directory(job_id: str, run_id: str) -> str:
    """Where a run's checkpoints are, relative to the store's root."""
    return f"{job_id}/{run_id}/checkpoints"


def checkpoint_directory(job_id: str, run_id: str, step: int) -> str:
    """Where the checkpoint of ``step`` is, relative to the store's root."""
    return f"{checkpoints_directory(job_id, run_id)}/ckpt_step_{step:08d}"


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


def compose(
    generation: int, facts: Sequence[ShardFact], headers: Mapping[str, ShardHeader]
) -> Manifest:
    """Join the reported shards of one step into a manifest.

    Args:
        facts: one per rank, in any order.
        headers: of each fact's file.

    Raises:
        ValueError: the shards are not exactly those of one step of one run; says why.
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
        _check_shard(fact, headers[fact.file], first)
        digests = headers[fact.file].note.digests
        for place in headers[fact.file].tensors:
            if place.name in tensors:
                raise ValueError(f"tensor '{place.name}' is in two shards")
            tensors[place.name] = TensorRecord(
                name=place.name,
                dtype=place.dtype,
                shape=place.shape,
                file=fact.file,
                offset=place.offset,
                length=place.length,
                sha256=digests[place.name],
            )
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
            ShardRecord(rank=f.rank, file=f.file, size_bytes=f.size_bytes, sha256=f.sha256)
            for f in shards
        ),
        tensors=tuple(tensors[name] for name in sorted(tensors)),
    )


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


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON: the same manifest always gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest back and check that it is consistent in itself.

    Raises:
        ValueError: it is not a manifest this version knows, or contradicts itself; says why.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except UNDECODABLE as error:
        raise ValueError(f"it cannot be decoded: {error}") from None
    if manifest.format != FORMAT:
        raise ValueError(f"its format is {manifest.format}, this version reads {FORMAT}")
    sizes = {shard.file: shard.size_bytes for shard in manifest.shards}
    if len(sizes) != len(manifest.shards):
        raise ValueError("it names a shard file twice")
    seen: set[str] = set()
    for tensor in manifest.tensors:
        if tensor.name in seen:
            raise ValueError(f"it names tensor '{tensor.name}' twice")
        seen.add(tensor.name)
        size = sizes.get(tensor.file, -1)
        if tensor.offset < 0 or tensor.length < 0 or tensor.offset + tensor.length > size:
            raise ValueError(f"tensor '{tensor.name}' lies outside of its file")
        if tensor.length != size_of(tensor.dtype, tensor.shape):
            raise ValueError(f"tensor '{tensor.name}' has a wrong size or type")
    return manifest
