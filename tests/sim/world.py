"""Virtual time: one queue of events, seeded random streams, and the fingerprint of a run."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

START_S = 1_000.0


class Violated(AssertionError):
    """An invariant does not hold."""


class World:
    """The events of one run in order of time, then of creation."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = START_S
        self.queue: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self.violations: list[str] = []
        self.events = 0
        self._order = 0
        self._trace = 0

    def stream(self, *name: object) -> random.Random:
        """Random numbers of one cause, so that removing another cause does not change them."""
        return random.Random("/".join(str(part) for part in (self.seed, *name)))

    def at(self, time_s: float, action: Callable[..., object], *args: Any) -> None:
        self._order = order = self._order + 1
        now = self.now
        heapq.heappush(self.queue, (time_s if time_s > now else now, order, action, args))

    def later(self, delay_s: float, action: Callable[..., object], *args: Any) -> None:
        self.at(self.now + delay_s, action, *args)

    def run(self, seconds: float) -> None:
        self.run_until(None, seconds)

    def run_until(self, condition: Callable[[], bool] | None, limit_s: float) -> bool:
        """Runs events until `condition`; False if `limit_s` of virtual time passed first.

        Raises Violated as soon as an invariant is seen broken.
        """
        end, queue, pop = self.now + limit_s, self.queue, heapq.heappop
        while True:
            if self.violations:
                raise Violated(f"at {self.now - START_S:.4f} s: {self.violations[0]}")
            if condition is not None and condition():
                return True
            if not queue or queue[0][0] > end:
                self.now = end
                return False
            self.now, _, action, args = pop(queue)
            self.events += 1
            action(*args)

    def violate(self, what: str) -> None:
        self.violations.append(what)

    def note(self, kind: int, one: int = 0, two: int = 0) -> None:
        """Adds an event to the fingerprint."""
        # Hashes of numbers, unlike those of strings, are the same in every process.
        self._trace = hash((self._trace, self.now, kind, one, two))

    @property
    def fingerprint(self) -> int:
        return self._trace
