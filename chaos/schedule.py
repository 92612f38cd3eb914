"""Which faults strike when: pure data, drawn from a seed, so that a run can be printed and played again.

What depends on the cluster is drawn as a choice ("leader", a number that picks one of those that are there) and resolved
when the fault strikes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from chaos.kinds import Kind

FIRST_S = 2.0
"""Nothing strikes earlier."""
PAUSE_S = (1.0, 8.0)
"""Between two strikes."""
MOST_OPEN = 3
"""Faults at a time that wait to be taken back."""
CALM_S = 1.0
"""Before the end nothing begins or lasts."""
LEAST_LASTING_S = 0.1
TICK_S = 0.001
"""Times are multiples of this."""


class Planned(Struct, frozen=True, kw_only=True):
    """One fault that is to strike."""

    at_s: float
    """Since the faults began."""
    kind: str
    lasts_s: float
    choices: dict[str, Any] = {}
    pick: float = 0.0
    """In [0, 1): picks among what is found in place."""

    @property
    def until_s(self) -> float:
        """When it is taken back."""
        return self.at_s + self.lasts_s

    def __str__(self) -> str:
        chosen = " ".join(f"{name}={value}" for name, value in self.choices.items())
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.at_s:7.2f} s  {self.kind}{lasts}{' ' if chosen else ''}{chosen}"


class Schedule(Struct, frozen=True, kw_only=True):
    """All faults of a run, in the order in which they strike."""

    seed: int
    duration_s: float
    nodes: int
    planned: tuple[Planned, ...]

    def __str__(self) -> str:
        head = f"seed {self.seed}, {self.duration_s:g} s, {self.nodes} nodes:"
        return "\n".join([head, *(f"  {one}" for one in self.planned)])


def draw(seed: int, duration_s: float, nodes: int, kinds: Sequence[Kind]) -> Schedule:
    """A schedule of these kinds; the same for the same arguments.

    Families take turns in a random order, and each goes through all its kinds before one of them comes again.
    """
    rng = random.Random(f"chaos/{seed}/{nodes}")
    turns = _Turns(rng, kinds)
    planned: list[Planned] = []
    at_s = FIRST_S + rng.uniform(0, 1)
    while at_s < duration_s - CALM_S:
        kind = turns.next(most_of(nodes))
        if kind is None:
            break
        fault = _plan(rng, kind, at_s, duration_s - CALM_S)
        open_until_s = sorted(one.until_s for one in planned if one.until_s > at_s)
        if len(open_until_s) >= MOST_OPEN:
            at_s = open_until_s[-MOST_OPEN] + TICK_S
            if at_s >= duration_s - CALM_S:
                break
            fault = _plan(rng, kind, at_s, duration_s - CALM_S)
        planned.append(fault)
        at_s += rng.uniform(*PAUSE_S)
    return Schedule(seed=seed, duration_s=duration_s, nodes=nodes, planned=tuple(planned))


def most_of(nodes: int) -> dict[str, int]:
    """How often a kind may come in a run of so many voters: what a cluster survives, and no more."""
    return {"directory-lost": minority(nodes)}


def minority(nodes: int) -> int:
    """How many of the voters may lose their directory for good."""
    return (nodes - 1) // 2


def _plan(rng: random.Random, kind: Kind, at_s: float, end_s: float) -> Planned:
    low_s, high_s = kind.lasts_s
    lasts_s = 0.0
    if high_s:
        longest_s = max(LEAST_LASTING_S, min(high_s, end_s - at_s))
        lasts_s = math.exp(rng.uniform(math.log(low_s), math.log(high_s)))
        lasts_s = min(lasts_s, longest_s)
    return Planned(
        at_s=round(at_s, 3),
        kind=kind.name,
        lasts_s=round(lasts_s, 3),
        choices={name: rng.choice(options) for name, options in kind.choices.items()},
        pick=round(rng.random(), 6),
    )


class _Turns:
    """Whose turn it is: families one after the other, each with a bag of its kinds."""

    def __init__(self, rng: random.Random, kinds: Iterable[Kind]) -> None:
        self._rng = rng
        self._kinds: dict[str, list[Kind]] = {}
        for kind in kinds:
            self._kinds.setdefault(kind.family, []).append(kind)
        self._bags: dict[str, list[Kind]] = {family: [] for family in self._kinds}
        self._families: list[str] = []
        self._count: dict[str, int] = {}

    def next(self, most: dict[str, int]) -> Kind | None:
        """None where every kind has come as often as it may."""
        spent = 0
        while spent <= len(self._kinds):
            if not self._families:
                self._families = self._rng.sample(sorted(self._kinds), len(self._kinds))
            if not self._families:
                return None
            kind = self._from_bag(self._families.pop(), most)
            if kind is not None:
                self._count[kind.name] = self._count.get(kind.name, 0) + 1
                return kind
            spent += 1
        return None

    def _from_bag(self, family: str, most: dict[str, int]) -> Kind | None:
        for _ in range(2):
            bag = self._bags[family]
            while bag:
                kind = bag.pop()
                if self._count.get(kind.name, 0) < most.get(kind.name, math.inf):
                    return kind
            self._bags[family] = self._rng.sample(self._kinds[family], len(self._kinds[family]))
        return None
