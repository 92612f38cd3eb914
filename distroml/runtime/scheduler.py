"""Who runs where: strict FIFO with priority, whole gangs only, spread over the nodes.

Pure; called by ``runtime.reconciler`` with one ``Request`` per job that waits for slots and one ``Host`` per node
that may get work. Jobs are taken in order of priority, then those recovering from a failure, then by submission.
The first one that does not fit stops the line: nothing behind it may take the slots it waits for, else a large job
would starve. A job larger than the cluster stands aside, since waiting for it would block everyone for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from msgspec import Struct
from msgspec.structs import replace

from distroml.model import ASSIGNED, Job, Member
from distroml.reports import NodeReport, WorkerFact, WorkerPhase


class Host(Struct, frozen=True, kw_only=True):
    """A node that may get work, and what is free on it."""

    node: str
    incarnation: int
    slots: int
    free: int
    ready: bool = True
    """False while its forkserver is not warm: a start there takes seconds."""


class Request(Struct, frozen=True, kw_only=True):
    """A job that waits for ``workers`` slots."""

    job_id: str
    workers: int
    priority: int
    submit_index: int
    recovering: bool = False
    held: str = ""
    """Why it may not start yet (backoff, old workers still ending); its slots are kept for it meanwhile."""


class Schedule(Struct, frozen=True, kw_only=True):
    """Members of each job that starts now, and why each of the others waits; both in queue order."""

    placements: dict[str, tuple[Member, ...]]
    waiting: dict[str, str]


def schedule(
    requests: Iterable[Request], hosts: Iterable[Host], *, returning_slots: int = 0
) -> Schedule:
    """Place whole gangs in queue order; ``hosts`` and ``requests`` may come in any order.

    ``returning_slots`` are slots of nodes lost a moment ago. Nothing is placed on them, but a job that fits
    only with them keeps its place in the line.
    """
    left = {host.node: host for host in hosts}
    total = sum(host.slots for host in left.values())
    placements: dict[str, tuple[Member, ...]] = {}
    waiting: dict[str, str] = {}
    head: str | None = None
    for request in sorted(requests, key=_queue_order):
        free = sum(max(0, host.free) for host in left.values())
        need = f"needs {_count(request.workers, 'slot')}, {free} free of {total}"
        members = None if head else place(request, left.values())
        if head:
            waiting[request.job_id] = f"{need}; ahead of it: {head}"
        elif members is not None:
            left = _without(left, members)
            if request.held:
                waiting[request.job_id] = request.held
            else:
                placements[request.job_id] = members
        elif request.workers > total + returning_slots:
            waiting[request.job_id] = f"{need}: more than the nodes that are alive offer"
        else:
            head = request.job_id
            waiting[request.job_id] = f"{need}; {request.held}" if request.held else need
    return Schedule(placements=placements, waiting=waiting)


def place(request: Request, hosts: Iterable[Host]) -> tuple[Member, ...] | None:
    """Members of one gang, or None if it does not fit.

    Nodes take one worker each in turn, those with most free slots first (then by name), so that counts differ
    by at most one unless a node is full. Ranks on a node are adjacent.
    """
    usable = sorted((h for h in hosts if h.free > 0), key=lambda h: (-h.free, h.node))
    if request.recovering:
        # Training stands still meanwhile: do not wait for a cold node if the warm ones suffice.
        warm = [host for host in usable if host.ready]
        usable = warm if sum(host.free for host in warm) >= request.workers else usable
    if sum(host.free for host in usable) < request.workers:
        return None
    counts = _deal(request.workers, usable)
    members: list[Member] = []
    for host, count in zip(usable, counts, strict=True):
        for local_rank in range(count):
            members.append(Member(len(members), local_rank, host.node, host.incarnation))
    return tuple(members)


def describe(members: Sequence[Member]) -> str:
    """Who runs where, such as ``4 workers on a(2), b(2)``."""
    counts: dict[str, int] = {}
    for member in members:
        counts[member.node] = counts.get(member.node, 0) + 1
    where = ", ".join(f"{node}({count})" for node, count in counts.items())
    return f"{_count(len(members), 'worker')} on {where}"


Place = tuple[str, str, str, int, int, int]
"""Job, run, node, its incarnation, generation and rank of one assigned worker, in that order."""


def assigned_places(jobs: Iterable[Job]) -> frozenset[Place]:
    """Where the ranks of current generations are."""
    return frozenset(
        (job.job_id, job.run_id, m.node, m.incarnation, job.generation.number, m.rank)
        for job in jobs
        if job.status in ASSIGNED and job.generation is not None
        for m in job.generation.members
    )


def leftover_workers(report: NodeReport, places: Set[Place]) -> int:
    """Processes alive on the node that are no rank of a current generation there.

    They hold their slots until they end; those of current generations are counted by the assignment
    (``ClusterState.slots_used``) whether their process exists or not.

    Args:
        places: as of ``assigned_places``; looked up once per worker, since a turn looks at all of them.
    """
    node, incarnation = report.node, report.incarnation
    return sum(
        is_alive(fact)
        and (fact.job_id, fact.run_id, node, incarnation, fact.generation, fact.rank) not in places
        for fact in report.workers
    )


def possible_workers(
    report: NodeReport, released: Mapping[str, int], jobs: Mapping[str, Job]
) -> int:
    """Processes that the node may have spawned since it reported, for jobs that have released their slots.

    ``released`` says at which log index each of them did. An agent that had not learned of it may have gone ahead
    with a start that it knew of, unseen by us.
    """
    listed = {(fact.run_id, fact.generation, fact.rank) for fact in report.workers}
    unaware = [jobs[job_id] for job_id, at in released.items() if report.applied_index < at]
    return sum(
        1
        for job in unaware
        if job.generation is not None
        for member in job.generation.members
        if (member.node, member.incarnation) == (report.node, report.incarnation)
        and (job.run_id, job.generation.number, member.rank) not in listed
    )


def is_alive(fact: WorkerFact) -> bool:
    """Whether a worker's process still exists, or is about to, as its agent saw it."""
    if fact.exit_code is not None or fact.phase is WorkerPhase.EXITED:
        return False
    never_spawned = fact.pid is None and fact.phase is WorkerPhase.FAILED
    return not never_spawned


def _queue_order(request: Request) -> tuple[int, bool, int, str]:
    return (-request.priority, not request.recovering, request.submit_index, request.job_id)


def _deal(workers: int, hosts: Sequence[Host]) -> list[int]:
    """How many workers each host takes when they are dealt out in turns."""
    counts = [0] * len(hosts)
    while workers > 0:
        for index, host in enumerate(hosts):
            if workers > 0 and counts[index] < host.free:
                counts[index] += 1
                workers -= 1
    return counts


def _without(hosts: Mapping[str, Host], members: Iterable[Member]) -> dict[str, Host]:
    left = dict(hosts)
    for member in members:
        host = left[member.node]
        left[member.node] = replace(host, free=host.free - 1)
    return left


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
