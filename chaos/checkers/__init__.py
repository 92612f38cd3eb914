"""Judges a history: each module is one promise, and a pure function that finds where it was broken.

The history alone decides, so a run on disk can be judged again, by the checkers of a later day too.
"""

from __future__ import annotations

from collections.abc import Callable

from chaos.checkers import (
    checkpoints,
    comeback,
    counts,
    fencing,
    jobs_kept,
    leaders,
    leftovers,
    memory,
    one_history,
    real_time,
    replicas,
    same_result,
    samples,
    save_requests,
    streams,
)
from chaos.checkers.facts import MAX_VIOLATIONS, History, Limits
from chaos.records import Violation

__all__ = ["CHECKERS", "History", "Limits", "judge"]

Checker = Callable[[History, Limits], list[Violation]]

_MODULES = (
    jobs_kept,
    real_time,
    one_history,
    leaders,
    fencing,
    checkpoints,
    save_requests,
    samples,
    same_result,
    streams,
    comeback,
    replicas,
    leftovers,
    memory,
    counts,
)
CHECKERS: dict[str, Checker] = {module.NAME: module.check for module in _MODULES}
"""By name, in the order in which they are reported."""


def judge(history: History, limits: Limits | None = None) -> list[Violation]:
    """All broken promises; none where the history holds them all.

    Args:
        limits: what the cluster may take; by default that of a machine with a core per node.
    """
    allowed = limits or Limits()
    found: list[Violation] = []
    for name, check in CHECKERS.items():
        broken = check(history, allowed)
        found += broken[:MAX_VIOLATIONS]
        if len(broken) > MAX_VIOLATIONS:
            what = f"and {len(broken) - MAX_VIOLATIONS} more of the kind"
            found.append(Violation(checker=name, what=what))
    return found
