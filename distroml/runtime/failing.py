"""The end of a generation: who is to blame, and whether the run gets another one.

Pure; used by ``runtime.reconciler``. ``evidence`` finds out what happened; here is decided what follows from it:
recover after a pause, take a corrupt checkpoint out of use, or give up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from distroml.commands import FailGeneration, MarkCheckpointCorrupt
from distroml.model import (
    BLAMELESS,
    Cause,
    Checkpoint,
    CheckpointStatus,
    Culprit,
    FailureKind,
    Job,
    JobStatus,
    Member,
    NodeStatus,
)
from distroml.reports import CHECKPOINT_ERRORS, WorkerFact, WorkerOutcome, WorkerPhase
from distroml.runtime.checkpoint_progress import Progress
from distroml.runtime.completion import finish
from distroml.runtime.decisions import Decision, Running, Turn, at_work
from distroml.runtime.evidence import (
    MAX_CULPRITS,
    MAX_ERROR_BYTES,
    MAX_REASON_BYTES,
    Blame,
    Evidence,
    all_ranks,
    blame,
    clip,
    gather,
    ranks_text,
)
from distroml.runtime.facts import seats, sighting_of
from distroml.runtime.failure_detector import Health
from distroml.runtime.hang import find_hang

_BEYOND_START = frozenset({WorkerPhase.TRAINING, WorkerPhase.FINISHING, WorkerPhase.FINISHED})
_ON_THE_WAY = (WorkerPhase.CONNECTING, WorkerPhase.RESTORING)


def evidence_of(turn: Turn, run: Running, *, may_move: bool = False) -> list[Evidence]:
    """All that speaks against the ranks of the generation, and of the one that it is to relieve."""
    return gather(
        run.job,
        run.generation,
        turn.facts,
        turn.survey,
        turn.settings,
        wall_s=turn.now.wall_s,
        may_move=may_move,
    )


def verdict_on(turn: Turn, run: Running, evidence: list[Evidence]) -> Blame | None:
    """Who is to blame; None while only echoes are seen and the root cause may still show up."""
    outgoing = run.job.outgoing
    verdict = blame(evidence, run.generation, turn.now.wall_s, outgoing)
    failing_s = sighting_of(run.job, turn.facts).failing_since_s
    if verdict.echoes_only and failing_s is not None:
        suspect = turn.survey.suspects(run.generation.members)
        # Ranks that change over stand between two generations for a moment, which is no failure.
        longer = suspect or outgoing is not None
        wait_s = turn.settings.suspect_echo_wait_s if longer else turn.settings.echo_wait_s
        if turn.now.monotonic_s - failing_s < wait_s:
            return None
    return verdict


def fail_when_known(turn: Turn, run: Running, evidence: list[Evidence]) -> list[Decision]:
    """End the generation unless the root cause may still show up."""
    verdict = verdict_on(turn, run, evidence)
    return fail_generation(turn, run, verdict, evidence) if verdict is not None else []


def fail_generation(
    turn: Turn, run: Running, verdict: Blame, evidence: Iterable[Evidence]
) -> list[Decision]:
    """End the generation: the run recovers, or has failed if it used up its restarts."""
    job, number = run.job, run.generation.number
    marks = _marks(turn, run, evidence)
    verdict = _checked(run, verdict)
    blameless = verdict.cause.kind in BLAMELESS
    at_once = blameless and (bool(marks) or verdict.cause.kind is not FailureKind.CHECKPOINT_AWAY)
    reason = clip(f"generation {number}: {verdict.reason}", MAX_REASON_BYTES)
    highest_step = max(run.highest_step, at_work(job, turn.facts).highest_step)
    strikes = 0 if job.made_progress(highest_step) else job.strikes
    if strikes >= job.spec.max_restarts and not blameless:
        return [*marks, _give_up(run, strikes, reason, verdict)]
    command = FailGeneration(
        job_id=job.job_id,
        generation=number,
        cause=verdict.cause,
        collateral=verdict.collateral,
        culprits=verdict.culprits,
        observed_at=verdict.observed_at,
        highest_step=highest_step,
        reason=reason,
        backoff_s=0.0 if at_once else _backoff_s(turn, job, highest_step),
    )
    return [*marks, Decision(action=command, reason=reason)]


def _give_up(run: Running, strikes: int, reason: str, verdict: Blame) -> Decision:
    first = run.job.first_strike if strikes else ""
    told = f"gave up after {strikes} restart{'s'[: strikes != 1]} without progress: {reason}"
    if first:
        half = MAX_REASON_BYTES // 2  # each of the two errors keeps its beginning
        told = f"{clip(told, half)}; the first time: {clip(first, half)}"
    return finish(run, JobStatus.FAILED, told, because=verdict)


def _backoff_s(turn: Turn, job: Job, highest_step: int) -> float:
    """None after progress; else it doubles with every failure."""
    settings = turn.settings
    if job.made_progress(highest_step):
        return 0.0
    return min(settings.backoff_limit_s, max(settings.backoff_base_s, job.backoff_s * 2))


def _marks(turn: Turn, run: Running, evidence: Iterable[Evidence]) -> list[Decision]:
    """Take the checkpoint that a rank cannot begin with out of use, so that the next generation reads an older one.

    One that is only away is waited for first.
    """
    source = _source(run)
    final, waited_s = {FailureKind.CORRUPT_CHECKPOINT}, _waited_s(turn, run)
    if waited_s >= turn.settings.checkpoint_wait_s:
        final.add(FailureKind.CHECKPOINT_AWAY)
    accuser = next((e for e in evidence if e.kind in final), None)
    if source is None or accuser is None or source.status is CheckpointStatus.CORRUPT:
        return []
    reason = f"rank {accuser.rank} on node {accuser.node} {accuser.said}"
    if accuser.kind is FailureKind.CHECKPOINT_AWAY:
        reason = f"given up after {waited_s:.0f} s: {reason}"
    command = MarkCheckpointCorrupt(
        job_id=run.job.job_id,
        step=source.step,
        manifest_sha256=source.manifest_sha256,
        reason=clip(reason, MAX_REASON_BYTES),
    )
    return [Decision(action=command, reason=f"checkpoint of step {source.step}: {command.reason}")]


def _waited_s(turn: Turn, run: Running) -> float:
    """For how long the generations before this one failed, one after the other, for want of nodes that are away."""
    since = turn.now.wall_s
    for incident in reversed(run.job.incidents):
        if incident.cause.kind is not FailureKind.CHECKPOINT_AWAY:
            break
        since = incident.decided_at
    return turn.now.wall_s - since


def _checked(run: Running, verdict: Blame) -> Blame:
    """An unusable checkpoint costs no restart, so a claim that names none is an error like any other."""
    if verdict.cause.kind in CHECKPOINT_ERRORS and _source(run) is None:
        return replace(verdict, cause=replace(verdict.cause, kind=FailureKind.ERROR))
    return verdict


def _source(run: Running) -> Checkpoint | None:
    """The checkpoint that the generation started from."""
    return run.job.source_of(run.generation)


def late_start(turn: Turn, run: Running) -> Blame | None:
    """The blame for a generation that is not training in time; None while it has time left.

    Those furthest behind keep the others waiting.
    """
    sighting = sighting_of(run.job, turn.facts)
    # While a planned change lasts, the others train, and the status tells of their checkpoints.
    since_s = sighting.generation_since_s if run.job.outgoing else sighting.since_s
    waited_s = turn.now.monotonic_s - since_s
    late = [
        member
        for member in run.generation.members
        if (fact := run.ranks.get(member.rank)) is None or not is_beyond_start(fact)
    ]
    if waited_s < turn.settings.start_deadline_s or not late:
        return None
    where = [
        f"rank {m.rank} on node {m.node} is {run.ranks[m.rank].phase if m.rank in run.ranks else 'unknown'}"
        for m in late
    ]
    reason = f"not all workers train after {waited_s:.0f} s: {', '.join(where)}"
    came = {m.rank: _came_to(run.ranks.get(m.rank)) for m in late}
    behind = [m for m in late if came[m.rank] == min(came.values())]
    return made_up(turn, run, FailureKind.START_TIMEOUT, reason, behind)


def _came_to(fact: WorkerFact | None) -> int:
    """How far a rank has come that does not train yet."""
    if fact is None or fact.phase not in _ON_THE_WAY:
        return 0
    return 1 + _ON_THE_WAY.index(fact.phase) + (len(fact.rendezvous) > 0)


def hanging(turn: Turn, run: Running) -> Blame | None:
    """The blame for a rank that keeps the others waiting; None while none does."""
    speaking = turn.survey.views
    seen = {
        member.rank: run.ranks[member.rank]
        for member in run.generation.members
        if member.rank in run.ranks
        and (view := speaking.get(member.node)) is not None
        and view.health is Health.ALIVE
    }
    sighting = sighting_of(run.job, turn.facts)
    still_s = turn.now.monotonic_s - max(sighting.still_since_s, sighting.since_s)
    if len(seen) < len(run.generation.members):
        still_s = 0.0  # those that are not heard may be why: the failure detector is at it
    found = find_hang(seen, still_s, turn.settings.hang)
    if found is None:
        return None
    culprit = next(m for m in run.generation.members if m.rank == found.rank)
    reason = f"worker {culprit.rank} on node {culprit.node} {found.said}"
    verdict = made_up(turn, run, FailureKind.HANG, reason, [culprit])
    return replace(verdict, observed_at=turn.now.wall_s - found.since_s)


def lost_at_the_end(
    turn: Turn, run: Running, outcomes: Mapping[int, WorkerOutcome], at: Progress
) -> Blame | None:
    """The blame for ranks that finished and were lost with their node before their last shard was anywhere else.

    The state that the run ended with is gone with them, so it has to be made again; None while a node may come back.
    """
    step = outcomes[min(outcomes)].checkpoint_step
    durable = {shard.rank for one in at.open if one.step == step for shard in one.shards}
    lost = [
        (member, gone)
        for member in run.generation.members
        if member.rank not in durable
        and (gone := turn.survey.gone(member, may_move=True)) is not None
    ]
    if step is None or not lost or any(_may_come_back(turn, member.node) for member, _ in lost):
        return None
    (first, gone), members = lost[0], [member for member, _ in lost]
    saved = ranks_text([member.rank for member in members])
    reason = (
        f"node {first.node} {gone.said} before what {saved} saved of step {step} was on another one"
    )
    return made_up(turn, run, gone.kind, clip(reason, MAX_REASON_BYTES), members)


def _may_come_back(turn: Turn, node: str) -> bool:
    view = turn.survey.views.get(node)
    if view is None or view.status is not NodeStatus.LOST:
        return False
    lost_s = turn.now.monotonic_s - view.sighting.status_since_s
    return view.changed or lost_s < turn.settings.final_return_wait_s


def unasked_stop(turn: Turn, run: Running) -> Blame:
    """The verdict over workers that stopped in good order although nobody asked."""
    reason = f"{ranks_text(sorted(run.ranks))} stopped at step {run.highest_step} without a request"
    return made_up(turn, run, FailureKind.ERROR, reason, run.generation.members)


def made_up(
    turn: Turn, run: Running, kind: FailureKind, reason: str, blamed: Iterable[Member]
) -> Blame:
    """A verdict without evidence against a single worker."""
    guilty = list(blamed)
    ranks = {member.rank for member in guilty}
    seen = seats(run.job, run.generation, turn.facts)
    return Blame(
        cause=Cause(
            kind=kind,
            rank=guilty[0].rank,
            node=guilty[0].node,
            pid=seen[guilty[0].rank].pid if guilty[0].rank in seen else None,
            error=clip(reason, MAX_ERROR_BYTES),
        ),
        collateral=tuple(
            rank for rank in all_ranks(run.generation, run.job.outgoing) if rank not in ranks
        ),
        culprits=tuple(
            Culprit(m.node, fact.worker) for m in guilty if (fact := seen.get(m.rank)) is not None
        )[:MAX_CULPRITS],
        observed_at=turn.now.wall_s,
        reason=reason,
        echoes_only=False,
    )


def is_beyond_start(fact: WorkerFact) -> bool:
    """Whether a worker came as far as training."""
    return fact.outcome is not None or fact.phase in _BEYOND_START
