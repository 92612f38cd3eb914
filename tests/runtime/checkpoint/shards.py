"""Builds shards and whole checkpoints without torch."""

from __future__ import annotations

import array
from collections.abc import Sequence
from functools import partial

from distroml.model import Checkpoint
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.assembly import Base
from distroml.runtime.checkpoint.commit import write_manifest
from distroml.runtime.checkpoint.manifest import partition
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.shard_file import Codec, TensorBytes
from distroml.runtime.checkpoint.stores.interface import CheckpointStore
from distroml.runtime.checkpoint.writer import ShardIdentity, ShardWriter

JOB, RUN = "job-1", "run-1"
CURSOR = DataCursor(epoch=2, batch=5)


def tensor(name: str, values: Sequence[float], shape: tuple[int, ...] | None = None) -> TensorBytes:
    data = memoryview(array.array("f", values)).cast("B")
    return TensorBytes(name, "F32", shape or (len(values),), data)


STATE = [
    tensor("model.weight", [1, 2, 3, 4, 5, 6], (2, 3)),
    tensor("model.bias", [7, 8]),
    tensor("optimizer.weight.exp_avg", [0.5] * 6, (2, 3)),
    tensor("model.empty", []),
]


def writer(
    store: CheckpointStore,
    rank: int = 0,
    world_size: int = 1,
    generation: int = 1,
    waits: list[float] | None = None,
    codec: Codec = "none",
    base: Base | None = None,
    scattered: bool = False,
) -> tuple[ShardWriter, list[ShardFact], list[tuple[int, str]]]:
    """A writer, and the lists that its durable and abandoned shards end up in."""
    durable: list[ShardFact] = []
    abandoned: list[tuple[int, str]] = []
    identity = ShardIdentity(
        job_id=JOB,
        run_id=RUN,
        generation=generation,
        rank=rank,
        world_size=world_size,
        strategy="data_parallel",
        backend="gloo",
    )
    made = ShardWriter(
        store,
        lambda _whose, fact: durable.append(fact),
        lambda _whose, step, reason: abandoned.append((step, reason)),
        wait_s=(waits if waits is not None else []).append,
        codec=codec,
        base=None if base is None else lambda _whose, _step: base,
        scattered=scattered,
    )
    made.write = partial(made.write, identity)  # type: ignore[method-assign]
    return made, durable, abandoned


def write_shards(
    store: CheckpointStore,
    step: int = 100,
    world_size: int = 2,
    generation: int = 1,
    state: Sequence[TensorBytes] = STATE,
    codec: Codec = "none",
    base: Base | None = None,
) -> list[ShardFact]:
    """Each rank's shard of ``state``, durable in ``store``."""
    facts: list[ShardFact] = []
    shares = partition({t.name: t.data.nbytes for t in state}, world_size)
    for rank, names in enumerate(shares):
        made, durable, abandoned = writer(
            store, rank, world_size, generation, codec=codec, base=base
        )
        share = [copied(t) for name in names for t in state if t.name == name]
        made.write(step, CURSOR, share, {"lr": 0.1} if rank == 0 else None)
        made.wait()
        assert not abandoned
        facts += durable
    return facts


def copied(one: TensorBytes) -> TensorBytes:
    """In memory that a writer may use as its own."""
    return TensorBytes(one.name, one.dtype, one.shape, memoryview(bytearray(one.data)))


def committed(
    store: CheckpointStore,
    step: int = 100,
    world_size: int = 2,
    generation: int = 1,
    state: Sequence[TensorBytes] = STATE,
    codec: Codec = "none",
    base: Base | None = None,
) -> Checkpoint:
    """A whole checkpoint of ``state``, as the log would have it."""
    return write_manifest(
        store,
        job_id=JOB,
        run_id=RUN,
        generation=generation,
        shards=write_shards(store, step, world_size, generation, state, codec, base),
        committed_at=12.0,
    )


def verify(store: CheckpointStore, checkpoint: Checkpoint) -> None:
    """Read all of it, as a restore does; raises CorruptCheckpoint."""
    for _ in read_tensors(store, checkpoint, read_manifest(store, checkpoint)):
        pass
