"""What the reconciler looks at besides the replicated state: ``Facts``, one consistent view per turn.

The coordinator calls ``look`` once per turn with the verdicts and newest reports of all nodes; the result carries
over what only time can tell (since when a job stands where it stands, since when a failure shows). It is rebuilt
from nothing by a new leader, whose clocks then start again: every wait here is short and bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from distroml.consensus.state import ClusterState
from distroml.model import Generation, Job, JobStatus, Member, Node, NodeStatus
from distroml.reports import Former, NodeReport, WorkerFact, WorkerPhase
from distroml.runtime.failure_detector import Health
from distroml.runtime.hang import HangSettings


class Now(Struct, frozen=True, gc=False):
    """The present, taken once per turn."""

    wall_s: float
    """Unix seconds; goes into what people read."""
    monotonic_s: float
    """The leader's monotonic clock; measures waits."""


class ReconcilerSettings(Struct, frozen=True, gc=False, kw_only=True):
    """Every wait and limit of the decisions; seconds on the leader's monotonic clock unless said otherwise."""

    start_deadline_s: float = 120.0
    """From the forming of a generation until all its ranks train."""
    stop_deadline_s: float = 300.0
    """From a stop request until all ranks have finished."""
    echo_wait_s: float = 0.5
    """How long to wait for the root cause when only echoes of a failure are seen."""
    suspect_echo_wait_s: float = 3.5
    """The same while a node of the generation is SUSPECT; longer than the detector takes to decide."""
    gone_worker_wait_s: float = 2.0
    """How long an agent may leave out a worker that trained before it counts as gone."""
    unspawned_wait_s: float = 20.0
    """The same for a worker that was never seen."""
    commit_wait_s: float = 5.0
    """How long a recovery without survivors waits for the commit of a checkpoint that was whole before."""
    checkpoint_wait_s: float = 600.0
    """How long a run waits for nodes that may have its checkpoint before it goes on from an older one (wall clock)."""
    final_checkpoint_wait_s: float = 60.0
    """How long a finished run waits for its final checkpoint to be whole."""
    final_commit_wait_s: float = 180.0
    """The same for the commit of one that is; longer than the committer's patience."""
    final_return_wait_s: float = 10.0
    """How long it waits for a lost node that alone has a shard of it: an agent that crashed is back by then."""
    checkpoint_deadline_s: float = 600.0
    """From the first durable shard of a checkpoint until it is whole."""
    settle_s: float = 3.0
    """How long placement waits for the first report of each node, after an election or a registration."""
    return_wait_s: float = 60.0
    """How long a lost node's slots keep a job's place at the head of the queue; counted from the loss (wall clock), but
    never longer than this from when the leader saw it."""
    backoff_base_s: float = 0.1
    """Pause before the first restart of a run that got no further; doubles with each that follows, also without."""
    backoff_limit_s: float = 30.0
    grow_pause_s: float = 3.0
    """How long a generation is left alone before it grows (wall clock)."""
    agent_grace_s: float = 10.0
    """How long a lost node may hold ranks that train as the others show: its agent may come back to them."""
    regrow_pause_s: float = 30.0
    """The same where a planned change failed or took ranks away."""
    hang: HangSettings = HangSettings()


class NodeFacts(Struct, frozen=True, gc=False, kw_only=True):
    """One node as this leader sees it."""

    health: Health
    reason: str
    incarnation: int
    """The one last heard; the registered one if nothing was heard."""
    report: NodeReport | None = None
    """The newest one, kept after the node was lost."""
    connected: bool = True
    """False once its connection closed: its process ended, or the network in between."""
    heard_at: float | None = None
    """When its last report came, in Unix seconds of this leader's clock."""

    def holds(self, member: Member) -> bool:
        """Whether its report speaks of a worker that was given to ``member.incarnation`` of the node."""
        if self.report is None:
            return False
        now = self.report.incarnation
        return (self.report.workers_since or now) <= member.incarnation <= now


class NodeSighting(Struct, frozen=True, gc=False, kw_only=True):
    """Since when (monotonic seconds) this leader sees a registered node as it is.

    What the log says of that is from the clock of whoever proposed it, which may be an hour off.
    """

    incarnation: int
    status: NodeStatus
    since_s: float
    """First sight of this incarnation."""
    status_since_s: float
    """First sight of this status in this incarnation."""


class Sighting(Struct, frozen=True, gc=False, kw_only=True):
    """Since when (monotonic seconds) this leader sees a job as it is."""

    status: JobStatus
    generation: int
    since_s: float
    """First sight of this status in this generation."""
    generation_since_s: float
    index: int
    """Log index of the job's last change when the generation was first seen."""
    failing_since_s: float | None = None
    """First sight of a failed worker of this generation."""
    finished_since_s: float | None = None
    """First sight of outcomes of all its ranks."""
    steps: int = 0
    """Sum of the steps of all ranks; grows while they train."""
    evaluating: int = 0
    """Ranks that evaluate."""
    still_since_s: float = 0.0
    """First sight of ``steps`` and ``evaluating`` as they are."""
    shards_since_s: dict[int, float] = {}
    """First sight of a durable shard, by checkpoint step."""
    abandoned_since_s: dict[int, float] = {}
    """First sight that a rank, or the writer of manifests, gave up, by checkpoint step."""


CheckpointKey = tuple[str, int, int]
"""Job, generation, step."""


class Facts(Struct, frozen=True, gc=False, kw_only=True):
    """All that was observed, by this leader, at one moment."""

    nodes: dict[str, NodeFacts]
    node_sightings: dict[str, NodeSighting] = {}
    sightings: dict[str, Sighting] = {}
    looked_s: float = 0.0
    """This look, monotonic."""
    writing: frozenset[CheckpointKey] = frozenset()
    """Manifests that the coordinator is writing or has written and not yet seen committed."""
    write_failures: dict[CheckpointKey, str] = {}
    """Manifests that it gave up on, with the reason."""
    ranks: dict[tuple[str, str, int], dict[int, WorkerFact]] = {}
    """What ``members_facts`` found, by job, run and generation: a turn asks more than once."""


def look(
    previous: Facts | None,
    state: ClusterState,
    nodes: Mapping[str, NodeFacts],
    now: Now,
    *,
    writing: frozenset[CheckpointKey] = frozenset(),
    write_failures: Mapping[CheckpointKey, str] | None = None,
) -> Facts:
    """The facts of this turn. ``previous`` is the last turn's value, None in a leader's first turn."""
    seen = previous.sightings if previous else {}
    seen_nodes = previous.node_sightings if previous else {}
    facts = Facts(
        nodes=dict(nodes),
        node_sightings={
            name: _node_sighting(seen_nodes.get(name), node, now.monotonic_s)
            for name, node in state.nodes.items()
        },
        looked_s=now.monotonic_s,
        writing=writing,
        write_failures=dict(write_failures or {}),
    )
    for job in state.active_jobs():
        facts.sightings[job.job_id] = _sighting(seen.get(job.job_id), job, facts, now.monotonic_s)
    return facts


def sighting_of(job: Job, facts: Facts) -> Sighting:
    """Since when the job is as it is; right also when ``job`` changed after the look."""
    seen = facts.sightings.get(job.job_id)
    if seen and (seen.status, seen.generation) == (job.status, job.generation_number):
        return seen
    return _sighting(seen, job, facts, facts.looked_s)


def node_sighting_of(node: Node, facts: Facts) -> NodeSighting:
    """The same of a node."""
    return _node_sighting(facts.node_sightings.get(node.name), node, facts.looked_s)


def members_facts(job: Job, facts: Facts) -> dict[int, WorkerFact]:
    """What the agents know of the ranks of the job's newest generation, by rank; stale reports are left out."""
    return ranks_of(job, job.generation, facts) if job.generation else {}


def ranks_of(job: Job, generation: Generation, facts: Facts) -> dict[int, WorkerFact]:
    """The same of any generation of the job."""
    wanted = (job.job_id, job.run_id, generation.number)
    known = facts.ranks.get(wanted)
    if known is None:
        known = facts.ranks[wanted] = _ranks_of(generation, wanted, facts)
    return known


def _ranks_of(
    generation: Generation, wanted: tuple[str, str, int], facts: Facts
) -> dict[int, WorkerFact]:
    places = {member.rank: member for member in generation.members}
    found: dict[int, WorkerFact] = {}
    for name in {member.node for member in generation.members}:
        node = facts.nodes.get(name)
        for fact in node.report.workers if node and node.report else ():
            if (fact.job_id, fact.run_id, fact.generation) != wanted:
                continue
            place = places.get(fact.rank)
            if node and place and place.node == name and node.holds(place):
                found[fact.rank] = fact
    return dict(sorted(found.items()))


def seats(job: Job, generation: Generation, facts: Facts) -> dict[int, WorkerFact]:
    """By rank of ``generation``: the process that has it, or will once it has left the outgoing generation for it."""
    seen = dict(ranks_of(job, generation, facts))
    if job.outgoing is None or generation.number == job.outgoing.number:
        return seen
    before = ranks_of(job, job.outgoing, facts)
    for rank, former in _former_ranks(job.outgoing, generation).items():
        if rank not in seen and former in before:
            seen[rank] = before[former]
    return seen


def _former_ranks(outgoing: Generation, generation: Generation) -> dict[int, int]:
    """By rank of a planned generation that is not new there: the rank before, as the agents renumber them."""
    former: dict[int, int] = {}
    places = {member.rank: member.node for member in outgoing.members}
    moving = {rank: node for rank, node in places.items() if rank >= len(generation.members)}
    for member in sorted(generation.members, key=lambda member: member.rank):
        if member.rank in generation.joining:
            continue
        rank: int | None = member.rank
        if places.get(member.rank) != member.node:
            rank = min((one for one, node in moving.items() if node == member.node), default=None)
        if rank is not None:
            former[member.rank] = rank
            moving.pop(rank, None)
    return former


def workers_of(job: Job, facts: Facts) -> Iterator[tuple[str, WorkerFact]]:
    """Facts of all workers of a job, of whichever generation, with the node they are on."""
    for name in sorted(facts.nodes):
        report = facts.nodes[name].report
        for fact in report.workers if report else ():
            if fact.job_id == job.job_id:
                yield name, fact


def has_failed(fact: WorkerFact) -> bool:
    """Whether a worker ended, or is ending, without having done its work."""
    if fact.outcome is not None:
        return False
    ended = fact.exit_code is not None or fact.phase in (WorkerPhase.FAILED, WorkerPhase.EXITED)
    return ended or fact.failure is not None


def is_out(fact: WorkerFact) -> bool:
    """Whether a worker takes no part in its generation any more, without having done its work."""
    return has_failed(fact) or fact.phase is WorkerPhase.PARKED


def _node_sighting(before: NodeSighting | None, node: Node, now_s: float) -> NodeSighting:
    if before is None or before.incarnation != node.incarnation:
        return NodeSighting(
            incarnation=node.incarnation, status=node.status, since_s=now_s, status_since_s=now_s
        )
    if before.status is not node.status:
        return replace(before, status=node.status, status_since_s=now_s)
    return before


def _sighting(before: Sighting | None, job: Job, facts: Facts, now_s: float) -> Sighting:
    if before is None or before.generation != job.generation_number:
        before = Sighting(
            status=job.status,
            generation=job.generation_number,
            since_s=now_s,
            generation_since_s=now_s,
            index=job.change_index,
            still_since_s=now_s,
        )
    same = before.status is job.status
    generations = [one for one in (job.generation, job.outgoing) if one is not None]
    by_generation = [ranks_of(job, one, facts) for one in generations]
    seen = [fact for ranks in by_generation for fact in ranks.values()]
    failing = any(is_out(fact) for fact in seen)
    finished = any(
        len(ranks) == len(one.members) and all(fact.outcome for fact in ranks.values())
        for one, ranks in zip(generations, by_generation, strict=True)
    )
    numbers = {one.number for one in generations}
    left = [one.former for one in seen if one.former and one.former.generation in numbers]
    saved: list[WorkerFact | Former] = [*seen, *left]
    durable = {shard.step for one in saved for shard in one.shards}
    abandoned = {step for one in saved for step, _ in one.abandoned}
    steps, evaluating = sum(fact.step for fact in seen), sum(fact.evaluating for fact in seen)
    still = same and (steps, evaluating) == (before.steps, before.evaluating)
    abandoned |= {
        step
        for job_id, number, step in facts.write_failures
        if job_id == job.job_id and number in numbers
    }
    return replace(
        before,
        status=job.status,
        since_s=before.since_s if same else now_s,
        failing_since_s=_first(before.failing_since_s, failing, now_s),
        steps=steps,
        evaluating=evaluating,
        still_since_s=before.still_since_s if still else now_s,
        finished_since_s=_first(before.finished_since_s, finished, now_s),
        shards_since_s=_firsts(before.shards_since_s, durable, now_s),
        abandoned_since_s=_firsts(before.abandoned_since_s, abandoned, now_s),
    )


def _first(before: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if before is None else before


def _firsts(before: Mapping[int, float], steps: set[int], now_s: float) -> dict[int, float]:
    return {step: before.get(step, now_s) for step in sorted(steps)}
