"""Gradients of all ranks become one: DDP over a ``RankGroup`` with our own reduction.

``deterministic`` (the default) sums each bucket in rank order: all_to_all gives every rank its part from each
other rank, it adds them from rank 0 upwards, all_gather spreads the sums. The result does not depend on how
DDP lays out its buckets, so it keeps its bits when the group is formed again and DDP wrapped anew. ``fast`` is
Gloo's all-reduce. Both *sum*: the loss was already divided by the number of samples of the global batch.
"""

import queue
import threading

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


def ordered_sum(group: RankGroup, values: Tensor, received: Tensor) -> None:
    """Sum the 1-d ``values`` of all ranks in place, adding from rank 0 upwards.

    Args:
        received: scratch of ``padded_size(values)`` elements, reused between calls.
    """
    world, count = group.world_size, values.numel()
    padded = padded_size(values, world)
    source = values if padded == count else nn.functional.pad(values, (0, padded - count))
    group.all_to_all(received, source)
    total = _add_rows(received.view(world, padded // world))
    values.copy_(group.all_gather(total).view(-1)[:count])


def ordered_sum_small(group: RankGroup, values: Tensor, note: Tensor) -> Tensor:
    """``ordered_sum`` in one exchange instead of two, for few values; carries a float64 ``note`` along.

    Each rank gets everything and adds it itself, in the same order: the bits are those of ``ordered_sum``.

    Returns:
        The notes of all ranks, of shape [world_size, len(note)].
    """
    data = values.view(torch.uint8)
    note_bytes = note.numel() * note.element_size()
    packed = torch.cat([note.view(torch.uint8), data])
    packed = nn.functional.pad(packed, (0, -packed.numel() % ALIGNMENT))
    rows = group.all_gather(packed)
    values.copy_(_add_rows(rows[:, note_bytes : note_bytes + data.numel()].view(values.dtype)))
    return rows[:, :note_bytes].view(torch.float64)


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
        self._scratch: dict[tuple[torch.dtype, int], Tensor] = {}
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
                    if values.nbytes <= SMALL_BUCKET_BYTES:
                        empty = self._note[:0]
                        notes = ordered_sum_small(
                            self.group, values, empty if note is None else note
                        )
                        self._notes = self._notes if note is None else notes
                    else:
                        ordered_sum(self.group, values, self._scratch_for(values))
        except BaseException as error:
            self._failure = error
        future.set_result(values)

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

    def _scratch_for(self, values: Tensor) -> Tensor:
        key = (values.dtype, padded_size(values, self.group.world_size))
        if key not in self._scratch:
            self._scratch[key] = torch.empty(key[1], dtype=key[0])
        return self._scratch[key]

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
