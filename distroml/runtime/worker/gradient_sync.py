"""Gradients of all ranks become one: DDP over a ``RankGroup`` with our own reduction.

``deterministic`` (the default) sums each bucket in rank order: all_to_all gives every rank its part from each
other rank, it adds them from rank 0 upwards, all_gather spreads the sums. The result does not depend on how
DDP lays out its buckets, so it keeps its bits when the group is formed again and DDP wrapped anew. ``fast`` is
Gloo's all-reduce. Both *sum*: the loss was already divided by the number of samples of the global batch.
"""

import queue
import threading
from typing import NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distroml.errors import DistroMLError
from distroml.runtime.worker.process_group import CollectiveBroken, RankGroup

BUCKET_MIB = 25
"""all_to_all is as fast as all-reduce up to this size and falls behind above it."""
SMALL_BUCKET_BYTES = 256 * 1024
"""Up to this size one exchange of everything beats two of the parts: latency is what counts."""
ALIGNMENT = 8


class Scratch(NamedTuple):
    """Memory that the exchange of one bucket needs, each ``padded_size`` elements; touched once, then reused."""

    sent: Tensor
    received: Tensor

    @classmethod
    def for_values(cls, values: Tensor, world_size: int) -> "Scratch":
        size = padded_size(values, world_size)
        return cls(values.new_zeros(size), values.new_zeros(size))


def ordered_sum(group: RankGroup, values: Tensor, scratch: Scratch) -> None:
    """Sum the 1-d ``values`` of all ranks in place, adding from rank 0 upwards."""
    count, padded = values.numel(), scratch.sent.numel()
    whole = values
    if padded != count:
        whole = scratch.sent
        whole[:count].copy_(values)
    group.all_to_all(scratch.received, whole)
    total = _add_rows(scratch.received.view(group.world_size, -1))
    group.all_gather_into(whole, total)
    if padded != count:
        values.copy_(whole[:count])


class SmallScratch(NamedTuple):
    """Memory of one small bucket's exchange, in bytes: what this rank sends and what all ranks sent."""

    packed: Tensor
    rows: Tensor

    @classmethod
    def for_values(cls, values: Tensor, note: Tensor, world_size: int) -> "SmallScratch":
        size = note.nbytes + -(-values.nbytes // ALIGNMENT) * ALIGNMENT
        packed = torch.zeros(size, dtype=torch.uint8)
        return cls(packed, packed.new_zeros((world_size, size)))


def ordered_sum_small(
    group: RankGroup, values: Tensor, note: Tensor, scratch: SmallScratch
) -> Tensor:
    """``ordered_sum`` in one exchange instead of two, for few values; carries a float64 ``note`` along.

    Each rank gets everything and adds it itself, in the same order: the bits are those of ``ordered_sum``.

    Returns:
        The notes of all ranks, of shape [world_size, len(note)]; valid until the scratch is used again.
    """
    begin, end = note.nbytes, note.nbytes + values.nbytes
    scratch.packed[:begin].copy_(note.view(torch.uint8))
    scratch.packed[begin:end].copy_(values.view(torch.uint8))
    group.all_gather_into(scratch.rows.view(-1), scratch.packed)
    values.copy_(_add_rows(scratch.rows[:, begin:end].view(values.dtype)))
    return scratch.rows[:, :begin].view(torch.float64)


def _add_rows(rows: Tensor) -> Tensor:
    """The sum of the rows, from the first to the last, in place of the first."""
    total = rows[0]
    for row in rows[1:]:
        total.add_(row)
    return total


def _finished(values: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(values)
    return future


def padded_size(values: Tensor, world_size: int) -> int:
    """Elements of ``values`` rounded up to a multiple of ``world_size``."""
    return -(-values.numel() // world_size) * world_size


class GradientSync:
    """The communication hook of one DDP module and what it needs between buckets.

    All buckets but the last are reduced in a thread while backward goes on; the last has nothing to hide
    behind and is reduced where it is. A failure is kept and raised by ``check`` after backward, since an
    exception inside the hook would surface as an unrelated one from C++.
    """

    def __init__(self, group: RankGroup, reduction: str) -> None:
        self.group = group
        self.silent = False
        """True while this rank holds no sample of the batch: it joins with zeros."""
        self.expected = False
        """True during ``Dist.backward``, the only way in which gradients are weighed correctly."""
        self._fast = reduction == "fast"
        self._gradient_bytes = 0
        self._note = torch.empty(0, dtype=torch.float64)
        self._notes: Tensor | None = None
        self._failure: BaseException | None = None
        self._scratch: dict[tuple[torch.dtype, int], Scratch] = {}
        self._small_scratch: dict[tuple[torch.dtype, int, int], SmallScratch] = {}
        self._jobs: queue.SimpleQueue[tuple[Tensor, Future[Tensor]]] = queue.SimpleQueue()
        self._open_jobs = 0
        self._done = threading.Condition()
        self._thread: threading.Thread | None = None

    def wrap(self, module: nn.Module, find_unused_parameters: bool) -> DistributedDataParallel:
        """DDP around ``module``; states are equal already, so nothing is sent."""
        self._gradient_bytes = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        parallel = DistributedDataParallel(
            module,
            process_group=self.group.handle,
            bucket_cap_mb=BUCKET_MIB,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            init_sync=False,
            find_unused_parameters=find_unused_parameters,
        )
        parallel.register_comm_hook(None, self.hook)
        return parallel

    def hook(self, _state: object, bucket: c10d.GradBucket) -> Future[Tensor]:
        """DDP's communication hook: a future of the bucket's buffer, summed over the ranks."""
        values = bucket.buffer()
        if not self.expected:
            self._failure = DistroMLError(
                "train_step must call dist.backward(loss) once per step, not loss.backward()."
            )
            return _finished(values)
        if self.silent:
            values.zero_()
        if self._fast:
            return self._reduce_fast(values)
        future: Future[Tensor] = Future()
        if bucket.is_last():
            self._drain()
            self._reduce(values, future, self._note)
        else:
            self._submit(values, future)
        return future

    def carry(self, note: Tensor) -> bool:
        """Send ``note`` (float64, 1-d) along with the last bucket of the coming backward pass.

        Returns:
            False where the gradients are too large for that; then nothing is done.
        """
        if self._fast or self._gradient_bytes > SMALL_BUCKET_BYTES:
            return False
        self._note = note
        return True

    def carried(self) -> Tensor:
        """The notes of all ranks, of shape [world_size, len(note)], after backward."""
        if self._notes is None:
            raise RuntimeError("backward did not reach the parameters: no gradient was exchanged")
        notes, self._notes = self._notes, None
        return notes

    def check(self) -> None:
        """Raise what went wrong in the hook since the last check."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    # --- one bucket --------------------------------------------------------------------------------------------

    def _reduce(self, values: Tensor, future: Future[Tensor], note: Tensor | None = None) -> None:
        try:
            if self._failure is None:
                with torch.no_grad():
                    self._sum(values, note)
        except BaseException as error:
            self._failure = error
        future.set_result(values)

    def _sum(self, values: Tensor, note: Tensor | None) -> None:
        if values.nbytes > SMALL_BUCKET_BYTES:
            ordered_sum(self.group, values, self._scratch_for(values))
            return
        carried = self._note[:0] if note is None else note
        scratch = self._small_scratch_for(values, carried)
        notes = ordered_sum_small(self.group, values, carried, scratch)
        if note is not None:
            self._notes = notes

    def _reduce_fast(self, values: Tensor) -> Future[Tensor]:
        def unpack(done: Future[list[Tensor]]) -> Tensor:
            try:
                done.value()
            except RuntimeError as error:
                reason = f"all_reduce of generation {self.group.generation} failed: {error}"
                self.group.broken = self.group.broken or reason
                self._failure = CollectiveBroken(reason)
            return values

        try:
            return self.group.all_reduce_async(values).then(unpack)
        except CollectiveBroken as error:
            self._failure = error
            return _finished(values)

    def _scratch_for(self, values: Tensor) -> Scratch:
        key = (values.dtype, values.numel())
        if key not in self._scratch:
            self._scratch[key] = Scratch.for_values(values, self.group.world_size)
        return self._scratch[key]

    def _small_scratch_for(self, values: Tensor, note: Tensor) -> SmallScratch:
        key = (values.dtype, values.numel(), note.numel())
        if key not in self._small_scratch:
            self._small_scratch[key] = SmallScratch.for_values(values, note, self.group.world_size)
        return self._small_scratch[key]

    # --- the lane of buckets that overlap with backward --------------------------------------------------------

    def _submit(self, values: Tensor, future: Future[Tensor]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._lane, name="gradient-sync", daemon=True)
            self._thread.start()
        with self._done:
            self._open_jobs += 1
        self._jobs.put((values, future))

    def _lane(self) -> None:
        while True:
            self._reduce(*self._jobs.get())
            with self._done:
                self._open_jobs -= 1
                self._done.notify_all()

    def _drain(self) -> None:
        with self._done:
            self._done.wait_for(lambda: self._open_jobs == 0)
