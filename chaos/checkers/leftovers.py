"""Promise: nothing outlives a cluster that was stopped: no process, port, shared memory, temporary file or descriptor."""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import Leftover, Violation

NAME = "leftovers"


def check(history: History, limits: Limits) -> list[Violation]:
    """Everything that was found when all was over."""
    return [
        violation(NAME, f"{one.kind.replace('_', ' ')} left over: {one.what}", [one])
        for one in of(history, Leftover)
    ]
