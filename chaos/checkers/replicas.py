"""Promise: all nodes have applied the same log to the same state.

Judged by the digests of their states when the cluster had come to rest: at equal index they are equal, and with all nodes
up they come to an equal index.
"""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import Began, Settled, StateDigest, Violation

NAME = "replicas"


def check(history: History, limits: Limits) -> list[Violation]:
    """All nodes that disagree or never caught up."""
    found = []
    by_index: dict[int, StateDigest] = {}
    last: dict[str, StateDigest] = {}
    for one in of(history, StateDigest):
        first = by_index.setdefault(one.log_index, one)
        if first.sha256 != one.sha256:
            what = (
                f"at index {one.log_index} nodes {first.node} and {one.node} have different states"
            )
            found.append(violation(NAME, what, [first, one]))
        last[one.node] = one
    began, settled = of(history, Began), of(history, Settled)
    if began and settled and len(last) < began[0].nodes:
        what = (
            f"only {len(last)} of {began[0].nodes} nodes told the digest of their state in the end"
        )
        found.append(violation(NAME, what, list(last.values()), at_s=settled[-1].at_s))
    if len({one.log_index for one in last.values()}) > 1:
        told = ", ".join(f"{one.node} at {one.log_index}" for one in last.values())
        found.append(
            violation(NAME, f"the nodes never came to one log index: {told}", list(last.values()))
        )
    return found
