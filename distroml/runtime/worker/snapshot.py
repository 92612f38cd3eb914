"""Checkpoints as the step loop sees them: take one now, or come back from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from torch import Tensor

from distroml.errors import DistroMLError, StoreError
from distroml.model import Checkpoint
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.assembly import Base
from distroml.runtime.checkpoint.manifest import (
    MODEL_PREFIX,
    Manifest,
    base_for,
    checkpoints_directory,
    partition,
)
from distroml.runtime.checkpoint.reader import allocate_for, read_into, read_manifest
from distroml.runtime.checkpoint.shard_file import TensorBytes
from distroml.runtime.checkpoint.stores.interface import CheckpointStore
from distroml.runtime.checkpoint.stores.opening import LOCAL
from distroml.runtime.checkpoint.writer import ShardIdentity, ShardWriter
from distroml.runtime.control import Join, ShardAbandoned, ShardDurable, WorkerPlan
from distroml.runtime.worker.control_link import ControlLink
from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.tensor_bytes import as_tensor, buffer_bytes, copy_into

MAX_TOLD = 5
"""Differing tensors that an error names."""


class Checkpointer:
    """Cuts the state over the ranks by bytes and saves this rank's share in the background.

    It lives as long as the process, as its memory does; ``join`` gives it its rank in each generation.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        store: CheckpointStore,
        link: ControlLink,
        committed: Callable[[], Checkpoint | None],
    ) -> None:
        saving = plan.spec.checkpointing
        self._plan, self._store, self._link = plan, store, link
        self._known = committed
        self._writer = ShardWriter(
            store,
            self._durable,
            self._abandoned,
            codec="zstd" if saving.compression == "zstd" else "none",
            base=self._base if saving.delta else None,
            scattered=saving.store == LOCAL,
        )
        self._identity: ShardIdentity | None = None
        self._newest: int | None = None
        self._committed: int | None = None
        self._told_late = False
        """Whether it was told that the shard which was begun last takes so long."""
        self._begun_step = self._save_request = 0
        """Those of the shard which was begun last."""

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
        own = join.checkpoint
        if own is not None and not own.directory.startswith(
            checkpoints_directory(self._plan.job_id, self._plan.run_id) + "/"
        ):
            own = None  # another job's: this run has yet to save that step
        self._newest = self._committed = own.step if own else None

    @property
    def busy(self) -> bool:
        """Whether a shard is being written."""
        return self._writer.busy

    def make_room(self, blob: StateBlob) -> None:
        """Have the memory of a copy of this rank's share ready before the first one is due."""
        me = self._identity
        assert me is not None
        self._writer.make_room(buffer_bytes(share_of(blob, me.rank, me.world_size)))

    def save(self, blob: StateBlob, step: int, cursor: DataCursor, save_request: int = 0) -> None:
        """Copy this rank's share and write it behind training's back.

        ``save_request`` is the newest request for a checkpoint that the ranks have agreed on.

        While an earlier shard is in flight the new checkpoint is abandoned, with a note to the agent.
        """
        me = self._identity
        assert me is not None
        if step == self._newest:
            return
        if self._writer.busy:
            self._give_up(me, step)
            return
        self._newest = self._begun_step = step
        self._told_late, self._save_request = False, save_request
        tensors = share_of(blob, me.rank, me.world_size)
        copies = copy_into(self._writer.buffer(buffer_bytes(tensors)), tensors)
        self._writer.write(me, step, cursor, copies, _frozen(blob) if me.rank == 0 else None)

    def leave_out(self, step: int) -> None:
        """Tell that no rank saves this step because of this one; once until the shard that takes so long is written."""
        me = self._identity
        assert me is not None
        if not self._told_late:
            self._told_late = True
            self._give_up(me, step)

    def _give_up(self, me: ShardIdentity, step: int) -> None:
        busy = f"rank {me.rank}: that of step {self._begun_step} is still being written"
        self._abandoned(me, step, busy)

    def save_last(
        self, blob: StateBlob, step: int, cursor: DataCursor, save_request: int = 0
    ) -> int | None:
        """Save like ``save`` and wait; the step if this rank's shard of it is durable, else None."""
        self._writer.wait()
        self.save(blob, step, cursor, save_request)
        self._writer.wait()
        assert self._identity is not None
        durable = self._writer.durable == (self._identity.generation, step)
        return step if durable or step == self._committed else None

    def _base(self, me: ShardIdentity, step: int) -> Base:
        """What a shard may refer to: the tensors of the newest checkpoint known to be committed."""
        checkpoint = self._known()
        if checkpoint is None:
            return {}
        try:
            if checkpoint.store == LOCAL:
                self._link.supply.need(checkpoint, manifest_only=True)
            return base_for(
                me.job_id, me.run_id, step, checkpoint, read_manifest(self._store, checkpoint)
            )
        except StoreError as error:
            print(f"checkpoint of step {step} refers to no earlier one: {error}", flush=True)
            return {}

    def _durable(self, identity: ShardIdentity, shard: ShardFact) -> None:
        # The next shard is begun only when this one's writer has ended, so the request is still that of this one.
        told = msgspec.structs.replace(shard, save_request=self._save_request)
        self._link.send(ShardDurable(generation=identity.generation, shard=told))

    def _abandoned(self, identity: ShardIdentity, step: int, reason: str) -> None:
        self._link.send(ShardAbandoned(generation=identity.generation, step=step, reason=reason))


def share_of(blob: StateBlob, rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors that ``rank`` saves, those with the largest elements first: so each is aligned in its file."""
    sizes = {name: tensor.nbytes for name, tensor in blob.tensors.items()}
    share = partition(sizes, world_size)[rank]
    share.sort(key=lambda name: (-blob.tensors[name].element_size(), name))
    return {name: blob.tensors[name] for name in share}


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
    targets = {tensor.name: allocate_for(tensor) for tensor in manifest.tensors}
    read_into(store, checkpoint, manifest, targets)
    tensors = {
        tensor.name: as_tensor(
            TensorBytes(tensor.name, tensor.dtype, tensor.shape, targets[tensor.name])
        )
        for tensor in manifest.tensors
    }
    return manifest, StateBlob(tensors, manifest.values)


def read_weights(store: CheckpointStore, checkpoint: Checkpoint, fresh: StateBlob) -> StateBlob:
    """``fresh``, a state that has completed no step, with the model of another job's checkpoint.

    Raises:
        CorruptCheckpoint, StoreError: as ``read_checkpoint``.
        DistroMLError: the models differ; names the tensors.
    """
    _, blob = read_checkpoint(store, checkpoint)
    weights = model_of(blob)
    check_same_model(weights, model_of(fresh), checkpoint)
    return StateBlob({**fresh.tensors, **weights}, fresh.values)


def model_of(blob: StateBlob) -> dict[str, Tensor]:
    """The tensors of the model, without those of the optimizer."""
    return {name: t for name, t in blob.tensors.items() if name.startswith(MODEL_PREFIX)}


def check_same_model(
    theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    """Check that the tensors of another job's checkpoint fit this job's model.

    Raises:
        DistroMLError: names the first tensors that are missing, too many, or of another shape or type.
    """
    told = [f"{name} is only in the checkpoint" for name in sorted(set(theirs) - set(own))]
    told += [f"{name} is only in this job's model" for name in sorted(set(own) - set(theirs))]
    for name in sorted(set(own) & set(theirs)):
        a, b = theirs[name], own[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            told.append(f"{name} is {_kind(a)} in the checkpoint and {_kind(b)} here")
    if told:
        more = f"; and {len(told) - MAX_TOLD} more" if len(told) > MAX_TOLD else ""
        raise DistroMLError(
            f"init_from: {checkpoint.directory} does not fit this job's model: "
            f"{'; '.join(told[:MAX_TOLD])}{more}."
        )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
