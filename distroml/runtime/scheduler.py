"""Who runs where: strict FIFO with priority, whole gangs, spread over the nodes; who has a slot keeps it.

Pure; called by ``runtime.reconciler`` with one ``Request`` per job that waits for slots and one ``Host`` per node
that may get work. Jobs are taken in order of priority, then those recovering from a failure, then by submission.
The first one that does not fit stops the line: nothing behind it may take the slots it waits for, else a large job
would starve. A job larger than the cluster stands aside, since waiting for it would block everyone for nothing.

An elastic job (``fewest`` below ``workers``) fits as soon as its fewest ranks do, and takes what is free. Survivors
of a failed generation keep their nodes, and their ranks as far as there are so many: they have the state. Their
slots, like those of spares, count as free: the order of the queue protects them, and agents make room where it
gave a slot to somebody else.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence, Set

from msgspec import Struct
from msgspec.structs import replace

from distroml.model import ASSIGNED, Job, JobStatus, Member
from distroml.reports import NodeReport, WorkerFact, WorkerPhase


class Host(Struct, frozen=True, kw_only=True):
    """A node that may get work, and what is free on it."""

    node: str
    incarnation: int
    slots: int
    free: int
    ready: bool = True
    """False while its forkserver is not warm: a start there takes seconds."""
    closed: bool = False
    """True while it is drained: who is there may stay, nobody else may come."""


class Request(Struct, frozen=True, kw_only=True):
    """A job that waits for ``workers`` slots, or ``fewest`` at least."""

    job_id: str
    workers: int
    priority: int
    submit_index: int
    fewest: int = 0
    """0: as many as ``workers``."""
    spares: int = 0
    recovering: bool = False
    survivors: tuple[Member, ...] = ()
    """Processes that it has, with the ranks they had."""
    prepared: tuple[str, ...] = ()
    """Nodes of its spares, once for each."""
    held: str = ""
    """Why it may not start yet (backoff); its slots are kept for it meanwhile."""

    @property
    def least(self) -> int:
        return self.fewest or self.workers


class Placement(Struct, frozen=True):
    """Where the ranks of a generation go, and its spares."""

    members: tuple[Member, ...]
    joining: tuple[int, ...] = ()
    """Ranks of newcomers."""
    spares: tuple[Member, ...] = ()


class Schedule(Struct, frozen=True, kw_only=True):
    """Where each job goes that starts now, and why each of the others waits; both in queue order."""

    placements: dict[str, Placement]
    waiting: dict[str, str]
    left: dict[str, Host] = {}
    """What is free after that, for running jobs to grow into."""
    blocked: bool = False
    """True where a job waits for slots: nobody grows into them."""


def schedule(
    requests: Iterable[Request], hosts: Iterable[Host], *, returning_slots: int = 0
) -> Schedule:
    """Place gangs in queue order; ``hosts`` and ``requests`` may come in any order.

    ``returning_slots`` are slots of nodes lost a moment ago. Nothing is placed on them, but a job that fits
    only with them keeps its place in the line.
    """
    left = {host.node: host for host in hosts}
    total = sum(host.slots for host in left.values() if not host.closed)
    starting: list[tuple[Request, Placement]] = []
    waiting: dict[str, str] = {}
    head: str | None = None
    for request in sorted(requests, key=_queue_order):
        free = sum(max(0, host.free) for host in left.values() if not host.closed)
        need = f"needs {_count(request.least, 'slot')}, {free} free of {total}"
        placed = None if head else place(request, left.values())
        if head:
            waiting[request.job_id] = f"{need}; ahead of it: {head}"
        elif placed is not None:
            left = without(left, placed.members)
            if request.held:
                waiting[request.job_id] = request.held
            else:
                starting.append((request, placed))
        elif request.least > total + returning_slots:
            waiting[request.job_id] = f"{need}: more than the nodes that are alive offer"
        else:
            head = request.job_id
            waiting[request.job_id] = f"{need}; {request.held}" if request.held else need
    placements: dict[str, Placement] = {}
    for request, placed in starting:
        spares = place_spares(request.spares, len(placed.members), left)
        left = without(left, spares)
        placements[request.job_id] = replace(placed, spares=spares)
    return Schedule(placements=placements, waiting=waiting, left=left, blocked=head is not None)


def place(request: Request, hosts: Iterable[Host]) -> Placement | None:
    """Where one gang goes, or None if it does not fit.

    Survivors stay. Newcomers go where the job has spares, then to the node with fewest of its ranks, then to the
    one with most free slots (then by name), so that counts differ by at most one unless a node is full.
    Newcomers' ranks on a node are adjacent.
    """
    usable = {host.node: host for host in hosts if host.free > 0}
    kept = _kept(request, usable)
    open_hosts = [host for host in usable.values() if not host.closed]
    if request.recovering:
        # Training stands still meanwhile: do not wait for a cold node if the warm ones suffice.
        warm = [host for host in open_hosts if host.ready]
        needed = request.workers - len(kept)
        open_hosts = warm if _free(warm, kept) >= needed else open_hosts
    size = min(request.workers, len(kept) + _free(open_hosts, kept))
    if size < request.least:
        return None
    kept = kept[:size]
    counts = _deal(size, open_hosts, kept, request.prepared)
    return _numbered(kept, counts, usable, size)


def resize(
    kept: Sequence[Member], size: int, hosts: Iterable[Host], prepared: Iterable[str] = ()
) -> Placement:
    """``size`` ranks: those of ``kept``, whose slots are not among what is free, and newcomers beside them.

    There must be as many slots.
    """
    own = [one.node for one in kept]
    with_own = {host.node: replace(host, free=host.free + own.count(host.node)) for host in hosts}
    open_hosts = [host for host in with_own.values() if not host.closed]
    return _numbered(kept, _deal(size, open_hosts, kept, prepared), with_own, size)


def place_spares(wanted: int, first_rank: int, hosts: Mapping[str, Host]) -> tuple[Member, ...]:
    """Up to ``wanted`` slots for spares, spread like ranks; their numbers follow those of the ranks."""
    open_hosts = [host for host in hosts.values() if not host.closed and host.free > 0]
    counts = _deal(min(wanted, _free(open_hosts, ())), open_hosts, (), ())
    spares: list[Member] = []
    for node, count in counts.items():
        for local_rank in range(count):
            rank = first_rank + len(spares)
            spares.append(Member(rank, local_rank, node, hosts[node].incarnation))
    return tuple(spares)


def without(hosts: Mapping[str, Host], members: Iterable[Member]) -> dict[str, Host]:
    """The hosts once these have their slots."""
    left = dict(hosts)
    for member in members:
        host = left[member.node]
        left[member.node] = replace(host, free=host.free - 1)
    return left


def locally_ranked(members: Iterable[Member]) -> tuple[Member, ...]:
    """The members by rank, with their local ranks counted anew."""
    local: dict[str, int] = {}
    ranked = []
    for member in sorted(members, key=lambda one: one.rank):
        local_rank = local.get(member.node, 0)
        local[member.node] = local_rank + 1
        ranked.append(Member(member.rank, local_rank, member.node, member.incarnation))
    return tuple(ranked)


def describe(members: Sequence[Member]) -> str:
    """Who runs where, such as ``4 workers on a(2), b(2)``."""
    counts: dict[str, int] = {}
    for member in members:
        counts[member.node] = counts.get(member.node, 0) + 1
    where = ", ".join(f"{node}({count})" for node, count in counts.items())
    return f"{_count(len(members), 'worker')} on {where}"


def assigned_places(jobs: Iterable[Job]) -> dict[str, frozenset[tuple[str, int]]]:
    """Node and rank of each member of current generations, by job; looked up once per worker in a turn."""
    return {
        job.job_id: frozenset(
            (member.node, member.rank)
            for generation in (job.generation, job.outgoing)
            if generation is not None
            for member in generation.members
        )
        for job in jobs
        if job.status in ASSIGNED and job.generation is not None
    }


def leftover_workers(
    report: NodeReport, jobs: Mapping[str, Job], places: Mapping[str, Set[tuple[str, int]]]
) -> int:
    """Processes alive on the node that hold their slots until they end, whatever the log says.

    Ranks of current generations are counted by the assignment (``ClusterState.slots_used``) whether their process
    exists or not; survivors and spares make room where it is needed.

    Args:
        places: as of ``assigned_places``.
    """
    return sum(
        1
        for fact in report.workers
        if is_alive(fact) and not _belongs(fact, report, jobs.get(fact.job_id), places)
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


def may_go_on(fact: WorkerFact, node: str, job: Job) -> bool:
    """Whether a process on ``node`` can be a rank of the job's next generation: it lives, and no failure was its own."""
    sound = is_alive(fact) and fact.failure is None and fact.outcome is None
    return sound and fact.run_id == job.run_id and not job.is_to_blame(node, fact.worker)


def _belongs(
    fact: WorkerFact,
    report: NodeReport,
    job: Job | None,
    places: Mapping[str, Set[tuple[str, int]]],
) -> bool:
    """Whether a process is counted already, or makes room by itself."""
    if job is None or job.run_id != fact.run_id or job.generation is None:
        return False
    if fact.generation == 0 and not job.terminal:
        return True
    if job.status is JobStatus.RECOVERING:
        return may_go_on(fact, report.node, job)
    if job.status not in ASSIGNED:
        return False
    if (report.node, fact.rank) in places.get(job.job_id, ()):
        numbers = {one.number for one in (job.generation, job.outgoing) if one is not None}
        # A survivor that its agent has yet to tell of its next generation is that rank already.
        return fact.generation in numbers or may_go_on(fact, report.node, job)
    return False


def _queue_order(request: Request) -> tuple[int, bool, int, str]:
    return (-request.priority, not request.recovering, request.submit_index, request.job_id)


def _kept(request: Request, usable: Mapping[str, Host]) -> tuple[Member, ...]:
    """The survivors that have room where they are, by former rank."""
    taken: dict[str, int] = {}
    kept = []
    for one in sorted(request.survivors, key=lambda one: (one.rank, one.node)):
        host = usable.get(one.node)
        if host is not None and taken.get(one.node, 0) < host.free:
            taken[one.node] = taken.get(one.node, 0) + 1
            kept.append(one)
    return tuple(kept[: request.workers])


def _free(hosts: Iterable[Host], kept: Iterable[Member]) -> int:
    """Slots on ``hosts`` beside those of ``kept``."""
    nodes = [one.node for one in kept]
    return sum(host.free - nodes.count(host.node) for host in hosts)


def _deal(
    size: int, hosts: Sequence[Host], kept: Iterable[Member], prepared: Iterable[str]
) -> dict[str, int]:
    """How many newcomers each host takes until there are ``size`` ranks; hosts in the order they were dealt to."""
    ranks: dict[str, int] = {}
    for one in kept:
        ranks[one.node] = ranks.get(one.node, 0) + 1
    missing = size - sum(ranks.values())
    free = {host.node: host.free - ranks.get(host.node, 0) for host in hosts}
    dealt: dict[str, int] = {}

    def deal(node: str) -> None:
        free[node] -= 1
        dealt[node] = dealt.get(node, 0) + 1

    for node in prepared:
        if missing > 0 and free.get(node, 0) > 0:
            deal(node)
            missing -= 1
    line = [
        (ranks.get(host.node, 0) + dealt.get(host.node, 0), -host.free, host.node)
        for host in hosts
        if free[host.node] > 0
    ]
    heapq.heapify(line)
    for _ in range(missing):
        count, order, node = heapq.heappop(line)
        deal(node)
        if free[node] > 0:
            heapq.heappush(line, (count + 1, order, node))
    return dealt


def _numbered(
    kept: Sequence[Member], counts: Mapping[str, int], hosts: Mapping[str, Host], size: int
) -> Placement:
    """Ranks 0 to ``size`` - 1: survivors keep theirs where it is among them, the others fill the gaps."""
    placed: dict[int, str] = {}
    renumbered: list[str] = []
    for one in kept:
        if one.rank < size and one.rank not in placed:
            placed[one.rank] = one.node
        else:
            renumbered.append(one.node)
    newcomers = [node for node, count in counts.items() for _ in range(count)]
    gaps = [rank for rank in range(size) if rank not in placed]
    placed |= dict(zip(gaps, [*renumbered, *newcomers], strict=True))
    incarnations = {one.node: one.incarnation for one in kept}
    incarnations |= {node: host.incarnation for node, host in hosts.items()}
    members = locally_ranked(
        Member(rank, 0, node, incarnations[node]) for rank, node in placed.items()
    )
    return Placement(members, joining=tuple(gaps[len(renumbered) :]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
