"""What the leader passes on between learners, who have no links with each other.

A rank on one learner needs the rendezvous keys of ranks on another, at once; views of the cluster need the rest, now
and then. So a learner's report is passed on when its keys changed, and otherwise every `PASS_ON_S`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from distroml.consensus.frames import Channel
from distroml.reports import NodeReport

PASS_ON_S: Final = 2.0


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class ReportRelay:
    """`learners` gives the names of those connected here; `leads` whether this node is the one that relays."""

    def __init__(
        self,
        *,
        links: _Links,
        learners: Callable[[], Iterable[str]],
        leads: Callable[[], bool],
        monotonic: Callable[[], float],
    ) -> None:
        self._links, self._learners = links, learners
        self._leads, self._monotonic = leads, monotonic
        self._passed: dict[str, tuple[frozenset[str], float]] = {}
        """By learner: the keys it had when its report was passed on, and when that was."""

    def take(self, report: NodeReport, body: bytes) -> None:
        """A report that a learner sent, as it came."""
        if not self._leads():
            self._passed.clear()
            return
        learners = list(self._learners())
        if report.node not in learners or not self._due(report):
            return
        for learner in learners:
            if learner != report.node:
                self._links.send(learner, Channel.REPORT, body)
        for gone in self._passed.keys() - set(learners):
            del self._passed[gone]

    def _due(self, report: NodeReport) -> bool:
        keys = frozenset(
            f"{fact.run_id}/{key}" for fact in report.workers for key in fact.rendezvous
        )
        known, at_s = self._passed.get(report.node, (frozenset(), float("-inf")))
        now_s = self._monotonic()
        if keys <= known and now_s - at_s < PASS_ON_S:
            return False
        self._passed[report.node] = (keys, now_s)
        return True
