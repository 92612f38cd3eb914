"""A worker's barriers with the other ranks of its generation, in the control plane: no collective, no process group.

``Arrive`` goes to the agent over the control link and ``Released`` comes back once all ranks have arrived
(``runtime.barrier``). A barrier is met once: its name holds what makes it unique, such as the step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from distroml.runtime.barrier import MAX_NAME_CHARS, MAX_OPEN
from distroml.runtime.control import Arrive, Released


class NotMet(Exception):
    """Not all ranks arrived in time, or the generation has ended."""


class Meetings:
    """Barriers that this rank stands at; for any thread.

    Args:
        send: queues a frame to the agent.
    """

    def __init__(self, send: Callable[[Arrive], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._open: dict[str, int | None] = {}
        """The value of each barrier that is not taken yet, None until it is released."""
        self._ended = ""

    def arrive(self, name: str, value: int = 0) -> None:
        """Tell that this rank stands at ``name``, and go on; ``agreed`` or ``wait`` gives the outcome.

        Raises:
            ValueError: the name is empty or too long, or ``MAX_OPEN`` others are open.
        """
        if not 1 <= len(name) <= MAX_NAME_CHARS:
            raise ValueError(
                f"the barrier name {name[:32]!r} has {len(name)} characters; 1 to {MAX_NAME_CHARS} may be"
            )
        with self._changed:
            if name in self._open:
                return
            if len(self._open) >= MAX_OPEN:
                raise ValueError(
                    f"{MAX_OPEN} barriers are open; wait for one before arriving at {name!r}"
                )
            self._open[name] = None
        self._send(Arrive(name=name, value=value))

    def agreed(self, name: str) -> int | None:
        """The largest value that the ranks came with; None while some have not arrived.

        A value is given once, and the barrier is closed with it.
        """
        with self._changed:
            return self._take(name)

    def wait(self, name: str, timeout_s: float) -> int:
        """Wait until all ranks have arrived; returns the largest value.

        Raises:
            NotMet: they did not within ``timeout_s`` (the barrier stays open), or ``end`` was called.
            ValueError: this rank has not arrived there, or has been given the outcome.
        """
        with self._changed:
            if name not in self._open:
                raise ValueError(f"this rank does not stand at barrier {name!r}; call arrive first")
            self._changed.wait_for(
                lambda: self._ended or self._open.get(name) is not None, timeout=timeout_s
            )
            value = self._take(name)
        if value is None:
            raise NotMet(
                self._ended or f"not all ranks came to barrier {name!r} in {timeout_s:g} s"
            )
        return value

    def meet(self, name: str, timeout_s: float, value: int = 0) -> int:
        """``arrive`` and ``wait``."""
        self.arrive(name, value)
        return self.wait(name, timeout_s)

    def release(self, message: Released) -> None:
        """The agent told that all have arrived; called in the reading thread."""
        with self._changed:
            if message.name in self._open:
                self._open[message.name] = message.value
                self._changed.notify_all()

    def end(self, reason: str) -> None:
        """The generation is over: whoever waits, now or later, gets ``NotMet``."""
        with self._changed:
            self._ended = reason
            self._changed.notify_all()

    def _take(self, name: str) -> int | None:
        """The lock is held."""
        value = self._open.get(name)
        if value is not None:
            del self._open[name]
        return value
