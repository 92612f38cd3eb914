"""What this node has heard from the agents: the newest report of each, and when it came.

Every node keeps this, so that a new leader decides from facts at once and any node can show workers and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct

from distroml.errors import UNDECODABLE
from distroml.reports import NodeReport
from distroml.runtime.failure_detector import NodeObservation

MAX_NODES = 4096
"""Of which something is kept; names of hosts come and go, and the oldest make room."""


class ObservedNode(Struct, frozen=True):
    """The newest report of one node."""

    report: NodeReport
    age_s: float
    connected: bool


class Received(Struct, frozen=True):
    """What a frame told that was not known."""

    reports: tuple[NodeReport, ...] = ()
    news: bool = False
    """Whether decisions may follow from it: more than steps has changed."""


NOTHING = Received()


class _Heard(Struct):
    report: NodeReport
    at_s: float
    telling: tuple[object, ...] | None = None
    """As of ``_telling``, once it was needed."""


class Observations:
    """Newest reports by node; times are of the local monotonic clock, in seconds."""

    def __init__(
        self,
        *,
        name: str,
        monotonic: Callable[[], float],
        relays: frozenset[str] = frozenset(),
    ) -> None:
        self._name = name
        self._relays = relays
        """Voters, whose word about others a learner takes; nobody's on a voter."""
        self._monotonic = monotonic
        self._heard: dict[str, _Heard] = {}
        self._linked: set[str] = set()
        """Peers with a connection; others may be heard through a voter."""
        self._down_since_s: dict[str, float] = {}
        """Those that had one, the first to lose it first."""
        self._registered: Mapping[str, object] = {}
        self._decoder: msgspec.msgpack.Decoder[NodeReport | list[NodeReport]] = (
            msgspec.msgpack.Decoder(NodeReport | list[NodeReport])
        )
        self.refused = 0

    def receive(self, peer: str, body: bytes) -> Received:
        """Take the report that a peer sent, or what a voter passes on of several learners.

        Left out is what is bad, not the peer's to tell, or older than what we have.
        """
        try:
            told = self._decoder.decode(body)
        except UNDECODABLE:
            self.refused += 1
            return NOTHING
        if isinstance(told, NodeReport):
            if not self._may_tell(peer, told):
                self.refused += 1
                return NOTHING
            before = self._heard.get(told.node)
            known = None if before is None else before.telling or _telling(before.report)
            if not self.take(told):
                return NOTHING
            self._heard[told.node].telling = telling = _telling(told)
            return Received((told,), telling != known)
        others = [report for report in told if report.node != self._name]
        allowed = [report for report in others if self._may_tell(peer, report)]
        self.refused += len(others) - len(allowed)
        taken = tuple(report for report in allowed if self.take(report))
        return Received(taken, bool(taken))

    def _may_tell(self, peer: str, report: NodeReport) -> bool:
        if report.node == peer:
            return True
        return peer in self._relays and report.node not in self._relays | {self._name}

    def take(self, report: NodeReport) -> bool:
        """Keep a report unless a newer one of that node was seen."""
        known = self._heard.get(report.node)
        order = (report.incarnation, report.sequence)
        if known and order <= (known.report.incarnation, known.report.sequence):
            return False
        if known is None and len(self._heard) >= MAX_NODES and not self._make_room():
            self.refused += 1
            return False
        self._heard[report.node] = _Heard(report, self._monotonic())
        return True

    def link(self, peer: str, up: bool) -> None:
        """The connection with a peer came up or went down."""
        if up:
            self._linked.add(peer)
            self._down_since_s.pop(peer, None)
            return
        self._linked.discard(peer)
        if peer not in self._down_since_s and len(self._down_since_s) >= MAX_NODES:
            self._forget(next(iter(self._down_since_s)))
        self._down_since_s.setdefault(peer, self._monotonic())

    def registered(self, nodes: Mapping[str, object]) -> None:
        """The nodes of the cluster are these now; what is known of former ones goes."""
        if nodes is self._registered:
            return
        for name in self._registered.keys() - nodes.keys() - {self._name}:
            self._forget(name)
        self._registered = nodes

    def _make_room(self) -> bool:
        """Forget who was unheard for longest and has no connection; False if there is nobody."""
        silent = self._heard.keys() - self._linked - {self._name}
        if silent:
            self._forget(min(silent, key=lambda name: (self._heard[name].at_s, name)))
        return bool(silent)

    def _forget(self, name: str) -> None:
        self._heard.pop(name, None)
        self._down_since_s.pop(name, None)

    def report(self, node: str) -> NodeReport | None:
        """The newest report of a node."""
        heard = self._heard.get(node)
        return heard.report if heard else None

    def age_s(self, node: str, now_s: float) -> float:
        """Seconds since the newest report of a node came; 0 for one never heard of."""
        heard = self._heard.get(node)
        return now_s - heard.at_s if heard else 0.0

    def view(self) -> dict[str, ObservedNode]:
        """All nodes heard of, for the API."""
        now_s = self._monotonic()
        return {
            node: ObservedNode(heard.report, now_s - heard.at_s, self._connected(node))
            for node, heard in self._heard.items()
        }

    def observations(self, nodes: dict[str, int]) -> dict[str, NodeObservation]:
        """Input of the failure detector for the registered ``nodes`` (name -> incarnation)."""
        return {name: self._observe(name, incarnation) for name, incarnation in nodes.items()}

    def _observe(self, name: str, incarnation: int) -> NodeObservation:
        heard = self._heard.get(name)
        return NodeObservation(
            node=name,
            incarnation=heard.report.incarnation if heard else incarnation,
            last_heard_s=heard.at_s if heard else None,
            connected=self._connected(name),
            down_since_s=self._down_since_s.get(name),
        )

    def _connected(self, node: str) -> bool:
        return node == self._name or node not in self._down_since_s


def _telling(report: NodeReport) -> tuple[object, ...]:
    """Everything in a report that a decision may hang on at once: not that it came, and not steps completed.

    What follows from time alone is decided at every turn of the coordinator, so it need not hurry for the rest: with
    a thousand workers a turn takes milliseconds.
    """
    return (
        report.incarnation,
        report.slots,
        report.applied_index,
        report.draining,
        report.ready,
        [
            (
                fact.run_id,
                fact.generation,
                fact.rank,
                fact.phase,
                fact.pid,
                fact.total_steps,
                fact.shards,
                fact.abandoned,
                fact.failure,
                fact.outcome,
                fact.exit_code,
                fact.ended_at,
            )
            for fact in report.workers
        ],
    )
