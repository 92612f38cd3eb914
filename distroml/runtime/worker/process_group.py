"""The line between the ranks of one generation: a Gloo group without any global state.

Each generation has its own ``RankGroup``; nothing of c10d's globals is used, so nothing has to be cleaned up
before the next one can exist in the same process.

``abort``, from any thread, ends a generation for this rank: whoever waits for addresses, for the constructor or
for a collective gets ``CollectiveBroken`` at once, and so do the ranks at the other ends, whatever Gloo is doing
at the moment. Three things are needed for that. The store's waits end; the future of each running collective, on
which callers wait, is set by hand; and the group's sockets are shut down, which makes Gloo's threads give up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.futures import Future

from distroml.runtime.worker.rendezvous import CollectiveBroken, RendezvousStore
from distroml.runtime.worker.sockets import open_sockets, shut_down

COLLECTIVE_TIMEOUT_S = 600.0
"""A backstop only: agents end a generation much earlier when a rank is gone or makes no progress."""
GLOO_THREADS = 2
GROUP_NAME = "distroml"


class Pending:
    """A collective under way; ``wait`` returns its output."""

    def __init__(self, group: RankGroup, operation: str, output: Tensor) -> None:
        self._group, self._operation, self._output = group, operation, output
        self._done: Future[None] | None = None
        self.error: str | None = None

    def begin(self, work: c10d.Work) -> Pending:
        """Watch ``work``: whichever comes first, its end or an abort, releases ``wait``."""
        self._done = Future()
        self._group.enter(self)
        work.get_future().add_done_callback(self._on_end)
        return self

    def wait(self) -> Tensor:
        """Raises ``CollectiveBroken`` where it failed or the group was aborted."""
        if self._done is not None:
            self._group.blocked_since_s = time.monotonic()
            self._done.wait()
            self._group.blocked_since_s = None
            if self.error is not None:
                raise self._group.break_off(self._operation, self.error)
            self._group.check()
        return self._output

    def release(self, error: str | None) -> None:
        """Let ``wait`` go on; only for the group, which sees to it that it is called once."""
        self.error = error
        assert self._done is not None
        self._done.set_result(None)

    def _on_end(self, ended: Future[object]) -> None:
        try:
            ended.value()
        except Exception as error:
            self._group.leave(self, str(error))
        else:
            self._group.leave(self, None)


class RankGroup:
    """The ranks of one generation and the collectives among them.

    A world of one rank has no sockets and no threads; all collectives are then local.
    """

    def __init__(
        self,
        generation: int,
        rank: int,
        world_size: int,
        host: str,
        publish: Callable[[str, bytes], None],
    ) -> None:
        self.generation, self.rank, self.world_size = generation, rank, world_size
        self.store = RendezvousStore(generation, publish)
        self.broken: str | None = None
        """What ended it: the first collective that failed, or the reason of the abort."""
        self.broken_at: float | None = None
        """Unix seconds."""
        self.blocked_since_s: float | None = None
        """Since when (monotonic) this rank waits for others, if it does."""
        self.on_abort: Callable[[str], None] = lambda reason: None
        """Called once, with what ended the generation, in whichever thread did; see ``abort``."""
        self._host = host
        self._handle: c10d.ProcessGroup | None = None
        self._lock = threading.RLock()
        self._pending: set[Pending] = set()
        self._companions: list[Callable[[], None]] = []
        """What is aborted with it."""
        self._before: frozenset[str] | None = None
        self._sockets: frozenset[str] | None = None
        self._built = threading.Event()
        self._build_error: BaseException | None = None

    # --- life --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Meet the other ranks and connect to each of them.

        Raises:
            CollectiveBroken: some rank did not come in time, left again, or the group was aborted.
        """
        self.check()
        if self.world_size == 1:
            return
        with self._lock:
            self._before = frozenset(open_sockets())
        # In a thread of its own: the constructor cannot be interrupted, only left alone.
        threading.Thread(target=self._build, name="group-build", daemon=True).start()
        with self.waiting():
            self._built.wait()
        with self._lock:
            self.check()
            if self._build_error is not None:
                raise self.break_off("rendezvous", str(self._build_error))
            self._sockets = frozenset(open_sockets()) - self._before

    def _build(self) -> None:
        try:
            options = c10d.ProcessGroupGloo._Options()
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=self._host)]
            options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
            options._threads = GLOO_THREADS
            backend = c10d.ProcessGroupGloo(self.store, self.rank, self.world_size, options)
            handle = c10d.ProcessGroup(self.store, self.rank, self.world_size)
            handle._set_default_backend(c10d.ProcessGroup.BackendType.GLOO)
            handle._register_backend(
                torch.device("cpu"), c10d.ProcessGroup.BackendType.GLOO, backend
            )
            handle._set_group_name(GROUP_NAME)
            backend._set_sequence_number_for_group()
            with self._lock:
                abandoned = self.broken is not None
                if not abandoned:
                    self._handle = handle
            if abandoned:
                _bury(handle)
        except BaseException as error:
            self._build_error = error
        finally:
            self._built.set()

    def check(self) -> None:
        """Raise ``CollectiveBroken`` if the generation is over for this rank; before what cannot be undone."""
        if self.broken is not None:
            raise CollectiveBroken(self.broken)

    def accompany(self, abort: Callable[[], None]) -> None:
        """Have ``abort`` called, in a thread, when this group is aborted; at once where it has been."""
        with self._lock:
            if self.broken is None:
                self._companions.append(abort)
                return
        abort()

    def abort(self, reason: str) -> None:
        """End the generation for this rank; may be called from any thread, any number of times."""
        with self._lock:
            if self.broken is not None:
                return
            self.broken, self.broken_at = reason, time.time()
            self.store.abort()
            self._built.set()
            pending, self._pending = self._pending, set()
            companions, self._companions = self._companions, []
            if self._before is not None:
                shut_down(self._sockets, but_for=self._before)
        for one in pending:
            one.release(reason)
        for also in companions:  # they may take a while
            threading.Thread(target=also, name="group-abort", daemon=True).start()
        self.on_abort(reason)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Meanwhile this rank waits for others: it is not the one that hangs."""
        self.blocked_since_s = time.monotonic()
        try:
            yield
        finally:
            self.blocked_since_s = None

    def close(self) -> None:
        """Give the group up. Its destructor may block for long, so it is left to a thread."""
        self.abort(f"generation {self.generation} was left")
        handle, self._handle = self._handle, None
        if handle is not None:
            _bury(handle)

    def break_off(self, operation: str, error: str) -> CollectiveBroken:
        """The exception to raise for a collective that failed; ends the generation for this rank."""
        self.abort(f"{operation} of generation {self.generation} failed: {error}")
        return CollectiveBroken(self.broken)

    # --- collectives under way (see Pending) -------------------------------------------------------------------

    def enter(self, pending: Pending) -> None:
        """A collective begins; on an aborted group it is over at once."""
        with self._lock:
            if self.broken is None:
                self._pending.add(pending)
                return
        pending.release(self.broken)

    def leave(self, pending: Pending, error: str | None) -> None:
        """A collective ended by itself; called in Gloo's thread."""
        with self._lock:
            if pending not in self._pending:
                return
            self._pending.discard(pending)
        pending.release(error)

    def _start(self, operation: str, output: Tensor, begin: Callable[[], c10d.Work]) -> Pending:
        self.check()
        try:
            work = begin()
        except RuntimeError as error:
            raise self.break_off(operation, str(error)) from error
        return Pending(self, operation, output).begin(work)

    @property
    def _group(self) -> c10d.ProcessGroup:
        handle = self._handle
        if handle is None:
            self.check()
            raise RuntimeError("the process group is not open (or the world has one rank)")
        return handle

    # --- collectives -------------------------------------------------------------------------------------------

    def all_gather_async(self, values: Tensor) -> Pending:
        """Start gathering ``values`` (contiguous, same shape and dtype on each rank) into [world_size, *shape]."""
        if self.world_size == 1:
            self.check()
            return Pending(self, "all_gather", values.unsqueeze(0))
        copies = values.expand(self.world_size, *values.shape).contiguous()
        output = torch.empty_like(copies)
        return self._exchange("all_gather", output, copies)

    def all_gather(self, values: Tensor) -> Tensor:
        """Tensor of shape [world_size, *values.shape], in rank order."""
        return self.all_gather_async(values).wait()

    def all_gather_into(self, output: Tensor, copies: Tensor) -> None:
        """Fill ``output`` with what each rank has, one after the other in rank order.

        Gloo's own all_gather goes round a ring, one hop after the other, through memory that is new each time; sending
        each rank a copy needs one hop. Both tensors are contiguous.

        Args:
            copies: what this rank has, once for each rank, as many elements as ``output``.
        """
        self._exchange("all_gather", output, copies).wait()

    def broadcast(self, values: Tensor, source: int) -> None:
        """Overwrite ``values`` (contiguous) on each rank with those of rank ``source``."""
        if self.world_size > 1:
            self._start("broadcast", values, lambda: self._group.broadcast(values, source)).wait()

    def all_reduce(self, values: Tensor) -> None:
        """Sum ``values`` in place, in Gloo's own order."""
        if self.world_size > 1:
            self._start("all_reduce", values, lambda: self._group.allreduce([values])).wait()

    def all_to_all(
        self, output: Tensor, values: Tensor, received: list[int], sent: list[int]
    ) -> None:
        """Exchange consecutive parts of the 1-d ``values``: ``sent[i]`` elements go to rank i, ``received[i]``
        come from it; ``output`` holds what came, in rank order."""
        self._exchange("all_to_all", output, values, received, sent).wait()

    def _exchange(
        self,
        operation: str,
        output: Tensor,
        values: Tensor,
        received: list[int] | None = None,
        sent: list[int] | None = None,
    ) -> Pending:
        """Start sending a part of ``values`` to each rank; without sizes all parts are equal."""
        into, out = output.view(-1), values.view(-1)
        return self._start(
            operation,
            output,
            lambda: self._group.all_to_all_single(into, out, received or [], sent or []),
        )

    def barrier(self) -> None:
        """Return when each rank has come here."""
        self.all_gather(torch.zeros(1))


_graves: queue.SimpleQueue[object] = queue.SimpleQueue()
_grave_digger: list[threading.Thread] = []


def _bury(handle: object) -> None:
    """Drop the last reference in a thread: the destructor joins Gloo's threads, which may take their timeout."""
    if not _grave_digger:
        _grave_digger.append(threading.Thread(target=_dig, name="group-reaper", daemon=True))
        _grave_digger[0].start()
    _graves.put(handle)


def _dig() -> None:
    while True:
        handle: object | None = _graves.get()
        with suppress(Exception):
            del handle
