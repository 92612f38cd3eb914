"""Gradients of all logical shards become one, while backward is still going on.

Autograd tells of each gradient as it is ready. It is copied into its bucket, and once the rank's last shard has filled a
bucket it is reduced in a thread, behind the rest of backward; the last bucket has nothing to hide behind and is
reduced where it is. Buckets are exchanged in a fixed order, since all ranks must do the same.

The model is not wrapped: nothing has to be rebuilt when the ranks change, only the rows of the buckets.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from distroml.errors import DistroMLError
from distroml.runtime.worker.buckets import Bucket, make_buckets
from distroml.runtime.worker.device import CPU, Stream
from distroml.runtime.worker.logical_shards import LogicalShards
from distroml.runtime.worker.process_group import COLLECTIVE_TIMEOUT_S, RankGroup
from distroml.runtime.worker.reduction import SMALL_BYTES, FastSum, Line, OrderedSum


class GradientSync:
    """Exchanges the gradients of one model among the ranks of one generation.

    Args:
        reduction: ``deterministic`` or ``fast``.
        line: exchanges the buckets; None: the group does, as everything else.
        unused_allowed: parameters may stay without gradient in a step (costs one small exchange more).
    """

    def __init__(
        self,
        model: nn.Module,
        group: RankGroup,
        shards: LogicalShards,
        reduction: str,
        *,
        unused_allowed: bool = False,
        line: Line | None = None,
    ) -> None:
        self._group, self._shards = group, shards
        self._unused_allowed = unused_allowed
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._buckets = make_buckets(model.parameters(), len(shards.mine), shards.count)
        line = line or group
        self._ordered = OrderedSum(line, shards)
        self._sum = FastSum(line, shards) if reduction == "fast" else self._ordered
        self._stream = Stream(self._buckets[0].rows.device if self._buckets else CPU)
        small = [bucket for bucket in self._buckets if bucket.size_bytes <= SMALL_BYTES]
        self._carrier = small[0] if small and line is group and shards.world_size > 1 else None
        """With whose gradients the notes of a step travel."""
        self.waited_s = 0.0
        """For how long the step loop has waited for others in all."""
        self._places: dict[nn.Parameter, tuple[int, int]] = {}
        self._hooks = []
        for number, bucket in enumerate(self._buckets):
            for place, parameter in enumerate(bucket.parameters):
                self._places[parameter] = (number, place)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))
        self._row: int | None = None
        """Whose gradients come: the place of a logical shard on this rank; None outside ``Dist.backward``."""
        self._silent = False
        self._last = False
        self._missing: list[int] = []
        """Gradients still to come, by bucket."""
        self._seen: set[nn.Parameter] = set()
        self._used: set[nn.Parameter] = set()
        """Parameters that had a gradient in any shard of this rank in this step."""
        self._next = 0
        """The first bucket that is not yet on its way."""
        self._notes: Tensor | None = None
        self._gathered: Tensor | None = None
        self._failure: BaseException | None = None
        self._lane: _Lane | None = None

    @property
    def carries_notes(self) -> bool:
        """Whether a shard's note can ride along with the gradients instead of needing an exchange of its own."""
        return self._carrier is not None

    def close(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        if self._lane is not None:
            self._lane.end()
        for parameter in self._places:
            parameter.grad = None  # it lies in a bucket, which the next generation has no use for
        # What still runs would write into memory that has gone to others.
        self._stream.finish(COLLECTIVE_TIMEOUT_S)

    # --- a step ------------------------------------------------------------------------------------------------

    def backward(
        self, loss: Tensor, place: int, *, silent: bool, notes: Tensor | None = None
    ) -> Tensor | None:
        """Backward pass of the shard at ``place``; with the rank's last one, the exchange.

        Args:
            loss: already divided by the samples of the global batch: gradients are summed.
            silent: the shard holds no sample of the batch; its gradients count as zeros.
            notes: of all shards of this rank, to ride along with the last one (see ``OrderedSum``).

        Returns:
            The notes of all shards, where some were given.

        Raises:
            CollectiveBroken: a rank is gone. DistroMLError: the model does not do what an exchange needs.
        """
        self._row, self._silent = place, silent
        self._last = place == len(self._shards.mine) - 1
        self._seen = set()
        if place == 0:
            self._used, self._failure = set(), None
        if self._last:
            self._missing = [len(bucket.parameters) for bucket in self._buckets]
            self._next, self._notes, self._gathered = 0, notes, None
        try:
            loss.backward()
            self._fill_gaps()
            if self._last:
                self._finish()
        except RuntimeError:
            self._group.check()  # autograd may have wrapped what its hook raised
            raise
        finally:
            self._row = None
            if self._lane is not None and self._last:
                self._lane.drain()
        return self._gathered

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        """Autograd's hook: the gradient of ``parameter`` is complete."""
        row = self._row
        if row is None:
            self._failure = DistroMLError(
                "train_step must call dist.backward(loss) once per step, not loss.backward()."
            )
            raise self._failure
        if parameter in self._seen:
            raise DistroMLError(
                f"The gradient of '{self._names[parameter]}' came twice in one backward pass; "
                "use torch.utils.checkpoint with use_reentrant=False."
            )
        self._seen.add(parameter)
        number, place = self._places[parameter]
        bucket = self._buckets[number]
        target, gradient = bucket.view(row, place), parameter.grad
        assert gradient is not None
        if self._silent:
            target.zero_()
        elif gradient.data_ptr() != target.data_ptr() or gradient.stride() != target.stride():
            target.copy_(gradient)
        self._settle(parameter, number, place)

    def _settle(self, parameter: nn.Parameter, number: int, place: int) -> None:
        """The bucket has this gradient; with the last shard's, buckets that are complete set off."""
        if not self._last:
            parameter.grad = None  # the next shard must not add to it
            return
        parameter.grad = self._buckets[number].view(0, place)
        self._missing[number] -= 1
        while self._next < len(self._buckets) - 1 and self._missing[self._next] == 0:
            self._submit(self._buckets[self._next])
            self._next += 1

    def _fill_gaps(self) -> None:
        """Parameters that this shard did not use have gradient zero."""
        self._used |= self._seen
        if len(self._seen) == len(self._places):
            return
        unused = [parameter for parameter in self._places if parameter not in self._seen]
        if not self._unused_allowed:
            names = ", ".join(sorted(self._names[parameter] for parameter in unused)[:5])
            raise DistroMLError(
                f"No gradient for {len(unused)} parameters ({names}) in this step; if that is meant, set "
                "find_unused_parameters = True in the adapter, or requires_grad = False."
            )
        assert self._row is not None
        for parameter in unused:
            number, place = self._places[parameter]
            self._buckets[number].view(self._row, place).zero_()
            self._settle(parameter, number, place)

    def _finish(self) -> None:
        for bucket in self._buckets[self._next : -1]:
            self._submit(bucket)
        if self._stream.is_beside:
            torch.cuda.current_stream().synchronize()  # its own work is no waiting for others
        began_s = time.monotonic()
        with self._group.waiting() if self._stream.is_beside else nullcontext():
            self._exchange_the_rest()
        if self._unused_allowed:
            self._drop_what_nobody_used()
        self._group.check()
        self.waited_s += time.monotonic() - began_s

    def _exchange_the_rest(self) -> None:
        if self._lane is not None:
            self._lane.drain()
            if self._lane.failure is not None:
                raise self._lane.failure
        # Nothing is left for it to hide behind.
        self._reduce(self._buckets[-1], self._stream.mark())
        if not self._stream.finish(COLLECTIVE_TIMEOUT_S):
            raise self._group.break_off(
                "the exchange of gradients", f"no end within {COLLECTIVE_TIMEOUT_S:g} s"
            )

    def _submit(self, bucket: Bucket) -> None:
        if self._lane is None:
            self._lane = _Lane(self._stream.enter_thread)
        self._lane.submit(partial(self._reduce, bucket, self._stream.mark()))

    def _reduce(self, bucket: Bucket, filled: torch.cuda.Event | None) -> None:
        with self._stream.after(filled):
            if bucket is self._carrier and self._notes is not None:
                self._gathered = self._ordered.reduce_with_note(bucket, self._notes)
            else:
                self._sum.reduce(bucket)

    def _drop_what_nobody_used(self) -> None:
        """An optimizer treats no gradient and a zero gradient differently."""
        mine = torch.tensor([parameter in self._used for parameter in self._places])
        anybody = self._group.all_gather(mine).any(dim=0).tolist()
        for parameter, used in zip(self._places, anybody, strict=True):
            if not used:
                parameter.grad = None


class _Lane:
    """A thread that reduces buckets in the order in which they come.

    Args:
        enter: called in it first.
    """

    def __init__(self, enter: Callable[[], None]) -> None:
        self._enter = enter
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open = 0
        self._done = threading.Condition()
        self.failure: BaseException | None = None
        """The first one; it ends the generation, so nothing follows it."""
        threading.Thread(target=self._run, name="gradient-sync", daemon=True).start()

    def submit(self, reduce: Callable[[], None]) -> None:
        with self._done:
            self._open += 1
        self._jobs.put(reduce)

    def drain(self) -> None:
        """Wait until nothing is under way; an aborted group lets everything fail at once."""
        with self._done:
            self._done.wait_for(lambda: self._open == 0)

    def end(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        try:
            self._enter()
        except BaseException as error:
            self.failure = error
        while (reduce := self._jobs.get()) is not None:
            try:
                if self.failure is None:
                    with torch.no_grad():
                        reduce()
            except BaseException as error:
                self.failure = error
            with self._done:
                self._open -= 1
                self._done.notify_all()
