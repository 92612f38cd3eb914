"""What the API shows of the cluster: nodes, slots, workers, the leader, one node's health. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from distroml.consensus.state import ClusterState
from distroml.http.services import ObservedNode, RaftView
from distroml.http.views import Timestamp, timestamp
from distroml.model import Node, NodeStatus
from distroml.reports import StepTiming


class NodeView(Struct, frozen=True, kw_only=True):
    """One node: what the cluster agreed, and what the answering node last heard of it."""

    name: str
    status: NodeStatus
    reason: str
    http: Annotated[str, Meta(description="base URL of its API")]
    incarnation: Annotated[int, Meta(description="restart counter")]
    slots: int
    slots_used: int
    role: Annotated[str, Meta(description="voter, or learner: it follows the log without a vote")]
    leader: bool
    self: Annotated[bool, Meta(description="true for the node that answers")]
    connected: bool
    heartbeat_age_s: float | None
    ready: bool
    draining: bool
    applied_index: int | None
    memory_bytes: int | None
    cpu_percent: float | None
    registered_at: Timestamp
    changed_at: Timestamp


class NodeList(Struct, frozen=True):
    nodes: list[NodeView]


class ClusterWorker(Struct, frozen=True, kw_only=True):
    """One worker process, as its agent reports it."""

    job_id: str
    job_name: str | None
    run_id: str
    generation: int
    current: Annotated[bool, Meta(description="false: of a generation that is over, or a spare")]
    rank: int
    worker: Annotated[int, Meta(description="names the process on its node")]
    node: str
    pid: int | None
    phase: str
    step: int
    epoch: int
    started_at: Timestamp | None
    timing: Annotated[
        StepTiming | None, Meta(description="where its time goes; null until it has trained")
    ]


class WorkerList(Struct, frozen=True):
    workers: list[ClusterWorker]


class Slots(Struct, frozen=True, kw_only=True):
    """Places for workers on nodes that are alive."""

    total: int
    used: int
    free: int


class NodeResources(Struct, frozen=True, kw_only=True):
    name: str
    status: NodeStatus
    slots: Slots
    memory_bytes: int | None
    cpu_percent: float | None


class ResourcesView(Struct, frozen=True, kw_only=True):
    """Slots of the cluster and of each node, and jobs by status."""

    slots: Slots
    nodes: list[NodeResources]
    jobs: dict[str, int]
    workers: Annotated[int, Meta(description="worker processes reported")]


class LeaderView(Struct, frozen=True, kw_only=True):
    """Who leads, as the answering node knows it."""

    leader: Annotated[str | None, Meta(description="null while an election runs")]
    term: int
    url: str | None
    self: str
    is_self: bool
    commit_index: int
    applied_index: int


class DigestView(Struct, frozen=True, kw_only=True):
    """The answering node's copy of the replicated state in short; equal at the same index on every node."""

    self: str
    index: Annotated[int, Meta(description="log index up to which it is applied")]
    sha256: str


class HealthView(Struct, frozen=True, kw_only=True):
    """The answering node, in detail; a 200 says only that its process serves."""

    status: Annotated[str, Meta(description="ok, or degraded with a reason")]
    reason: str
    ready: bool
    node: str
    version: str
    leader: str | None
    role: str
    term: int
    commit_index: int
    applied_index: int
    details: dict[str, Any]


class ReadyView(Struct, frozen=True):
    ready: bool
    node: str
    leader: str | None
    applied_index: int


def node_views(
    state: ClusterState, observed: Mapping[str, ObservedNode], raft: RaftView, self_name: str
) -> NodeList:
    """All registered nodes by name."""
    used = state.slots_used()
    views = []
    for name, node in sorted(state.nodes.items()):
        seen = _current(node, observed)
        report = seen.report if seen else None
        views.append(
            NodeView(
                name=name,
                status=node.status,
                reason=node.reason,
                http=node.http,
                incarnation=node.incarnation,
                slots=node.slots,
                slots_used=used.get(name, 0),
                role="voter" if name in raft.voters else "learner",
                leader=name == raft.leader,
                self=name == self_name,
                connected=seen.connected if seen else False,
                heartbeat_age_s=round(seen.age_s, 3) if seen else None,
                ready=report.ready if report else False,
                draining=report.draining if report else node.status is NodeStatus.DRAINING,
                applied_index=report.applied_index if report else None,
                memory_bytes=report.memory_bytes if report else None,
                cpu_percent=report.cpu_percent if report else None,
                registered_at=timestamp(node.registered_at),
                changed_at=timestamp(node.changed_at),
            )
        )
    return NodeList(views)


def worker_list(state: ClusterState, observed: Mapping[str, ObservedNode]) -> WorkerList:
    """Every worker process that agents report, by job, generation and rank."""
    workers = []
    for name, node in observed.items():
        for fact in node.report.workers:
            job = state.jobs.get(fact.job_id)
            workers.append(
                ClusterWorker(
                    job_id=fact.job_id,
                    job_name=job.name if job else None,
                    run_id=fact.run_id,
                    generation=fact.generation,
                    current=job is not None and fact.generation in job.generation_numbers,
                    rank=fact.rank,
                    worker=fact.worker,
                    node=name,
                    pid=fact.pid,
                    phase=fact.phase.value,
                    step=fact.step,
                    epoch=fact.epoch,
                    started_at=timestamp(fact.started_at) if fact.started_at else None,
                    timing=fact.timing,
                )
            )
    workers.sort(key=lambda w: (w.job_id, w.generation, w.rank, w.node, w.worker))
    return WorkerList(workers)


def resources_view(state: ClusterState, observed: Mapping[str, ObservedNode]) -> ResourcesView:
    """Slots in total and by node."""
    used = state.slots_used()
    nodes = []
    total = taken = 0
    for name, node in sorted(state.nodes.items()):
        seen = _current(node, observed)
        offered = node.slots if node.status is NodeStatus.ALIVE else 0
        busy = used.get(name, 0)
        total += offered
        taken += min(busy, offered)
        nodes.append(
            NodeResources(
                name=name,
                status=node.status,
                slots=Slots(total=offered, used=busy, free=max(0, offered - busy)),
                memory_bytes=seen.report.memory_bytes if seen else None,
                cpu_percent=seen.report.cpu_percent if seen else None,
            )
        )
    return ResourcesView(
        slots=Slots(total=total, used=taken, free=total - taken),
        nodes=nodes,
        jobs={status.value: count for status, count in state.counts().items()},
        workers=sum(len(node.report.workers) for node in observed.values()),
    )


def leader_view(state: ClusterState, raft: RaftView, self_name: str) -> LeaderView:
    """The leader with the address of its API."""
    node = state.nodes.get(raft.leader) if raft.leader else None
    return LeaderView(
        leader=raft.leader,
        term=raft.term,
        url=node.http if node else None,
        self=self_name,
        is_self=raft.leader == self_name,
        commit_index=raft.commit_index,
        applied_index=raft.applied_index,
    )


def _current(node: Node, observed: Mapping[str, ObservedNode]) -> ObservedNode | None:
    """The node's last report, unless it is of an earlier incarnation."""
    seen = observed.get(node.name)
    return seen if seen and seen.report.incarnation >= node.incarnation else None
