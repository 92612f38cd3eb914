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
from distroml.runtime.control import Join, ShardAbandoned, ShardDurable, WorkerPlan
from distroml.runtime.worker.control_link import ControlLink
from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.tensor_bytes import as_tensor, buffer_bytes, copy_into


class Checkpointer:
    """Cuts the state over the ranks by bytes and saves this rank's share in the background.

    It lives as long as the process, as its memory does; ``join`` gives it its rank in each generation.
    """

    def __init__(self, plan: WorkerPlan, store: CheckpointStore, link: ControlLink) -> None:
        self._plan, self._link = plan, link
        self._writer = ShardWriter(store, self._durable, self._abandoned)
        self._identity: ShardIdentity | None = None
        self._newest: int | None = None
        self._committed: int | None = None

    def join(self, join: Join) -> None:
        """Save for this rank of this generation from now on; what is under way is finished as it was begun."""
        spec = self._plan.spec
        self._identity = ShardIdentity(
            job_id=self._plan.job_id,
            run_id=self._plan.run_id,
            generation=join.generation,
            rank=join.rank,
            world_size=join.world_size,
            strategy=spec.distributed.strategy,
            backend=spec.distributed.backend,
        )
        self._newest = self._committed = join.checkpoint.step if join.checkpoint else None

    def save(self, blob: StateBlob, step: int, cursor: DataCursor) -> None:
        """Copy this rank's share and write it behind training's back.

        While an earlier shard is in flight the new checkpoint is abandoned, with a note to the agent.
        """
        me = self._identity
        assert me is not None
        if step == self._newest:
            return
        if self._writer.busy:
            self._abandoned(
                me, step, f"rank {me.rank}: an earlier checkpoint is still being written"
            )
            return
        self._newest = step
        sizes = {name: tensor.nbytes for name, tensor in blob.tensors.items()}
        share = partition(sizes, me.world_size)[me.rank]
        tensors = {name: blob.tensors[name] for name in share}
        copies = copy_into(self._writer.buffer(buffer_bytes(tensors)), tensors)
        self._writer.write(me, step, cursor, copies, _frozen(blob) if me.rank == 0 else None)

    def save_last(self, blob: StateBlob, step: int, cursor: DataCursor) -> int | None:
        """Save like ``save`` and wait; the step if this rank's shard of it is durable, else None."""
        self._writer.wait()
        self.save(blob, step, cursor)
        self._writer.wait()
        assert self._identity is not None
        durable = self._writer.durable == (self._identity.generation, step)
        return step if durable or step == self._committed else None

    def _durable(self, identity: ShardIdentity, shard: ShardFact) -> None:
        self._link.send(ShardDurable(generation=identity.generation, shard=shard))

    def _abandoned(self, identity: ShardIdentity, step: int, reason: str) -> None:
        self._link.send(ShardAbandoned(generation=identity.generation, step=step, reason=reason))


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
