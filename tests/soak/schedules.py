"""What is done to a job and when: data, drawn from a seed, so that a failure can be played again."""

from __future__ import annotations

import random
from enum import StrEnum

from msgspec import Struct

WORKERS = 4


class Harm(StrEnum):
    """What a fault does."""

    KILL = "kill"
    """SIGKILL of some ranks at once."""
    STOP = "stop"
    """SIGSTOP of one rank."""
    NODE = "node"
    """Power failure of a node that has ranks and does not lead; it is started again."""
    LEADER = "leader"
    """Power failure of the leader; it is started again."""


class Fault(Struct, frozen=True):
    """One harm, done once the job has completed ``step`` steps."""

    step: int
    harm: Harm
    ranks: tuple[int, ...] = ()
    """For ``KILL`` and ``STOP``."""

    def __str__(self) -> str:
        whom = f" {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.harm}{whom} at step {self.step}"


def draw(seed: int, last_step: int, most: int = 4) -> tuple[Fault, ...]:
    """1 to ``most`` faults at steps up to ``last_step``, in order."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(1, last_step + 1), rng.randint(1, most)))
    return tuple(_fault(rng, step) for step in steps)


def _fault(rng: random.Random, step: int) -> Fault:
    harms, weights = zip(*_WEIGHTS.items(), strict=True)
    (harm,) = rng.choices(harms, weights)
    count = {Harm.KILL: rng.randint(1, WORKERS), Harm.STOP: 1}.get(harm, 0)
    return Fault(step, harm, tuple(sorted(rng.sample(range(WORKERS), count))))


_WEIGHTS = {Harm.KILL: 6, Harm.STOP: 1, Harm.NODE: 2, Harm.LEADER: 2}
