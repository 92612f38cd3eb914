"""One event loop in a thread of its own, for the libraries of object stores; the rest of a process calls it and waits.

It starts with the first call, belongs to the process that made it (a fork begins with none), and ends with the process.
What is kept in ``clients`` lives as long as the loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, NamedTuple, TypeVar

from distroml.runtime.checkpoint.priority import give_way

MAX_IN_FLIGHT = 8
"""Parts or ranges on their way at a time, in each direction and of all stores of a process together."""
MAX_CLIENTS = 16
CLOSE_TIMEOUT_S = 2.0
RETIRE_S = 120.0
"""How long what is under way on a client that was forgotten may take."""

_T = TypeVar("_T")


class LoopThread:
    """The loop, its thread, and the connections that live in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._clients: dict[Any, _Client] = {}
        self._retired: set[asyncio.Task[None]] = set()
        self._making: dict[Any, asyncio.Task[Any]] = {}
        """So that many first requests make one client; one task per key, since one that hangs is only its own trouble."""
        self.upload_slots = threading.BoundedSemaphore(MAX_IN_FLIGHT)
        """One for each part whose bytes are held for sending."""
        self.download_slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        """One for each range that is being received."""

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin ``work``."""
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Its result; whoever is interrupted while waiting ends it."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def client(self, key: Any, make: Callable[[AsyncExitStack], Awaitable[_T]]) -> _T:
        """The client called ``key``; made where there is none. In the loop.

        Whoever gives up waiting for it does not end its making: others wait for it too.

        Args:
            make: enters what has to be closed into the stack.
        """
        found: _T
        if (known := self._clients.get(key)) is not None:
            found = known.made
            return found
        if (making := self._making.get(key)) is None:
            making = asyncio.get_running_loop().create_task(self._make(key, make))
            self._making[key] = making
            making.add_done_callback(partial(self._on_made, key))
        found = await asyncio.shield(making)
        return found

    async def _make(self, key: Any, make: Callable[[AsyncExitStack], Awaitable[_T]]) -> _T:
        async with AsyncExitStack() as stack:
            made = await make(stack)
            while len(self._clients) >= MAX_CLIENTS:
                self.forget(next(iter(self._clients)))
            self._clients[key] = _Client(made, stack.pop_all(), time.monotonic())
            return made

    def _on_made(self, key: Any, making: asyncio.Task[Any]) -> None:
        del self._making[key]
        if not making.cancelled():
            making.exception()  # told to whoever waits; nobody may any more

    def forget(self, key: Any, min_age_s: float = 0.0) -> None:
        """The next call makes another client, if this one is so old; what uses it now may finish. In the loop."""
        known = self._clients.get(key)
        if known is not None and time.monotonic() - known.made_s >= min_age_s:
            del self._clients[key]
            task = asyncio.get_running_loop().create_task(_close_later(known.stack))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)

    def close(self) -> None:
        """Close all clients, end the thread; waits a bounded time."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close_clients(), loop).result(CLOSE_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_TIMEOUT_S)

    async def _close_clients(self) -> None:
        for key in list(self._clients):
            self.forget(key)
        await asyncio.sleep(0)  # each has begun, and closes when it is cancelled
        ending = [*self._retired, *self._making.values()]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_main, args=(self._loop,), name="store-loop", daemon=True
                )
                self._thread.start()
            return self._loop


class _Client(NamedTuple):
    made: Any
    stack: AsyncExitStack
    made_s: float


async def _close_later(stack: AsyncExitStack) -> None:
    try:
        await asyncio.sleep(RETIRE_S)
    finally:
        await stack.aclose()


_current = LoopThread()


def loop_thread() -> LoopThread:
    """That of this process."""
    return _current


def _main(loop: asyncio.AbstractEventLoop) -> None:
    give_way()
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()


def _begin_anew() -> None:
    """A child of a fork has no threads, and its parent's connections are not its own."""
    global _current
    _current = LoopThread()


os.register_at_fork(after_in_child=_begin_anew)
atexit.register(lambda: _current.close())
