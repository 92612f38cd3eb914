"""The line between the GPUs of one generation: NCCL, for gradients only.

Everything else (who stands where, notes of steps, states for ranks behind) goes through the ``RankGroup`` and so through host
memory; this line is opened and aborted with it. Collectives are put on the present CUDA stream and return at once.

A collective whose partner died never ends by itself. ``ncclCommAbort`` makes it end, with garbage in its output: whoever
waits for a stream asks the ``RankGroup`` afterwards whether it is whole, before anything that cannot be undone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as c10d
from torch import Tensor

from distroml.runtime.worker.process_group import COLLECTIVE_TIMEOUT_S, RankGroup

PREFIX = "nccl"
"""Of its keys in the generation's store."""


class DeviceGroup:
    """The exchange of device memory among the ranks of ``group``, of which there are at least two."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._handle: c10d.ProcessGroup | None = None
        self._lock = threading.Lock()
        self._aborted = False

    def open(self) -> None:
        """Connect to the GPUs of the other ranks.

        Raises:
            CollectiveBroken: some rank did not come in time, left again, or the group was aborted.
        """
        built = threading.Event()
        failure: list[BaseException] = []

        def build() -> None:
            try:
                self._build()
            except BaseException as error:
                failure.append(error)
            finally:
                built.set()

        def abort() -> None:
            built.set()
            self.abort()

        self._group.accompany(abort)
        # In a thread of its own: NCCL's way to connect cannot be interrupted, only left alone (for good, if a rank is lost there).
        threading.Thread(target=build, name="nccl-build", daemon=True).start()
        with self._group.waiting():
            built.wait()
        self._group.check()
        if failure:
            raise self._group.break_off("connecting GPUs", str(failure[0])) from failure[0]

    def _build(self) -> None:
        handle = connect(self._group, self._device)
        with self._lock:
            self._handle = handle
            late = self._aborted
        if late:
            handle.abort()

    def abort(self) -> None:
        """End what is under way, in whichever thread."""
        with self._lock:
            self._aborted = True
            handle = self._handle
        if handle is not None:
            handle.abort()

    # --- collectives -------------------------------------------------------------------------------------------

    def all_to_all(
        self, output: Tensor, values: Tensor, received: list[int], sent: list[int]
    ) -> None:
        """See ``RankGroup.all_to_all``."""
        self._put(
            "all_to_all", lambda: self._line.all_to_all_single(output, values, received, sent)
        )

    def all_gather_into(self, output: Tensor, copies: Tensor) -> None:
        """See ``RankGroup.all_gather_into``; NCCL needs no copies."""
        own = copies.view(self._group.world_size, -1)[0]
        self._put("all_gather", lambda: self._line._allgather_base(output.view(-1), own))

    def all_reduce(self, values: Tensor) -> None:
        """See ``RankGroup.all_reduce``."""
        self._put("all_reduce", lambda: self._line.allreduce([values]))

    @property
    def _line(self) -> c10d.ProcessGroup:
        handle = self._handle
        if handle is None:
            self._group.check()
            raise RuntimeError("the line between the GPUs is not open")
        return handle

    def _put(self, operation: str, begin: Callable[[], c10d.Work]) -> None:
        """Have the present stream wait for a collective; this thread does not."""
        self._group.check()
        try:
            begin().wait()
        except RuntimeError as error:
            raise self._group.break_off(operation, str(error)) from error


def connect(group: RankGroup, device: torch.device) -> c10d.ProcessGroup:
    """NCCL among the ranks of ``group``, connected when this returns."""
    torch.cuda.set_device(device)  # each thread has its own
    torch.cuda.empty_cache()  # NCCL takes memory that torch does not know of
    store = c10d.PrefixStore(PREFIX, group.store)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    backend = c10d.ProcessGroupNCCL(store, group.rank, group.world_size, options)
    handle = c10d.ProcessGroup(store, group.rank, group.world_size)
    handle._set_default_backend(c10d.ProcessGroup.BackendType.NCCL)
    handle._register_backend(torch.device("cuda"), c10d.ProcessGroup.BackendType.NCCL, backend)
    backend.eager_connect_single_device(device)
    return handle
