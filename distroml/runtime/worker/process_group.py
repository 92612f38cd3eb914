"""The line between the ranks of one generation: a Gloo group without any global state.

Each generation has its own ``RankGroup``; nothing of c10d's globals is used, so nothing has to be cleaned up
before the next one can exist. The few rendezvous keys (each rank's addresses) travel over the workers' control
links: ``set`` publishes to the agent, keys of the other ranks come back through ``feed``. So there is no TCP
store, no port to agree on and no host whose death takes the rendezvous with it.

``abort`` releases whoever waits for a rendezvous. Freeing a *running* collective needs more (closing the group's
own sockets); that belongs there as well and changes nothing for the callers, who already treat
``CollectiveBroken`` as the end of the generation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as c10d
from torch import Tensor

RENDEZVOUS_TIMEOUT_S = 120.0
"""How long to wait for the other ranks' addresses; they may still be importing or reading data."""
COLLECTIVE_TIMEOUT_S = 600.0
"""A backstop only: agents end a generation much earlier when a rank is gone or makes no progress."""
GLOO_THREADS = 2
GROUP_NAME = "distroml"


class CollectiveBroken(RuntimeError):
    """A collective or the rendezvous failed: some other rank is gone. Never the fault of this rank's code."""


class RendezvousStore(c10d.Store):
    """What Gloo needs of a store, carried by the control link; keys live under the generation's prefix.

    Args:
        generation: keys of any other generation are never seen.
        publish: hands (key, value) to the agent, which relays it to the other ranks.
    """

    def __init__(self, generation: int, publish: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._prefix = f"g{generation}/"
        self._publish = publish
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._aborted = False

    def feed(self, keys: dict[str, bytes]) -> None:
        """Take keys that other ranks published; those of other generations are ignored."""
        with self._changed:
            self._values |= {k: v for k, v in keys.items() if k.startswith(self._prefix)}
            self._changed.notify_all()

    def abort(self) -> None:
        """Make every present and future wait raise ``CollectiveBroken``."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    # --- called by Gloo, from C++ ------------------------------------------------------------------------------

    def set(self, key: str, value: bytes | str) -> None:
        value = value if isinstance(value, bytes) else value.encode()
        self.feed({self._prefix + key: value})
        self._publish(self._prefix + key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[self._prefix + key]

    def wait(
        self, keys: list[str], timeout: timedelta = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
    ) -> None:
        wanted = [self._prefix + key for key in keys]
        with self._changed:
            complete = self._changed.wait_for(
                lambda: self._aborted or all(key in self._values for key in wanted),
                timeout.total_seconds(),
            )
            if self._aborted:
                raise CollectiveBroken("the rendezvous was aborted")
            if not complete:
                missing = [key for key in wanted if key not in self._values]
                raise CollectiveBroken(
                    f"no address of other ranks within {timeout.total_seconds():g} s: {missing}"
                )

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(self._prefix + key in self._values for key in keys)

    def set_timeout(self, timeout: timedelta) -> None:
        """Waits carry their own timeout."""


class PendingGather:
    """An all-gather under way; ``wait`` returns a tensor of shape [world_size, *input]."""

    def __init__(self, group: RankGroup, work: c10d.Work | None, output: Tensor) -> None:
        self._group, self._work, self._output = group, work, output

    def wait(self) -> Tensor:
        if self._work is not None:
            with self._group.guarded("all_gather"):
                self._work.wait()
        return self._output


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
        """The first collective that failed, once one has."""
        self._host = host
        self._handle: c10d.ProcessGroup | None = None

    def open(self) -> None:
        """Meet the other ranks and connect to each of them.

        Raises:
            CollectiveBroken: some rank did not come within ``RENDEZVOUS_TIMEOUT_S``, or left again.
        """
        if self.world_size == 1:
            return
        with self.guarded("rendezvous"):
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
            self._handle = handle

    @property
    def handle(self) -> c10d.ProcessGroup:
        """The c10d process group, for ``DistributedDataParallel`` and own collectives; world size over 1."""
        if self._handle is None:
            raise RuntimeError("the process group is not open (or the world has one rank)")
        return self._handle

    def abort(self) -> None:
        """Release whoever waits for other ranks' addresses; may be called from any thread."""
        self.store.abort()

    def close(self) -> None:
        """Give the group up; its destructor joins Gloo's threads."""
        self.abort()
        self._handle = None

    @contextmanager
    def guarded(self, operation: str) -> Iterator[None]:
        """Turn what Gloo raises into ``CollectiveBroken`` and remember the first one."""
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            reason = f"{operation} of generation {self.generation} failed: {error}"
            self.broken = self.broken or reason
            raise CollectiveBroken(reason) from error

    # --- collectives -------------------------------------------------------------------------------------------

    def all_gather_async(self, values: Tensor) -> PendingGather:
        """Start gathering ``values`` (contiguous, the same shape and dtype on each rank) in rank order."""
        if self.world_size == 1:
            return PendingGather(self, None, values.unsqueeze(0))
        output = values.new_empty((self.world_size, *values.shape))
        with self.guarded("all_gather"):
            work = self.handle.all_gather_single(output.view(-1), values.reshape(-1))
        return PendingGather(self, work, output)

    def all_gather(self, values: Tensor) -> Tensor:
        """Tensor of shape [world_size, *values.shape], in rank order."""
        return self.all_gather_async(values).wait()

    def all_gather_into(self, output: Tensor, values: Tensor) -> None:
        """Fill the 1-d ``output`` with the ``values`` of all ranks, one after the other in rank order."""
        with self.guarded("all_gather"):
            self.handle.all_gather_single(output, values).wait()

    def broadcast(self, values: Tensor, source: int) -> None:
        """Overwrite ``values`` (contiguous) on each rank with those of rank ``source``."""
        if self.world_size == 1:
            return
        with self.guarded("broadcast"):
            self.handle.broadcast(values, source).wait()

    def all_reduce_async(self, values: Tensor) -> torch.futures.Future[list[Tensor]]:
        """Start summing ``values`` in place, in Gloo's own order."""
        with self.guarded("all_reduce"):
            return self.handle.allreduce([values]).get_future()

    def all_to_all(self, output: Tensor, values: Tensor) -> None:
        """Send the i-th equal part of ``values`` to rank i; ``output`` holds what came, in rank order."""
        with self.guarded("all_to_all"):
            self.handle.all_to_all_single(output, values, [], []).wait()

    def barrier(self) -> None:
        """Return when each rank has come here."""
        if self.world_size > 1:
            with self.guarded("barrier"):
                self.handle.barrier().wait()
