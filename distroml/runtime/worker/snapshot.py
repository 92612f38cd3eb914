"""Checkpoints as the step loop sees them: take one now, or come back from one."""

from __future__ import annotations

from typing import Any

import msgspec

from distroml.errors import DistroMLError
from distroml.model import Checkpoint
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.manifest import Manifest, partition
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.store import CheckpointStore
from distroml.runtime.checkpoint.writer import ShardIdentity, ShardWriter
from distroml.runtime.control import ShardAbandoned, ShardDurable, WorkerPlan
from distroml.runtime.worker.control_link import ControlLink
from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.tensor_bytes import as_tensor, buffer_bytes, copy_into


class Checkpointer:
    """Cuts the state over the ranks by bytes and saves this rank's share in the background."""

    def __init__(self, plan: WorkerPlan, store: CheckpointStore, link: ControlLink) -> None:
        self._rank, self._world_size = plan.rank, plan.world_size
        self._link = link
        identity = ShardIdentity(
            job_id=plan.job_id,
            run_id=plan.run_id,
            generation=plan.generation,
            rank=plan.rank,
            world_size=plan.world_size,
            strategy=plan.spec.distributed.strategy,
            backend=plan.spec.distributed.backend,
        )
        self._writer = ShardWriter(store, identity, self._durable, self._abandoned)
        self._newest = plan.checkpoint.step if plan.checkpoint else None

    def save(self, blob: StateBlob, step: int, cursor: DataCursor) -> None:
        """Copy this rank's share and write it behind training's back.

        While an earlier shard is in flight the new checkpoint is abandoned, with a note to the agent.
        """
        if step == self._newest:
            return
        if self._writer.busy:
            self._abandoned(
                step, f"rank {self._rank}: an earlier checkpoint is still being written"
            )
            return
        self._newest = step
        sizes = {name: tensor.nbytes for name, tensor in blob.tensors.items()}
        share = partition(sizes, self._world_size)[self._rank]
        tensors = {name: blob.tensors[name] for name in share}
        copies = copy_into(self._writer.buffer(buffer_bytes(tensors)), tensors)
        self._writer.write(step, cursor, copies, _frozen(blob) if self._rank == 0 else None)

    def save_last(self, blob: StateBlob, step: int, cursor: DataCursor) -> int | None:
        """Save like ``save`` and wait; the step if this rank's shard of it is durable, else None."""
        self._writer.wait()
        already = step == self._newest
        self.save(blob, step, cursor)
        self._writer.wait()
        restored = already and self._writer.durable_step is None
        return step if restored or self._writer.durable_step == step else None

    def _durable(self, shard: ShardFact) -> None:
        self._link.send(ShardDurable(shard=shard))

    def _abandoned(self, step: int, reason: str) -> None:
        self._link.send(ShardAbandoned(step=step, reason=reason))


def _frozen(blob: StateBlob) -> dict[str, Any]:
    """A copy of the blob's values, which training goes on changing."""
    try:
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(blob.values))
    except (TypeError, msgspec.MsgspecError) as error:
        raise DistroMLError(
            f"The values of a state (TrainState.values) must be JSON-able: {error}"
        ) from None
    return values


def read_checkpoint(store: CheckpointStore, checkpoint: Checkpoint) -> tuple[Manifest, StateBlob]:
    """The manifest and the whole verified state of a committed checkpoint.

    Raises:
        CorruptCheckpoint: bytes are missing or differ from what was committed.
        StoreError: the store cannot be read.
    """
    manifest = read_manifest(store, checkpoint)
    tensors = {piece.name: as_tensor(piece) for piece in read_tensors(store, checkpoint, manifest)}
    return manifest, StateBlob(tensors, manifest.values)
