"""A worker's barriers with the other ranks of its generation, in the control plane: no collective, no process group.

``Arrive`` goes to the agent over the control link and ``Released`` comes back once all ranks have arrived
(``runtime.barrier``); where that takes long, ``Awaited`` says who has not. A barrier is met once: its name holds what
makes it unique, such as the step. Adapters use them as ``Dist.barrier`` and ``Dist.agree``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from distroml.runtime.barrier import MAX_NAME_CHARS, MAX_OPEN
from distroml.runtime.control import Arrive, Awaited, Released

LARGEST_VALUE = 2**63 - 1


class NotMet(Exception):
    """The generation has ended before all ranks arrived."""


class BarrierTimeout(NotMet):
    """Not all ranks arrived in time."""


class Meetings:
    """Barriers that this rank stands at; for any thread.

    Args:
        send: queues a frame to the agent.
    """

    def __init__(self, send: Callable[[Arrive], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._generation = 0
        self._open: dict[str, int | None] = {}
        """The value of each barrier that is not taken yet, None until it is released."""
        self._stands: dict[str, Arrive] = {}
        """What was said of barriers that are not released yet."""
        self._missing: dict[str, tuple[int, ...]] = {}
        """Ranks that were missing at a barrier when that was last told."""
        self._ended = ""

    def join(self, generation: int) -> None:
        """A generation begins; barriers of the one before mean nothing any more."""
        with self._changed:
            self._generation, self._ended = generation, ""
            self._open.clear()
            self._stands.clear()
            self._missing.clear()

    def standing(self) -> list[Arrive]:
        """What an agent that has come back should hear again."""
        with self._changed:
            return list(self._stands.values())

    def arrive(self, name: str, value: int = 0) -> None:
        """Tell that this rank stands at ``name``, and go on; ``agreed`` or ``wait`` gives the outcome.

        Raises:
            ValueError: the name is empty or too long, the value takes more than 64 bits, or ``MAX_OPEN`` others are
                open.
        """
        if not 1 <= len(name) <= MAX_NAME_CHARS:
            raise ValueError(
                f"the barrier name {name[:32]!r} has {len(name)} characters; 1 to {MAX_NAME_CHARS} may be"
            )
        if not -LARGEST_VALUE - 1 <= value <= LARGEST_VALUE:
            raise ValueError(f"the value {value} for barrier {name!r} takes more than 64 bits")
        with self._changed:
            if name in self._open:
                return
            if len(self._open) >= MAX_OPEN:
                raise ValueError(
                    f"{MAX_OPEN} barriers are open; wait for one before arriving at {name!r}"
                )
            self._open[name] = None
            arrival = Arrive(generation=self._generation, name=name, value=value)
            self._stands[name] = arrival
        self._send(arrival)

    def agreed(self, name: str) -> int | None:
        """The largest value that the ranks came with; None while some have not arrived.

        A value is given once, and the barrier is closed with it.
        """
        with self._changed:
            return self._take(name)

    def wait(self, name: str, timeout_s: float) -> int:
        """Wait until all ranks have arrived; returns the largest value.

        Raises:
            BarrierTimeout: they did not within ``timeout_s``; the barrier stays open.
            NotMet: ``end`` was called.
            ValueError: this rank has not arrived there, or has been given the outcome.
        """
        with self._changed:
            if name not in self._open:
                raise ValueError(f"this rank does not stand at barrier {name!r}; call arrive first")
            self._changed.wait_for(
                lambda: self._ended or self._open.get(name) is not None, timeout=timeout_s
            )
            value, missing, ended = self._take(name), self._missing.get(name), self._ended
        if value is not None:
            return value
        if ended:
            raise NotMet(ended)
        raise BarrierTimeout(
            f"not all ranks came to barrier {name!r} in {timeout_s:g} s; {_told(missing)}"
        )

    def meet(self, name: str, timeout_s: float, value: int = 0) -> int:
        """``arrive`` and ``wait``."""
        self.arrive(name, value)
        return self.wait(name, timeout_s)

    def take(self, message: Released | Awaited) -> None:
        """The agent told that all have arrived, or who has not; called in the reading thread."""
        with self._changed:
            # What is of an earlier generation may still be on its way, and a name comes again in each.
            if message.generation != self._generation or message.name not in self._stands:
                return
            match message:
                case Awaited(missing=missing):
                    self._missing[message.name] = missing
                case Released(value=value):
                    self._open[message.name] = value
                    del self._stands[message.name]
                    self._missing.pop(message.name, None)
                    self._changed.notify_all()

    def end(self, generation: int, reason: str) -> None:
        """That generation is over: whoever waits in it, now or later, gets ``NotMet``."""
        with self._changed:
            if generation == self._generation:
                self._ended = reason
                self._changed.notify_all()

    def _take(self, name: str) -> int | None:
        """The lock is held."""
        value = self._open.get(name)
        if value is not None:
            del self._open[name]
        return value


def _told(missing: tuple[int, ...] | None) -> str:
    if not missing:
        return "no coordinator has said who is missing"
    ranks = ", ".join(map(str, missing))
    return f"rank{'s'[: len(missing) != 1]} {ranks} had not come when that was last heard of"
