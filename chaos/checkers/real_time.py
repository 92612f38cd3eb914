"""Promise: the log has an order that agrees with time, and a linearizable read is as new as anything known before it.

Each answer tells the log index of the state that it shows. Judged by:

- a linearizable read, and a write that was acknowledged, shows no older state than any answer that had returned before
  it was invoked, whoever got that one from whom;
- the answers of one node, one after the other, never go back, its restarts included.

Requests without an answer say nothing of the order, so they constrain nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import Operation, Outcome, Violation

NAME = "real_time"


def check(history: History, limits: Limits) -> list[Violation]:
    """All answers that are older than they may be."""
    answered = [
        one
        for one in of(history, Operation)
        if one.outcome is Outcome.OK and one.log_index is not None
    ]
    everywhere = _Newest(answered)
    found = []
    for one in answered:
        if _is_fresh(one) and (known := everywhere.before(one)) is not None:
            kind = "write" if one.key is not None else "linearizable read"
            what = (
                f"a {kind} of {one.client} at {one.node} shows index {one.log_index}, and index "
                f"{known.log_index} had been told {one.invoked_s - known.at_s:.3f} s before it was asked"
            )
            found.append(violation(NAME, what, [known, one], job_id=one.job_id))
    for node in sorted({one.node for one in answered}):
        own = [one for one in answered if one.node == node]
        newest = _Newest(own)
        for one in own:
            if not _is_fresh(one) and (known := newest.before(one)) is not None:
                what = f"node {node} showed index {known.log_index} and later {one.log_index}: its state went back"
                found.append(violation(NAME, what, [known, one]))
    return found


def _is_fresh(one: Operation) -> bool:
    return one.linearizable or one.key is not None


class _Newest:
    """Finds the newest answer that had returned when another was invoked."""

    def __init__(self, answered: list[Operation]) -> None:
        self._returned = sorted(answered, key=lambda one: one.at_s)
        self._times = [one.at_s for one in self._returned]
        self._best = list(accumulate(self._returned, _newer))

    def before(self, one: Operation) -> Operation | None:
        """The answer that proves ``one`` too old; None where there is none."""
        count = bisect_left(self._times, one.invoked_s)
        best = self._best[count - 1] if count else None
        return best if best is not None and _index(best) > _index(one) else None


def _index(one: Operation) -> int:
    return one.log_index if one.log_index is not None else -1


def _newer(one: Operation, other: Operation) -> Operation:
    return one if _index(one) >= _index(other) else other
