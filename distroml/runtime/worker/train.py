"""The step loop of one generation: from the state at some step boundary to the last step, or to an earlier boundary.

Each step consumes exactly one batch of the order, and ends for all ranks at the same boundary. Only rank 0
reports metrics: they are already means over the global batch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distroml.errors import DistroMLError
from distroml.reports import WorkerPhase
from distroml.runtime.checkpoint.manifest import LEDGER_VALUE, METRICS_VALUE
from distroml.runtime.control import MAX_METRIC_NAMES, MetricRecord
from distroml.runtime.worker import lr_schedule
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import BatchSource, LocalBatch
from distroml.runtime.worker.control_link import ControlLink, Position
from distroml.runtime.worker.device import moved
from distroml.runtime.worker.dist import Dist, ShardDone, StepTotals
from distroml.runtime.worker.ledger import EMPTY_LEDGER, advance
from distroml.runtime.worker.metrics import as_metrics, first_of
from distroml.runtime.worker.rendezvous import CollectiveBroken
from distroml.runtime.worker.seeding import seed_all
from distroml.runtime.worker.snapshot import Checkpointer
from distroml.runtime.worker.state import StateBlob, TrainState
from distroml.runtime.worker.timing import StepClock

EVALUATED_VALUE = "evaluated"
"""Where a blob's values keep when the model was last evaluated; like the ledger it is the run's, not the user's."""
MAX_METRICS_OF_STEP = MAX_METRIC_NAMES - 4
"""The user's, beside loss, lr, step_time and throughput."""
MAX_KEPT_METRICS = 4 * MAX_METRIC_NAMES
"""Names of which the newest value is kept; it is part of each checkpoint, and user code may make new ones in each step."""
MAX_KEPT_RECORDS = 2048
"""Records that each rank keeps, since those that rank 0 reported last may have died with its node."""


@dataclass
class Run:
    """What a process carries from generation to generation."""

    state: TrainState
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of each; ``note`` adds to it."""
    ledger: str = EMPTY_LEDGER
    evaluated: int = -1
    """The newest step after which the model was evaluated."""
    records: deque[MetricRecord] = field(default_factory=lambda: deque(maxlen=MAX_KEPT_RECORDS))
    """The newest, none missing between the first of them and the state's step: history takes what one rank tells of a
    generation for all that there is to tell."""

    @property
    def position(self) -> int:
        """Orders states: two per step, the second one after its evaluation."""
        return 2 * self.state.step + (self.evaluated == self.state.step)

    def note(self, values: dict[str, float]) -> None:
        """Keep newer values; beside them, of too many older ones the first in name order: the same on all ranks."""
        older = {name: value for name, value in self.metrics.items() if name not in values}
        kept = first_of(older, MAX_KEPT_METRICS - len(values))
        newest = {**self.metrics, **values}
        self.metrics = {name: newest[name] for name in newest if name in values or name in kept}

    def take(
        self,
        adapter: FrameworkAdapter,
        blob: StateBlob,
        step: int,
        records: Sequence[MetricRecord] = (),
    ) -> None:
        """Become what ``blob`` is of, in place; ``records`` are the holder's newest."""
        self.state = adapter.restore_state(self.state, blob)
        self.state.step = step
        # JSON has no NaN: a checkpoint holds null in its place
        saved = blob.values.get(METRICS_VALUE, {})
        self.metrics = {n: math.nan if value is None else value for n, value in saved.items()}
        self.ledger = blob.values.get(LEDGER_VALUE, EMPTY_LEDGER)
        self.evaluated = blob.values.get(EVALUATED_VALUE, -1)
        self._go_on_from(step, records)

    def records_since(self, step: int) -> list[MetricRecord]:
        """What a rank whose state is of ``step`` lacks of the records; a step may have two."""
        return [record for record in self.records if record.step >= step]

    def _go_on_from(self, step: int, records: Sequence[MetricRecord]) -> None:
        """Keep of the own records what leads up to the others', or to ``step``, without a hole."""
        first = records[0].step if records else step + 1
        own = [record for record in self.records if record.step < first]
        self.records.clear()
        if own and own[-1].step == first - 1:
            self.records.extend(own)
        self.records.extend(records)

    def blob(self, adapter: FrameworkAdapter) -> StateBlob:
        """The state at rest, with what belongs to the run."""
        blob = adapter.serialize_state(self.state)
        own = {
            METRICS_VALUE: self.metrics,
            LEDGER_VALUE: self.ledger,
            EVALUATED_VALUE: self.evaluated,
        }
        return StateBlob(blob.tensors, {**blob.values, **own})


@dataclass
class Training:
    """One generation's step loop and all it works with."""

    adapter: FrameworkAdapter
    run: Run
    source: BatchSource
    dist: Dist
    link: ControlLink
    checkpointer: Checkpointer | None
    total_steps: int
    flags: Callable[[], int]
    """What this rank wishes for the next boundary (``dist.STOP``, ``dist.MOVE``)."""
    wishes: int = 0
    """What the ranks together wished for the boundary from which they go on."""
    busy: bool = False
    """Whether this rank was still writing a shard when the ranks met."""
    any_busy: bool = False
    """Whether one of them was."""
    save_request: Callable[[], int] = lambda: 0
    """The newest request for a checkpoint that this rank has heard of."""
    answered: int = 0
    """The newest one that the ranks have agreed to answer."""
    on_first_step: Callable[[], None] = lambda: None
    clock: StepClock = field(default_factory=StepClock)

    @property
    def state(self) -> TrainState:
        return self.run.state

    def train(self) -> int:
        """Go on to the last step; 0 there, else the flags that ended it earlier."""
        self.state.model.train()
        self._catch_up()
        flags = self.wishes if self.state.step < self.total_steps else 0
        first = True
        while not flags and self.state.step < self.total_steps:
            flags = self._step()
            if first:
                self.on_first_step()
                first = False
        return flags if self.state.step < self.total_steps else 0

    def save_last(self) -> int | None:
        """Save the final checkpoint; its step, None where checkpoints are off or it was abandoned."""
        if self.checkpointer is None:
            return None
        return self.checkpointer.save_last(
            self.run.blob(self.adapter),
            self.state.step,
            self.source.cursor(self.state.step),
            self.answered,
        )

    def position(self, *, evaluating: bool = False) -> Position:
        """Where the loop is."""
        return Position(
            self.dist.group.generation,
            WorkerPhase.TRAINING,
            self.state.step,
            self.state.epoch,
            self.total_steps,
            self.clock.timing(),
            evaluating,
        )

    # --- one step ----------------------------------------------------------------------------------------------

    def _step(self) -> int:
        """One global batch; the flags of all ranks."""
        began_s = time.perf_counter()
        dist, run = self.dist, self.run
        parts = self.source.at(self.state.step, dist)
        data_s = time.perf_counter() - began_s
        run.state, totals, further = take_step(
            self.adapter, run.state, dist, parts, self.flags(), self._ready
        )
        # From here on the step is done, whatever becomes of the others.
        state, epoch = self.state, parts[0].epoch
        state.step, state.epoch = state.step + 1, epoch
        lr = float(state.optimizer.param_groups[0]["lr"])
        lr_schedule.advance(state.scheduler, totals.loss)
        if self.source.has_ids:
            run.ledger = advance(run.ledger, state.step, totals.ids)
        values = {"loss": totals.loss, **first_of(totals.metrics, MAX_METRICS_OF_STEP)}
        run.note(values)
        step_time = time.perf_counter() - began_s
        self.clock.add(step_time, data_s, dist.waited_s, totals.least_waited_s)
        values["lr"] = lr
        values["step_time"] = step_time
        values["throughput"] = parts[0].batch_samples / step_time
        record = MetricRecord(state.step, epoch, time.time(), values)
        run.records.append(record)
        try:
            self._add_further(values, further, parts[-1].samples)
        finally:
            self._report(record)
        done_s = time.perf_counter()
        if parts[0].ends_epoch or state.step == self.total_steps:
            self._evaluate()
        asked = totals.save_request > self.answered
        self.answered = max(self.answered, totals.save_request)
        if not totals.flags and state.step < self.total_steps:
            self._save_if_due(busy=dist.busy, any_busy=totals.any_busy, asked=asked)
        self.clock.saw_pause(time.perf_counter() - done_s)
        return totals.flags

    def _add_further(self, values: dict[str, float], further: dict[str, Any], samples: int) -> None:
        """The means that ``train_step`` returned, over what each rank knows of them."""
        own = as_metrics(
            {name: value for name, value in further.items() if name != "loss"}, "train_step"
        )
        own = first_of(own, MAX_METRIC_NAMES - len(values))
        if own:
            names = sorted(own)
            found = self.dist.weighted_mean([own[name] for name in names], samples)
            means = dict(zip(names, found, strict=True))
            values.update(means)
            self.run.note(means)

    # --- between steps -----------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """What belongs to the step that the generation starts from, and may have been cut short before."""
        if self.state.step > 0 and self._is_end_of_epoch(self.state.step):
            self._evaluate()
        # Who is about to end saves then; who moves on does so in the next generation.
        if not self.wishes and 0 < self.state.step < self.total_steps:
            self._save_if_due(busy=self.busy, any_busy=self.any_busy)

    def _is_end_of_epoch(self, step: int) -> bool:
        return step == self.total_steps or self.source.cursor(step).batch == 0

    def _evaluate(self) -> None:
        run, step = self.run, self.state.step
        if run.evaluated >= step:
            return
        self.link.progress(self.position(evaluating=True))
        seed_all(self.adapter.spec.seed, "evaluate", step)
        found = as_metrics(self.adapter.evaluate(self.state, self.dist), "evaluate")
        values = first_of(found, MAX_METRIC_NAMES)
        self.state.model.train()
        run.evaluated = step
        if not values:
            self.link.progress(self.position())
            return
        run.note(values)
        record = MetricRecord(step, self.state.epoch, time.time(), values)
        run.records.append(record)
        self._report(record)

    def _ready(self) -> int | None:
        """The newest request that this rank could answer after the present step; None while its last shard is written."""
        if self.checkpointer is None:
            return 0
        return None if self.checkpointer.busy else self.save_request()

    def _save_if_due(self, *, busy: bool, any_busy: bool, asked: bool = False) -> None:
        """Save this step; but shards that one rank cannot add to are of no use: then none does, and who is busy says so."""
        step = self.state.step
        due = asked or step % self.adapter.spec.checkpointing.every_n_steps == 0
        if self.checkpointer is None or not due:
            return
        if not any_busy:
            blob, cursor = self.run.blob(self.adapter), self.source.cursor(step)
            self.checkpointer.save(blob, step, cursor, self.answered)
        elif busy:
            self.checkpointer.leave_out(step)

    def _report(self, record: MetricRecord) -> None:
        records = (record,) if self.dist.rank == 0 else ()
        self.link.progress(self.position(), records)


def take_step(
    adapter: FrameworkAdapter,
    state: TrainState,
    dist: Dist,
    parts: Sequence[LocalBatch],
    flags: int = 0,
    ready: Callable[[], int | None] = lambda: 0,
) -> tuple[TrainState, StepTotals, dict[str, Any]]:
    """Compute this rank's shards of a batch and change the parameters.

    Returns:
        The state, what the step was over all ranks, and what ``train_step`` returned of this rank's last shard.

    Raises:
        CollectiveBroken: another rank is gone; the state is as it was.
        DistroMLError: ``train_step`` did what it must not; the state may be that of no step.
    """
    dist.begin_step(state, parts, flags, ready)
    further: dict[str, Any] = {}
    try:
        for place, part in enumerate(parts):
            dist.begin_shard(state, place)
            seed_all(adapter.spec.seed, "step", state.step, dist.shard)
            try:
                batch = moved(part.batch, dist.device)
                state, further = adapter.train_step(state, batch, dist)
            except ShardDone:
                continue
            dist.end_shard(further.get("loss"))
    except CollectiveBroken as error:
        if dist.is_concluded:
            raise DistroMLError(
                "train_step used a collective after dist.backward, when parameters may have moved, and it broke: "
                f"{error}"
            ) from error
        dist.roll_back(state)
        raise
    return state, dist.end_step(), further
