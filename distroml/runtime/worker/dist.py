"""``Dist``: what a training step sees of the other ranks.

A step is whole or it did not happen. All that a rank must hear from the others (gradients, the mean loss, running
statistics, flags) is exchanged inside ``backward``, so a step that got as far as the optimizer needs nobody any more,
and one that did not leaves the parameters as they were; ``roll_back`` puts the rest back.

A rank that holds several logical shards (fewer ranks than the job asked for) runs ``train_step`` once for each: all
but the last end at ``backward``, by ``ShardDone``, and the last one goes on with the gradients of all.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distroml.errors import DistroMLError
from distroml.runtime.worker.device import CPU
from distroml.runtime.worker.gradient_sync import GradientSync
from distroml.runtime.worker.logical_shards import LogicalShards
from distroml.runtime.worker.meetings import NotMet
from distroml.runtime.worker.metrics import as_metrics
from distroml.runtime.worker.process_group import COLLECTIVE_TIMEOUT_S, RankGroup
from distroml.runtime.worker.reduction import ALIGNMENT, Line
from distroml.runtime.worker.statistics import RunningStatistics

if TYPE_CHECKING:
    from distroml.runtime.worker.batches import LocalBatch
    from distroml.runtime.worker.meetings import Meetings
    from distroml.runtime.worker.state import TrainState

STOP, MOVE, VACATE = 1, 2, 4
"""Flags that reach all ranks with the next step: end after it; leave this generation after it; end after it with a
checkpoint in any case, since the run goes on elsewhere."""
BUSY = 8
"""A flag that ends nothing: this rank's last shard is still being written."""
MAX_BARRIER_NAME_CHARS = 100
ANY_REQUEST = 2**53
"""Where only a later shard of the rank says which one it could answer."""
_FIXED = ("loss_sum", "samples", "flags", "waited_s", "ids_high", "ids_low", "save_request")
"""What each shard's note holds, as float64, before the metrics given to ``backward``."""


class ShardDone(BaseException):
    """Unwinds ``train_step`` where a shard that is not the rank's last has its gradient."""


@dataclass(frozen=True)
class StepTotals:
    """What a completed step was, over all logical shards; equal on all ranks."""

    loss: float
    metrics: dict[str, float]
    flags: int
    ids: tuple[tuple[float, float], ...]
    """Digests of the sample ids, by shard."""
    least_waited_s: float
    """Of the rank that waited shortest for others in the step before."""
    save_request: int = 0
    """The newest request for a checkpoint that each rank is ready to answer after this step."""
    any_busy: bool = False
    """Whether a rank was still writing an earlier shard."""


@dataclass
class _Step:
    parts: Sequence[LocalBatch]
    flags: int
    ready: Callable[[], int | None]
    values: dict[str, Any]
    place: int = 0
    notes: list[list[float]] = field(default_factory=list)
    names: tuple[str, ...] = ()
    totals: StepTotals | None = None


class Dist:
    """This rank's place in the world and in the current step.

    Attributes that a train step may read: ``rank``, ``world_size``, ``local_rank`` (among the ranks of its node), ``shard`` (the logical shard that it computes now),
    ``device`` (where model and batches are), ``step`` (steps completed before this one), ``epoch``, ``samples`` (of this shard in this batch; 0 for a stand-in batch
    that must not count), and ``batch_samples`` (of the global batch).

    Ranks exchange what they like in ``set_up`` and ``evaluate``. ``train_step`` may do so before ``backward``, on ranks that
    have one logical shard, and not after it: a rank that is lost then would leave states between two steps.
    """

    def __init__(
        self,
        group: RankGroup,
        logical_shards: int | None = None,
        *,
        meetings: Meetings | None = None,
        local_rank: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self._group = group
        self.local_rank, self.device = local_rank, device
        self.rank, self.world_size = group.rank, group.world_size
        self.shards = LogicalShards(
            logical_shards or group.world_size, group.rank, group.world_size
        )
        self.shard = self.shards.mine[0]
        self.step = 0
        self.epoch = 0
        self.samples = 0
        self.batch_samples = 0
        self.waited_s = 0.0
        """For how long this rank waited for others in the step before."""
        self.busy = False
        """Whether this rank still wrote an earlier shard in the step before."""
        self._sync: GradientSync | None = None
        self._statistics: RunningStatistics | None = None
        self._packed = torch.empty((0, 0), dtype=torch.uint8)
        self._current: _Step | None = None
        self._waited_before_s = 0.0
        self._meetings = meetings
        self._met = 0
        """Barriers that this rank has passed in this generation."""

    def attach(
        self, model: nn.Module, reduction: str, *, unused_allowed: bool, line: Line | None = None
    ) -> None:
        """Exchange the gradients (over ``line``) and running statistics of ``model`` from now on."""
        self._statistics = RunningStatistics(model)
        if self.shards.count > 1:
            self._sync = GradientSync(
                model,
                self._group,
                self.shards,
                reduction,
                unused_allowed=unused_allowed,
                line=line,
            )

    def close(self) -> None:
        """Let go of the model."""
        if self._sync is not None:
            self._sync.close()

    # --- for adapters ------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **metrics: Tensor | float) -> None:
        """Backward pass of ``loss``, the mean over this shard's samples, for the mean over the global batch.

        After it, each rank holds the same gradients. Call it at most once per step.

        Args:
            metrics: further means over this shard's samples, the same names on each rank; they become means over
                the global batch.

        Raises:
            CollectiveBroken: another rank is gone.
        """
        step = self._step()
        self._take_note(loss.detach(), as_metrics(metrics, "dist.backward"))
        if self._sync is None:
            loss.backward()
            self._conclude(self._packed)
            return
        last = step.place == len(step.parts) - 1
        riding = last and self._sync.carries_notes
        pending = self._group.all_gather_async(self._packed) if last and not riding else None
        weighted = loss * (self.samples / self.batch_samples)
        rows = self._sync.backward(
            weighted, step.place, silent=self.samples == 0, notes=self._packed if riding else None
        )
        if not last:
            raise ShardDone
        if pending is not None:
            rows = self._by_shard(pending.wait())
        assert rows is not None
        self._conclude(rows)

    @property
    def group(self) -> RankGroup:
        """For collectives of the adapter's own."""
        self._may_exchange("group")
        return self._group

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """The ``values`` (as many on each rank) of all ranks, in rank order, as float64."""
        self._may_exchange("all_gather")
        gathered: list[list[float]] = self._group.all_gather(
            torch.tensor(values, dtype=torch.float64)
        ).tolist()
        return gathered

    def weighted_mean(self, means: Sequence[float], weight: float) -> list[float]:
        """Means over all ranks of per-rank ``means``, each weighing ``weight``; summed in rank order."""
        self._may_exchange("weighted_mean")
        rows = self.all_gather([weight, *(0.0 if weight == 0 else m * weight for m in means)])
        total = sum(row[0] for row in rows)
        return [
            sum(row[i] for row in rows) / total if total else 0.0 for i in range(1, len(rows[0]))
        ]

    def barrier(self, name: str, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
        """Return once each rank has called this; ``agree`` without a value."""
        self._may_exchange("barrier")
        self.agree(name, 0, timeout_s)

    def agree(self, name: str, value: int, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> int:
        """The largest ``value`` of all ranks, once each of them has called this.

        It goes through the control plane and needs no collective, so it costs milliseconds and may last for minutes.
        All ranks call the same ones in the same order. After a timeout it may be called again: the first value then
        counts.

        Args:
            name: says in errors what is waited for, 1 to ``MAX_BARRIER_NAME_CHARS``.
            value: of 64 bits, with sign.

        Raises:
            CollectiveBroken: another rank is gone, or the agent ended the generation.
            BarrierTimeout: some rank did not come in ``timeout_s``; says which, where that is known.
            ValueError, TypeError: the name or the value cannot be.
            DistroMLError: called in ``train_step`` where that cannot be.
        """
        self._may_exchange("agree")
        value = operator.index(value)
        if not 1 <= len(name) <= MAX_BARRIER_NAME_CHARS:
            raise ValueError(
                f"a barrier's name has 1 to {MAX_BARRIER_NAME_CHARS} characters, not {len(name)}: {name[:32]!r}"
            )
        self._group.check()
        if self.world_size == 1:
            return value
        if self._meetings is None:
            raise RuntimeError("this process has no agent, and so no control plane to meet in")
        place = f"{name}#{self._met + 1}"
        try:
            with self._group.waiting():
                agreed = self._meetings.meet(place, timeout_s, value)
        except NotMet:
            self._group.check()
            raise
        self._met += 1
        return agreed

    def _may_exchange(self, call: str) -> None:
        """Refuse what would be right only as long as nothing fails."""
        if self._current is None:
            return
        if self.is_concluded:
            raise DistroMLError(
                f"dist.{call} cannot be used in train_step after dist.backward: parameters may have moved, and a rank "
                "that is lost now would leave states between two steps. Use it in set_up or evaluate; give means to "
                "dist.backward(loss, name=value), or return them from train_step."
            )
        if self.shards.most > 1:
            raise DistroMLError(
                f"dist.{call} cannot be used in train_step on ranks that have several logical shards: train_step runs "
                "once for each of them, and not equally often on all ranks."
            )

    # --- for the step loop -------------------------------------------------------------------------------------

    def begin_step(
        self,
        state: TrainState,
        parts: Sequence[LocalBatch],
        flags: int,
        ready: Callable[[], int | None] = lambda: 0,
    ) -> None:
        """A step with one part per logical shard of this rank.

        Args:
            flags: this rank's wishes; any rank's is granted.
            ready: the newest request for a checkpoint that this rank could answer after the step, None while it still writes
                an earlier shard; it takes all ranks. Asked as late as all can still hear of it.
        """
        self.step = state.step
        # Autograd would add to those of a step that was cut short.
        state.model.zero_grad(set_to_none=True)
        self._current = _Step(parts, flags, ready, copy.deepcopy(state.values))
        if self._statistics is not None:
            self._statistics.remember()

    def begin_shard(self, state: TrainState, place: int) -> None:
        """The shard at ``place`` comes; it starts from what the step started from."""
        step = self._step()
        part = step.parts[place]
        if place > 0:
            self.roll_back(state)
        step.place, self.shard = place, self.shards.mine[place]
        self.epoch, self.samples, self.batch_samples = part.epoch, part.samples, part.batch_samples

    def end_shard(self, loss: Tensor | float | None) -> None:
        """``train_step`` came to its end; ``loss`` counts where it did not call ``backward``."""
        step = self._step()
        if step.totals is not None:
            return
        self._take_note(torch.as_tensor(0.0 if loss is None else loss), {})
        if step.place == len(step.parts) - 1:
            rows = self._by_shard(self._group.all_gather(self._packed))
            self._conclude(rows)

    @property
    def is_concluded(self) -> bool:
        """Whether the present step needs no other rank any more, and its parameters may have moved."""
        return self._current is not None and self._current.totals is not None

    def end_step(self) -> StepTotals:
        """What the step was, after its last shard."""
        totals = self._step().totals
        if totals is None:
            raise RuntimeError("the step's last shard has not ended")
        self._current = None
        return totals

    def roll_back(self, state: TrainState) -> None:
        """Put back what a forward pass changed: running statistics and the user's values."""
        if self._current is None:
            return
        if self._statistics is not None:
            self._statistics.restore()
        state.values = copy.deepcopy(self._current.values)

    # --- notes -------------------------------------------------------------------------------------------------

    def _step(self) -> _Step:
        if self._current is None:
            raise RuntimeError("no step is under way")
        return self._current

    def _take_note(self, loss: Tensor, metrics: dict[str, float]) -> None:
        """Pack what the other ranks should know of this shard: its note, then its running statistics."""
        step = self._step()
        names = tuple(sorted(metrics))
        if step.place == 0:
            step.names = names
        elif names != step.names:
            raise DistroMLError(
                f"dist.backward was given other metrics for one shard than for another: {names}, {step.names}"
            )
        weight = float(self.samples)
        part = step.parts[step.place]
        request: int | None = ANY_REQUEST
        if step.place == len(step.parts) - 1:
            request = step.ready()
            self.busy = request is None
            step.flags |= BUSY * self.busy
        note = [
            float(loss) * weight if weight else 0.0,
            weight,
            float(step.flags),
            self.waited_s,
            *part.ids_digest,
            float(request or 0),
            *(metrics[name] * weight if weight else 0.0 for name in names),
        ]
        statistics_bytes = self._statistics.size_bytes if self._statistics else 0
        note_bytes = 8 * len(note)
        width = -(-(note_bytes + statistics_bytes) // ALIGNMENT) * ALIGNMENT
        shape = (self.shards.most, width)
        if self._packed.shape != shape:
            self._packed = torch.zeros(shape, dtype=torch.uint8)
        row = self._packed[step.place]
        row[:note_bytes].copy_(torch.tensor(note, dtype=torch.float64).view(torch.uint8))
        if self._statistics is not None:
            self._statistics.pack(row[note_bytes : note_bytes + statistics_bytes])

    def _by_shard(self, gathered: Tensor) -> Tensor:
        """Rows of all ranks, [world_size, most, width], as rows of all shards."""
        rows = gathered.reshape(-1, gathered.shape[-1])
        return rows if self.shards.most == 1 else rows[self.shards.rows()]

    def _conclude(self, rows: Tensor) -> None:
        """All is known: from the notes of all shards to the step's totals, and statistics for the model."""
        step = self._step()
        self._group.check()
        width = 8 * (len(_FIXED) + len(step.names))
        notes: list[list[float]] = (
            rows[:, :width].contiguous().view(torch.float64).view(self.shards.count, -1).tolist()
        )
        samples = [note[1] for note in notes]
        if self._statistics is not None and self.shards.count > 1:
            end = width + self._statistics.size_bytes
            self._statistics.combine(rows[:, width:end], samples)
        total = max(sum(samples), 1.0)
        flags = 0
        for note in notes:
            flags |= int(note[2])
        step.totals = StepTotals(
            loss=sum(note[0] for note in notes) / total,
            metrics={
                name: sum(note[len(_FIXED) + i] for note in notes) / total
                for i, name in enumerate(step.names)
            },
            flags=flags & ~BUSY,
            any_busy=bool(flags & BUSY),
            ids=tuple((note[4], note[5]) for note in notes),
            least_waited_s=min(note[3] for note in notes),
            save_request=int(min(note[6] for note in notes)),
        )
        waited_s = self._sync.waited_s if self._sync else 0.0
        self.waited_s, self._waited_before_s = waited_s - self._waited_before_s, waited_s
