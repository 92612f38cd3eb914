"""Calls of stores from an event loop: each store has threads of its own, so that one that hangs holds up no other.

A call that hangs cannot be ended. Whoever waits for it is told after a while; its thread, and its place among those of
this store, stay taken until the store answers. That a network drive is gone costs a few threads, never all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from distroml.errors import StoreError

MAX_STORES = 64
"""With calls under way at the same time."""

_T = TypeVar("_T")


class StoreThreads:
    """Threads for the calls of one purpose; used from one event loop.

    Args:
        purpose: how they are called.
        each: calls at a time per store; further ones wait for their turn.
    """

    def __init__(self, purpose: str, each: int) -> None:
        self._purpose, self._each = purpose, each
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._calls: dict[str, int] = {}

    def busy(self, store: str) -> bool:
        """Whether a call would have to wait for others."""
        return self._calls.get(store, 0) >= self._each

    async def run(self, store: str, work: Callable[[], _T], limit_s: float) -> _T:
        """What ``work`` returns or raises.

        Args:
            store: its name, as in specs.
            limit_s: how long to wait, for a turn and for the answer.

        Raises:
            StoreError: there is no answer in time, or too many stores have calls under way.
        """
        submitted = self._submit(store, work)
        call = asyncio.wrap_future(submitted)
        try:
            await asyncio.wait([call], timeout=limit_s)
            if call.done():
                return call.result()
        finally:
            call.cancel()  # one that still waits for its turn
        raise StoreError(f"The checkpoint store {store} has not answered for {limit_s:.0f} s.")

    def close(self) -> None:
        """Begin no further call; waits for none."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, store: str, work: Callable[[], _T]) -> Future[_T]:
        pool = self._pools.get(store)
        if pool is None:
            if len(self._pools) >= MAX_STORES:
                raise StoreError(
                    f"{MAX_STORES} other checkpoint stores have calls under way; {store} is asked later."
                )
            name = f"{self._purpose}-store"
            pool = self._pools[store] = ThreadPoolExecutor(self._each, thread_name_prefix=name)
        submitted = pool.submit(work)
        self._calls[store] = self._calls.get(store, 0) + 1
        loop = asyncio.get_running_loop()
        submitted.add_done_callback(partial(self._ended, loop, store))
        return submitted

    def _ended(self, loop: asyncio.AbstractEventLoop, store: str, _: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody counts any more
            loop.call_soon_threadsafe(self._release, store)

    def _release(self, store: str) -> None:
        self._calls[store] -= 1
        if not self._calls[store]:
            del self._calls[store]
            self._pools.pop(store).shutdown(wait=False)
