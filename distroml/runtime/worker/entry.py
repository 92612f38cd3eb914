"""The life of a worker process, from its plan to its last frame.

connect → Hello → adapter and data → meet the other ranks → restore or initialise → train → last checkpoint →
Finished. Any exception ends it with one Failed frame; an exception that only echoes another rank's end says so.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

import torch

from distroml.errors import CorruptCheckpoint, DistroMLError
from distroml.model import FailureKind
from distroml.reports import WorkerFailure, WorkerOutcome, WorkerPhase
from distroml.runtime.checkpoint.store import LocalStore
from distroml.runtime.control import Failed, Finished, Hello, Rendezvous, WorkerPlan
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import (
    BatchSource,
    IndexedBatches,
    LoadedBatches,
    as_dataset,
)
from distroml.runtime.worker.builtin import load_adapter
from distroml.runtime.worker.control_link import ControlLink
from distroml.runtime.worker.digest import state_digest
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.process_group import CollectiveBroken, RankGroup
from distroml.runtime.worker.seeding import seed_all
from distroml.runtime.worker.snapshot import Checkpointer, read_checkpoint
from distroml.runtime.worker.state import TrainState
from distroml.runtime.worker.tensor_bytes import tensor_view
from distroml.runtime.worker.train import METRICS_VALUE, Training, prepare_module

MAX_TRACEBACK_BYTES = 8 * 1024
MAX_ERROR_BYTES = 2 * 1024
FAILED_EXIT = 1
_GLOO = re.compile(r"gloo|Connection (closed|reset|refused) by peer|Socket Timeout", re.IGNORECASE)


@dataclass
class Worker:
    """What exists of this worker so far; each stage adds to it."""

    plan: WorkerPlan
    group: RankGroup
    link: ControlLink
    stop: threading.Event = field(default_factory=threading.Event)
    training: Training | None = None

    @property
    def step(self) -> int:
        """Steps completed, those of earlier generations included."""
        if self.training is not None:
            return self.training.state.step
        return self.plan.checkpoint.step if self.plan.checkpoint else 0


def main(plan: WorkerPlan) -> int:
    """Live the worker's life; the exit code of the process."""
    configure_torch(plan.threads)
    stop = threading.Event()

    def publish(key: str, value: bytes) -> None:
        link.send(Rendezvous(key=key, value=value))

    group = RankGroup(plan.generation, plan.rank, plan.world_size, plan.host, publish)
    link = ControlLink(plan.control_path, group.store.feed, stop.set)
    link.send(
        Hello(run_id=plan.run_id, generation=plan.generation, rank=plan.rank, pid=os.getpid())
    )
    worker = Worker(plan, group, link, stop)
    try:
        outcome = _live(worker)
    except BaseException as error:
        traceback.print_exc()
        link.send(Failed(failure=_failure(worker, error), step=worker.step))
        link.flush()
        return FAILED_EXIT
    link.send(Finished(outcome=outcome))
    link.flush()
    if link.dropped_metrics:
        print(
            f"{link.dropped_metrics} metrics were dropped: the agent did not read them", flush=True
        )
    return 0


def configure_torch(threads: int) -> None:
    """The same bits for the same inputs, on ``threads`` cores."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # else each torch.empty is filled, which costs a write of all memory it hands out
    torch.utils.deterministic.fill_uninitialized_memory = False


def _live(worker: Worker) -> WorkerOutcome:
    plan, link = worker.plan, worker.link
    at = plan.checkpoint.step if plan.checkpoint else 0
    link.phase(WorkerPhase.CONNECTING, at, plan.checkpoint.epoch if plan.checkpoint else 0)
    adapter = load_adapter(plan.spec)
    adapter.init_distributed(plan)
    dist = Dist(worker.group)
    loader = adapter.build_dataloader(plan.spec, plan.rank, plan.world_size)
    dataset = as_dataset(adapter.build_dataset(plan.spec)) if loader is None else None
    _ = adapter.holdout  # built here, so that the other ranks do not wait for it in the first epoch
    worker.group.open()
    if loader is not None:
        source: BatchSource = LoadedBatches(loader, plan.spec.seed, dist)
    else:
        assert dataset is not None
        source = IndexedBatches(dataset, plan.spec.hyperparameters.batch_size, plan.spec.seed)
    link.phase(WorkerPhase.RESTORING, at, source.cursor(at).epoch)
    training = worker.training = _prepare(worker, adapter, dist, source)
    link.phase(WorkerPhase.TRAINING, at, training.state.epoch, training.total_steps)
    stopped = training.run()
    print("worker was asked to stop" if stopped else "worker trained to its last step", flush=True)
    link.phase(
        WorkerPhase.FINISHING, training.state.step, training.state.epoch, training.total_steps
    )
    return _finish(worker, training, stopped)


def _prepare(
    worker: Worker, adapter: FrameworkAdapter, dist: Dist, source: BatchSource
) -> Training:
    """The state to go on from, equal on all ranks, and the loop around it."""
    plan, spec = worker.plan, worker.plan.spec
    store = LocalStore(plan.store_dir)
    total_steps = spec.steps or spec.hyperparameters.epochs * source.batches_per_epoch
    seed_all(spec.seed, "model")
    metrics: dict[str, float] = {}
    if plan.checkpoint is None:
        state = adapter.new_state()
        _share_initial_state(state, worker.group)
    else:
        manifest, blob = read_checkpoint(store, plan.checkpoint)
        state = adapter.deserialize_state(blob)
        state.step = manifest.step
        # JSON has no NaN: it was written as null
        saved = blob.values.get(METRICS_VALUE, {})
        metrics = {name: math.nan if value is None else value for name, value in saved.items()}
    state.epoch = source.cursor(max(0, state.step - 1)).epoch
    _agree(dist, source, state, total_steps)
    prepare_module(adapter, state, dist)
    checkpointer = Checkpointer(plan, store, worker.link) if spec.checkpointing.enabled else None
    return Training(
        adapter=adapter,
        state=state,
        source=source,
        dist=dist,
        link=worker.link,
        checkpointer=checkpointer,
        total_steps=total_steps,
        stop=worker.stop,
        metrics=metrics,
    )


def _finish(worker: Worker, training: Training, stopped: bool) -> WorkerOutcome:
    """Save the last checkpoint and leave together, so that no rank sees another's sockets close early."""
    checkpoint_step = training.save_last()
    worker.group.barrier()
    return WorkerOutcome(
        step=training.state.step,
        epoch=training.state.epoch,
        state_digest=state_digest(training.blob()),
        metrics=training.metrics,
        stopped=stopped,
        checkpoint_step=checkpoint_step,
    )


def _share_initial_state(state: TrainState, group: RankGroup) -> None:
    """Rank 0's initial model on all ranks, also where a user's ``build_model`` is not repeatable."""
    if group.world_size == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in state.model.state_dict().values():
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for tensors in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        group.broadcast(flat, 0)
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
            at += tensor.numel()


def _agree(dist: Dist, source: BatchSource, state: TrainState, total_steps: int) -> None:
    """Check that all ranks are about to train the same thing.

    Raises:
        DistroMLError: a rank has other data, another model or another place; names what and who.
    """
    model = hashlib.sha256()
    for name, tensor in state.model.state_dict().items():
        model.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    mine = {
        "dataset": hashlib.sha256(source.digest.encode()).digest(),
        "number of steps": total_steps.to_bytes(8, "big"),
        "model": model.digest(),
        "step": state.step.to_bytes(8, "big"),
    }
    packed = torch.frombuffer(bytearray(b"".join(mine.values())), dtype=torch.uint8)
    rows = [bytes(tensor_view(row)) for row in dist.group.all_gather(packed)]
    at = 0
    for what, value in mine.items():
        parts = [row[at : at + len(value)] for row in rows]
        at += len(value)
        other = [rank for rank, part in enumerate(parts) if part != parts[0]]
        if other:
            raise DistroMLError(
                f"The {what} of ranks {other} differs from rank 0's; all nodes need the same code, data "
                "files and checkpoint store."
            )


def _failure(worker: Worker, error: BaseException) -> WorkerFailure:
    """What the agent should know of ``error``."""
    corrupt = isinstance(error, CorruptCheckpoint)
    collateral = isinstance(error, CollectiveBroken) or (
        isinstance(error, RuntimeError)
        and (worker.group.broken is not None or bool(_GLOO.search(str(error))))
    )
    text = "".join(traceback.format_exception(error))
    detail = str(error) or repr(error)
    return WorkerFailure(
        kind=FailureKind.CORRUPT_CHECKPOINT if corrupt else FailureKind.ERROR,
        error=_cut(f"{type(error).__name__}: {detail}", MAX_ERROR_BYTES),
        traceback=_cut(text, MAX_TRACEBACK_BYTES, keep_end=True),
        at=time.time(),
        collateral=collateral,
        checkpoint_step=worker.plan.checkpoint.step if corrupt and worker.plan.checkpoint else None,
    )


def _cut(text: str, limit_bytes: int, keep_end: bool = False) -> str:
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return text
    part = data[-limit_bytes:] if keep_end else data[:limit_bytes]
    return part.decode(errors="ignore")


if __name__ == "__main__":
    sys.exit("workers are forked by distroml.runtime.worker.forkserver")
