"""Promise: a term has one leader at most, and no node goes back to an earlier term.

Judged by what nodes say of themselves: two that say they lead in the same term break it, and so does a node whose term
falls, its restarts included. A node that came back without its data has forgotten its term, and may say any.
"""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, violation
from chaos.records import FaultBegan, LeaderSeen, NodeSeen, Violation

NAME = "leaders"
FORGETFUL = "disk"
"""Family of the faults that may take a node's data."""


def check(history: History, limits: Limits) -> list[Violation]:
    """All second leaders and all terms that fell."""
    found: list[Violation] = []
    leaders: dict[int, LeaderSeen] = {}
    terms: dict[str, NodeSeen] = {}
    for record in history:
        match record:
            case LeaderSeen():
                first = leaders.setdefault(record.term, record)
                if first.node != record.node:
                    what = f"both {first.node} and {record.node} led in term {record.term}"
                    found.append(violation(NAME, what, [first, record]))
            case NodeSeen(answers=True):
                before = terms.get(record.node)
                if before is not None and record.term < before.term:
                    what = (
                        f"node {record.node} was in term {before.term} and is now in {record.term}"
                    )
                    found.append(violation(NAME, what, [before, record]))
                terms[record.node] = record
            case FaultBegan(family=family) if family == FORGETFUL:
                for node in record.nodes:
                    terms.pop(node, None)
    return found
