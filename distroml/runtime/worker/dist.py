"""``Dist``: what a training step sees of the other ranks.

One small collective per step carries this rank's loss sum, its sample count and its stop flag. It is started
before backward, whose gradient exchange hides it, or rides along where that is small; all ranks add in rank
order, so each knows the exact mean over the global batch and all stop at the same step boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distroml.runtime.worker.gradient_sync import ALIGNMENT, GradientSync
from distroml.runtime.worker.process_group import PendingGather, RankGroup


class Dist:
    """This rank's place in the world and in the current step.

    Attributes that a train step may read: ``rank``, ``world_size``, ``step`` (steps completed before this
    one), ``epoch``, ``samples`` (of this rank in this batch; 0 for a stand-in batch that must not count),
    ``batch_samples`` (of all ranks), and ``group`` for collectives of its own.
    """

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.rank, self.world_size = group.rank, group.world_size
        self.step = 0
        self.epoch = 0
        self.samples = 0
        self.batch_samples = 0
        self.sync: GradientSync | None = None
        self.model: nn.Module | None = None
        """The bare model, whose running statistics are combined after each forward pass."""
        self._stop = False
        self._gather: PendingGather | None = None
        self._riding = False
        self._statistics: StatisticsSync | None = None

    # --- for adapters ------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Backward pass of ``loss``, the mean over this rank's samples, for the mean over the global batch.

        After it, each rank holds the same gradients. Call it at most once per step.

        Raises:
            CollectiveBroken: another rank is gone.
        """
        note = self._note(loss.detach())
        if self.sync is None:
            self._start_exchange(note)
            loss.backward()
            return
        self._riding = self.sync.carry(note)
        self._start_exchange(None if self._riding else note)
        self.sync.silent = self.samples == 0
        self.sync.expected = True
        try:
            (loss * (self.samples / self.batch_samples)).backward()
        finally:
            self.sync.expected = False
        self.sync.check()

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """The ``values`` (as many on each rank) of all ranks, in rank order, as float64."""
        gathered: list[list[float]] = self.group.all_gather(
            torch.tensor(values, dtype=torch.float64)
        ).tolist()
        return gathered

    def weighted_mean(self, means: Sequence[float], weight: float) -> list[float]:
        """Means over all ranks of per-rank ``means``, each weighing ``weight``; summed in rank order."""
        rows = self.all_gather([weight, *(0.0 if weight == 0 else m * weight for m in means)])
        total = sum(row[0] for row in rows)
        return [
            sum(row[i] for row in rows) / total if total else 0.0 for i in range(1, len(rows[0]))
        ]

    # --- for the step loop -------------------------------------------------------------------------------------

    def begin_step(
        self, step: int, epoch: int, samples: int, batch_samples: int, stop: bool
    ) -> None:
        """Say what the coming step is; ``stop`` is this rank's wish to end after it."""
        self.step, self.epoch = step, epoch
        self.samples, self.batch_samples = samples, batch_samples
        self._stop = stop
        self._gather, self._riding = None, False

    def end_step(self, loss: Tensor | float | None) -> tuple[float, bool]:
        """Mean loss over the global batch, and whether any rank wants to stop.

        Args:
            loss: this rank's mean loss, used where the step did not call ``backward``.
        """
        if self.sync is not None:
            self.sync.check()
        if self._gather is None and not self._riding:
            self._start_exchange(self._note(torch.as_tensor(0.0 if loss is None else loss)))
        notes = self.sync.carried() if self.sync and self._riding else self._gathered()
        rows: list[list[float]] = notes.tolist()
        if self._statistics is not None:
            self._statistics.finish([row[1] for row in rows])
        total, samples = sum(row[0] for row in rows), sum(row[1] for row in rows)
        return total / max(samples, 1.0), any(row[2] for row in rows)

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks where it is on one."""
        return any(row[0] for row in self.all_gather([float(flag)]))

    def watch_statistics(self, model: nn.Module) -> None:
        """Keep the running statistics (BatchNorm and the like) of ``model`` equal on all ranks."""
        buffers = [
            tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter)
        ]
        if self.world_size > 1 and buffers:
            self._statistics = StatisticsSync(self.group, buffers)

    def _note(self, loss: Tensor) -> Tensor:
        """What this rank tells of its step: loss sum, samples, stop flag."""
        loss_sum = float(loss) * self.samples if self.samples else 0.0
        return torch.tensor([loss_sum, self.samples, self._stop], dtype=torch.float64)

    def _start_exchange(self, note: Tensor | None) -> None:
        """The forward pass is over: send ``note`` (unless it rides with the gradients) and statistics."""
        if note is not None:
            self._gather = self.group.all_gather_async(note)
        if self._statistics is not None:
            self._statistics.start()

    def _gathered(self) -> Tensor:
        assert self._gather is not None
        return self._gather.wait()


class StatisticsSync:
    """Running statistics become their mean over the ranks, weighted by samples, in rank order.

    They are linear in each batch's statistics, so this is what the whole batch would have added; a rank
    without samples weighs nothing. Elements that are equal on all ranks (constants) keep their bits, and
    counters take the value of the first rank that had samples.
    """

    def __init__(self, group: RankGroup, buffers: list[Tensor]) -> None:
        self._group = group
        # widest first, so that each lies at a multiple of its own size among the packed bytes
        self._buffers = sorted(buffers, key=lambda buffer: -buffer.element_size())
        self._gather: PendingGather | None = None

    def start(self) -> None:
        """Begin the exchange; the forward pass is over."""
        data = [buffer.detach().reshape(-1).view(torch.uint8) for buffer in self._buffers]
        packed = torch.cat(data)
        self._gather = self._group.all_gather_async(
            nn.functional.pad(packed, (0, -packed.numel() % ALIGNMENT))
        )

    def finish(self, samples: list[float]) -> None:
        """Write the combined values; ``samples`` are those of each rank."""
        assert self._gather is not None
        holders = [rank for rank, count in enumerate(samples) if count > 0]
        shares = torch.tensor([samples[rank] for rank in holders], dtype=torch.float64)
        shares /= shares.sum()
        packed, self._gather, at = self._gather.wait()[holders], None, 0
        for buffer in self._buffers:
            rows = packed[:, at : at + buffer.nbytes].view(buffer.dtype)
            at += buffer.nbytes
            combined = rows[0]
            if rows.is_floating_point() and len(holders) > 1:
                mean = rows[0].double() * shares[0]
                for row, share in zip(rows[1:], shares[1:], strict=True):
                    mean += row.double() * share
                same = (rows == rows[0]).all(dim=0)
                combined = torch.where(same, combined, mean.to(buffer.dtype))
            buffer.data.copy_(combined.view(buffer.shape))
