"""The step loop: from a state at some step boundary to the last step, or to a stop at an earlier one.

Each step consumes exactly one batch of the order, and ends for all ranks at the same boundary. Only rank 0
reports metrics: they are already means over the global batch.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from distroml.reports import WorkerPhase
from distroml.runtime.control import MetricRecord
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import BatchSource
from distroml.runtime.worker.control_link import ControlLink
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.gradient_sync import GradientSync
from distroml.runtime.worker.seeding import seed_all
from distroml.runtime.worker.snapshot import Checkpointer
from distroml.runtime.worker.state import StateBlob, TrainState

METRICS_VALUE = "metrics"
"""Where a blob's values keep the last metrics, so that a resumed run reports them too."""


@dataclass
class Training:
    """One run of the step loop and all it works with."""

    adapter: FrameworkAdapter
    state: TrainState
    source: BatchSource
    dist: Dist
    link: ControlLink
    checkpointer: Checkpointer | None
    total_steps: int
    stop: threading.Event
    """Set when the agent asked this rank to stop."""
    metrics: dict[str, float] = field(default_factory=dict)

    def run(self) -> bool:
        """Train to the last step; True where it stopped before that, as asked."""
        stopped = self.dist.any_rank(self.stop.is_set()) and self.state.step < self.total_steps
        self.state.module.train()
        while not stopped and self.state.step < self.total_steps:
            stopped = self._step() and self.state.step < self.total_steps
        return stopped

    def blob(self) -> StateBlob:
        """The state at rest, with the last metrics."""
        blob = self.adapter.serialize_state(self.state)
        return StateBlob(blob.tensors, {**blob.values, METRICS_VALUE: self.metrics})

    def save_last(self) -> int | None:
        """Save the final checkpoint; its step, None where checkpoints are off or it was abandoned."""
        if self.checkpointer is None:
            return None
        return self.checkpointer.save_last(
            self.blob(), self.state.step, self.source.cursor(self.state.step)
        )

    def _step(self) -> bool:
        """One global batch; True where some rank wants to stop after it."""
        began = time.perf_counter()
        state, dist = self.state, self.dist
        part = self.source.at(state.step, dist)
        dist.begin_step(
            state.step, part.epoch, part.samples, part.batch_samples, self.stop.is_set()
        )
        seed_all(self.adapter.spec.seed, "step", state.step, dist.rank)
        self.state, local = self.adapter.train_step(state, part.batch, dist)
        loss, stop = dist.end_step(local.get("loss"))
        state = self.state
        state.step, state.epoch = state.step + 1, part.epoch
        values = {"loss": loss, **self._further(local, part.samples)}
        self.metrics.update(values)
        step_time = time.perf_counter() - began
        values["lr"] = float(state.optimizer.param_groups[0]["lr"])
        values["step_time"] = step_time
        values["throughput"] = part.batch_samples / step_time
        self._report(part.epoch, values)
        if part.ends_epoch or state.step == self.total_steps:
            self._evaluate(part.epoch)
        if self.checkpointer and not stop and state.step < self.total_steps:
            self._save_if_due(self.checkpointer)
        return stop

    def _further(self, local: dict[str, Any], samples: int) -> dict[str, float]:
        """The user's other metrics, as means over the global batch."""
        names = sorted(set(local) - {"loss"})
        if not names:
            return {}
        means = self.dist.weighted_mean([float(local[name]) for name in names], samples)
        return dict(zip(names, means, strict=True))

    def _evaluate(self, epoch: int) -> None:
        seed_all(self.adapter.spec.seed, "evaluate", self.state.step)
        values = self.adapter.evaluate(self.state, self.dist)
        self.state.module.train()
        if values:
            self.metrics.update(values)
            self._report(epoch, values)

    def _save_if_due(self, checkpointer: Checkpointer) -> None:
        step = self.state.step
        if step % self.adapter.spec.checkpointing.every_n_steps == 0:
            checkpointer.save(self.blob(), step, self.source.cursor(step))

    def _report(self, epoch: int, values: dict[str, float]) -> None:
        record = None
        if self.dist.rank == 0:
            record = MetricRecord(self.state.step, epoch, time.time(), values)
        self.link.progress(WorkerPhase.TRAINING, self.state.step, epoch, self.total_steps, record)


def prepare_module(adapter: FrameworkAdapter, state: TrainState, dist: Dist) -> None:
    """Wrap the model for gradient exchange where there is somebody to exchange with."""
    dist.watch_statistics(state.model)
    if dist.world_size > 1:
        dist.sync = GradientSync(dist.group, adapter.spec.distributed.reduction)
        state.module = dist.sync.wrap(state.model, adapter.find_unused_parameters)
