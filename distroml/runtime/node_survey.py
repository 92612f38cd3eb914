"""The nodes of this turn: whose status changes, who is gone, who may get work.

Pure; the first step of ``runtime.reconciler``. It merges what the log says of each node with what the failure
detector says, so that the rest of the turn sees the statuses as they will be once the changes are applied.
"""

from __future__ import annotations

from msgspec import Struct

from distroml.commands import SetNodeStatus
from distroml.consensus.state import ClusterState
from distroml.model import FailureKind, Member, Node, NodeStatus
from distroml.reports import NodeReport
from distroml.runtime.facts import (
    Facts,
    NodeFacts,
    NodeSighting,
    Now,
    ReconcilerSettings,
    node_sighting_of,
)
from distroml.runtime.failure_detector import Health
from distroml.runtime.scheduler import Host, assigned_places, leftover_workers, possible_workers


class GoneNode(Struct, frozen=True):
    """A node that can no longer hold the ranks of a generation."""

    kind: FailureKind
    said: str
    """Such as ``lost (silent for 3.1 s)``."""


class NodeView(Struct, frozen=True, kw_only=True):
    """One node with the status that it has after this turn."""

    node: Node
    status: NodeStatus
    reason: str
    health: Health
    sighting: NodeSighting
    incarnation: int
    """The newest known, registered or heard."""
    report: NodeReport | None
    """Only if it speaks for the registered incarnation."""
    returned: NodeReport | None = None
    """Of a later incarnation, which has yet to register."""

    def holds(self, member: Member) -> bool:
        """Whether a worker that was given to ``member.incarnation`` may still run there.

        An agent that has come back says so before it is registered.
        """
        if self.returned is not None:
            since = self.returned.workers_since or self.returned.incarnation
            return since <= member.incarnation <= self.returned.incarnation
        return self.node.holds(member)

    @property
    def changed(self) -> bool:
        return self.status is not self.node.status

    @property
    def leaving(self) -> bool:
        """Whether the node shuts down: what runs there will end in seconds."""
        draining = self.report is not None and self.report.draining
        return draining and self.status is NodeStatus.DRAINING

    @property
    def speaks(self) -> bool:
        """Whether its report describes what runs there now."""
        gone = self.status in (NodeStatus.LOST, NodeStatus.LEFT)
        return self.report is not None and not gone


class Survey(Struct, frozen=True, kw_only=True):
    """All registered nodes, by name in sorted order."""

    views: dict[str, NodeView]
    hosts: tuple[Host, ...]
    unheard: tuple[str, ...]
    """Nodes whose first report is awaited before anything is placed."""
    returning_slots: int
    """Slots of nodes that cannot get work now but may be back soon."""

    def changes(self) -> list[SetNodeStatus]:
        """The commands that make the log agree."""
        return [
            SetNodeStatus(
                name=name,
                incarnation=view.node.incarnation,
                status=view.status,
                reason=view.reason,
            )
            for name, view in self.views.items()
            if view.changed
        ]

    def gone(self, member: Member, *, may_move: bool = False) -> GoneNode | None:
        """Why the node of ``member`` cannot hold it any more; None if it can.

        With ``may_move`` a node that shuts down holds it until the planned change is made.
        """
        view = self.views.get(member.node)
        if view is None:
            return GoneNode(FailureKind.NODE_LOST, "is not registered")
        if not view.holds(member):
            said = f"restarted (incarnation {view.incarnation}, was {member.incarnation})"
            return GoneNode(FailureKind.NODE_RESTARTED, said)
        if view.status is NodeStatus.LOST:
            return GoneNode(FailureKind.NODE_LOST, f"lost ({view.reason})")
        if view.status is NodeStatus.LEFT:
            return GoneNode(FailureKind.NODE_LEFT, f"left ({view.reason})")
        if view.leaving and not may_move:
            return GoneNode(FailureKind.NODE_LEFT, f"is draining ({view.reason})")
        return None

    def to_move(self, member: Member) -> bool:
        """Whether the rank is to go to another node as soon as there is room."""
        view = self.views.get(member.node)
        return view is not None and view.status is NodeStatus.DRAINING

    def suspects(self, members: tuple[Member, ...]) -> bool:
        """Whether the detector is still undecided about a node of ``members``."""
        views = [self.views[m.node] for m in members if m.node in self.views]
        return any(view.health is Health.SUSPECT for view in views)


def survey(state: ClusterState, facts: Facts, now: Now, settings: ReconcilerSettings) -> Survey:
    """Look at every registered node once."""
    views = {
        name: _view(node, facts.nodes.get(name), node_sighting_of(node, facts), now, settings)
        for name, node in sorted(state.nodes.items())
    }
    hosts = _hosts(state, views)
    hosting = {host.node for host in hosts if not host.closed}
    absent = {name: view for name, view in views.items() if name not in hosting}
    return Survey(
        views=views,
        hosts=hosts,
        unheard=tuple(n for n, v in absent.items() if _awaited(v, now, settings)),
        returning_slots=sum(v.node.slots for v in absent.values() if _may_return(v, now, settings)),
    )


def _hosts(state: ClusterState, views: dict[str, NodeView]) -> tuple[Host, ...]:
    used = state.slots_used()
    reports = {name: view.report for name, view in views.items() if view.report and _may_host(view)}
    oldest = min((report.applied_index for report in reports.values()), default=state.index)
    released = {
        job_id: job.change_index
        for job_id, job in state.jobs.items()
        if job.change_index > oldest and job.generation and job.terminal
    }
    places = assigned_places(state.jobs.values())
    hosts = []
    for name, report in reports.items():
        node = views[name].node
        unseen = possible_workers(report, released, state.jobs)
        taken = used.get(name, 0) + leftover_workers(report, state.jobs, places) + unseen
        hosts.append(
            Host(
                node=name,
                incarnation=node.incarnation,
                slots=node.slots,
                free=node.slots - taken,
                ready=report.ready,
                closed=views[name].status is NodeStatus.DRAINING,
            )
        )
    return tuple(hosts)


def _view(
    node: Node,
    seen: NodeFacts | None,
    sighting: NodeSighting,
    now: Now,
    settings: ReconcilerSettings,
) -> NodeView:
    report = seen.report if seen else None
    fresh = now.monotonic_s - sighting.since_s < settings.settle_s
    status, reason = _next_status(node, seen, fresh)
    heard = report.incarnation if report else 0
    return NodeView(
        node=node,
        status=status,
        reason=reason,
        health=seen.health if seen else Health.SUSPECT,
        sighting=sighting,
        incarnation=max(node.incarnation, heard),
        report=report if heard == node.incarnation else None,
        returned=report if heard > node.incarnation else None,
    )


def _next_status(node: Node, seen: NodeFacts | None, fresh: bool) -> tuple[NodeStatus, str]:
    kept = (node.status, node.reason)
    if seen is None or node.status is NodeStatus.LEFT:
        return kept
    own = seen.report if seen.report and seen.report.incarnation == node.incarnation else None
    if seen.health is Health.LOST:
        # What was heard of an earlier incarnation says nothing about one that registered just now.
        unjudged = fresh and own is None
        known = node.status is NodeStatus.LOST
        return kept if unjudged or known else (NodeStatus.LOST, seen.reason)
    if node.status is NodeStatus.LOST and seen.health is Health.ALIVE and own:
        stays = not node.drained and not own.draining
        return (NodeStatus.ALIVE if stays else NodeStatus.DRAINING), "heard again"
    if node.status is NodeStatus.ALIVE and own and own.draining:
        return NodeStatus.DRAINING, "it is shutting down"
    return kept


def _may_host(view: NodeView) -> bool:
    return (
        view.status in (NodeStatus.ALIVE, NodeStatus.DRAINING)
        and view.health is Health.ALIVE
        and view.report is not None
        and not view.report.draining
    )


def _awaited(view: NodeView, now: Now, settings: ReconcilerSettings) -> bool:
    if view.status is not NodeStatus.ALIVE or view.node.slots == 0 or view.report is not None:
        return False
    return now.monotonic_s - view.sighting.since_s < settings.settle_s


def _may_return(view: NodeView, now: Now, settings: ReconcilerSettings) -> bool:
    if view.status is NodeStatus.ALIVE:
        return True
    if view.status is not NodeStatus.LOST:
        return False
    seen_lost_s = now.monotonic_s - view.sighting.status_since_s
    lost_s = max(seen_lost_s, now.wall_s - view.node.changed_at)
    return view.changed or lost_s < settings.return_wait_s
