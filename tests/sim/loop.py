"""The event loop of one simulated process: asyncio's interface over the world's queue.

Everything a process does happens inside `enter`, which runs one event and all callbacks it makes ready. Its
clock may run fast or slow; while it is paused (SIGSTOP) events wait; once it is dead they are dropped.
"""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from tests.sim.world import START_S, World

MAX_CALLBACKS_PER_EVENT = 20_000
"""A process that does more without any time passing spins."""

TIMER_LATE_S = 1e-6
"""Timers are never early, not even by a rounding error."""


class Handle:
    """A scheduled callback. Contexts are not kept: nothing in the product uses context variables."""

    __slots__ = ("args", "callback", "gone")

    def __init__(self, callback: Callable[..., object], args: Any) -> None:
        self.callback, self.args, self.gone = callback, args, False

    def cancel(self) -> None:
        self.gone = True

    def cancelled(self) -> bool:
        return self.gone


class Timer(Handle):
    __slots__ = ("due",)

    def __init__(self, due: float, callback: Callable[..., object], args: Any) -> None:
        self.callback, self.args, self.gone = callback, args, False
        self.due = due

    def when(self) -> float:
        return self.due


class ProcessKilled(BaseException):
    """Raised by a failpoint: the process dies at this very instruction."""


class NodeLoop(asyncio.AbstractEventLoop):
    def __init__(self, world: World, name: str, rate: float = 1.0, poll_s: float = 0.0) -> None:
        self.world, self.name, self.poll_s = world, name, poll_s
        self.dead = False
        self.paused = False
        self.paused_s = 0.0
        self.on_killed: Callable[[], None] = lambda: None
        self.execute: Callable[[Callable[[], Any]], tuple[float, Any, BaseException | None]]
        """Runs a blocking call: (virtual seconds it takes, result, error)."""
        self.connect: Callable[..., Coroutine[Any, Any, Any]]
        self.listen: Callable[..., Coroutine[Any, Any, Any]]
        self._rate = rate
        self._base, self._base_at = START_S, world.now
        self._ready: deque[Handle] = deque()
        self._deferred: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._paused_at = 0.0
        self._fire_timer = self._fire  # one bound method, to find our timers in the queue
        self._polls: dict[float, list[tuple[Callable[..., object], tuple[Any, ...]]]] = {}

    # ------------------------------------------------------------------ time

    def time(self) -> float:
        return self._base + (self.world.now - self._base_at) * self._rate

    def set_rate(self, rate: float) -> None:
        """The clock runs at `rate` from now on; timers that wait are moved accordingly."""
        self._base, self._base_at, self._rate = self.time(), self.world.now, rate
        mine = [item[3][0] for item in self.world.queue if item[2] is self._fire_timer]
        for timer in mine:
            if not timer.gone:
                self.world.at(self._world_time(timer.due), self._fire_timer, timer)

    def _world_time(self, when: float) -> float:
        return self._base_at + (when - self._base) / self._rate + TIMER_LATE_S

    def _fire(self, timer: Timer) -> None:
        if timer.gone or self.dead:
            return
        if self.time() < timer.due - 1e-9:
            return  # the clock was slowed meanwhile; it is in the queue once more
        if self.paused:
            self._deferred.append((self._fire, (timer,)))
            return
        timer.gone = True
        self.enter(timer.callback, *timer.args)

    # ------------------------------------------------------------------ running

    def enter(self, callback: Callable[..., object], *args: Any) -> None:
        """One event from outside: a frame, a timer, the end of a disk call."""
        if self.dead:
            return
        if self.paused:
            self._deferred.append((callback, args))
            return
        events._set_running_loop(self)
        try:
            try:
                callback(*args)
            except Exception as error:
                self._raised(error)
            if self._ready:
                self._run_ready()
        finally:
            events._set_running_loop(None)

    def enter_at(self, at: float, callback: Callable[..., object], *args: Any) -> None:
        """`enter` at a time, or a little later: what arrives within one `poll_s` is found by one poll."""
        poll_s = self.poll_s
        if not poll_s:
            self.world.at(at, self.enter, callback, *args)
            return
        at = (at // poll_s + 1.0) * poll_s
        found = self._polls.get(at)
        if found is None:
            found = self._polls[at] = []
            self.world.at(at, self._poll, at)
        found.append((callback, args))

    def _poll(self, at: float) -> None:
        found = self._polls.pop(at)
        if len(found) == 1:
            self.enter(found[0][0], *found[0][1])
        else:
            self.enter(self._call_all, found)

    def _call_all(self, found: list[tuple[Callable[..., object], tuple[Any, ...]]]) -> None:
        for callback, args in found:
            if self.dead:
                return
            try:
                callback(*args)
            except Exception as error:
                self._raised(error)

    def _run_ready(self) -> None:
        ready, budget = self._ready, MAX_CALLBACKS_PER_EVENT
        while ready and not self.dead:
            handle = ready.popleft()
            if not handle.gone:
                try:
                    handle.callback(*handle.args)
                except Exception as error:
                    self._raised(error)
            budget -= 1
            if budget == 0:
                self.world.violate(f"{self.name} spins: {handle.callback!r}")
                return

    def _raised(self, error: Exception) -> None:
        if not self.dead:
            self.world.violate(f"{self.name}: a callback raised {type(error).__name__}: {error}")

    def pause(self) -> None:
        if not self.paused:
            self.paused, self._paused_at = True, self.world.now

    def resume(self) -> None:
        if not self.paused:
            return
        self.paused = False
        self.paused_s += self.world.now - self._paused_at
        deferred, self._deferred = self._deferred, deque()
        for callback, args in deferred:
            self.enter(callback, *args)

    # ------------------------------------------------------------------ asyncio's interface

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = Handle(callback, args)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        timer = Timer(when, callback, args)
        self.world.at(self._world_time(when), self._fire_timer, timer)
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        task: Any = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # a killed process leaves its tasks where they stand
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        future = self.create_future()
        if self.dead:
            return future  # the rest of a callback in whose midst the process died
        try:
            delay_s, result, error = self.execute(lambda: func(*args))
        except ProcessKilled:
            self.on_killed()
            return future  # of a process that is no more
        self.world.later(delay_s, self.enter, _settle, future, result, error)
        return future

    async def create_connection(
        self, factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:  # type: ignore[override]
        return await self.connect(factory, host, port)

    async def create_server(
        self, factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:  # type: ignore[override]
        return await self.listen(factory, host, port)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead:
            self.world.violate(
                f"{self.name}: {context.get('message')}: {context.get('exception')!r}"
            )


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
