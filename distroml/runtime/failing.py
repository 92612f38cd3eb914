"""The end of a generation: who is to blame, and whether the run gets another one.

Pure; used by ``runtime.reconciler``. ``evidence`` finds out what happened; here is decided what follows from it:
recover after a pause, take a corrupt checkpoint out of use, or give up.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from distroml.commands import FailGeneration, MarkCheckpointCorrupt
from distroml.model import (
    BLAMELESS,
    Cause,
    Checkpoint,
    CheckpointStatus,
    FailureKind,
    JobStatus,
    Member,
)
from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime.completion import finish
from distroml.runtime.decisions import Decision, Running, Turn
from distroml.runtime.evidence import (
    MAX_ERROR_BYTES,
    MAX_REASON_BYTES,
    Blame,
    Evidence,
    blame,
    clip,
    gather,
    ranks_text,
)
from distroml.runtime.facts import sighting_of

_BEYOND_START = frozenset({WorkerPhase.TRAINING, WorkerPhase.FINISHING, WorkerPhase.FINISHED})


def evidence_of(turn: Turn, run: Running) -> list[Evidence]:
    """All that speaks against the ranks of the generation."""
    return gather(run.job, run.generation, turn.facts, turn.survey, turn.settings)


def verdict_on(turn: Turn, run: Running, evidence: list[Evidence]) -> Blame | None:
    """Who is to blame; None while only echoes are seen and the root cause may still show up."""
    verdict = blame(evidence, run.generation, turn.now.wall_s)
    failing_s = sighting_of(run.job, turn.facts).failing_since_s
    if verdict.echoes_only and failing_s is not None:
        suspect = turn.survey.suspects(run.generation.members)
        wait_s = turn.settings.suspect_echo_wait_s if suspect else turn.settings.echo_wait_s
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
    marks = _corrupt_marks(run, evidence)
    verdict = _checked(run, verdict)
    spares = verdict.cause.kind in BLAMELESS
    reason = clip(f"generation {number}: {verdict.reason}", MAX_REASON_BYTES)
    if job.restarts >= job.spec.max_restarts and not spares:
        restarts = f"{job.restarts} restart{'s'[: job.restarts != 1]}"
        told = f"gave up after {restarts}: {reason}"
        return [*marks, finish(run, JobStatus.FAILED, told, because=verdict)]
    command = FailGeneration(
        job_id=job.job_id,
        generation=number,
        cause=verdict.cause,
        collateral=verdict.collateral,
        observed_at=verdict.observed_at,
        highest_step=run.highest_step,
        reason=reason,
        backoff_s=_backoff_s(turn, run, fresh=spares),
    )
    return [*marks, Decision(action=command, reason=reason)]


def _backoff_s(turn: Turn, run: Running, *, fresh: bool) -> float:
    """Doubles with every failure until a generation gets something done."""
    settings, generation = turn.settings, run.generation
    committed = any(c.generation == generation.number for c in run.job.checkpoints)
    trained_s = turn.now.wall_s - (generation.running_at or turn.now.wall_s)
    if fresh or committed or trained_s > settings.progress_s or run.job.backoff_s <= 0:
        return settings.backoff_base_s
    return min(settings.backoff_limit_s, run.job.backoff_s * 2)


def _corrupt_marks(run: Running, evidence: Iterable[Evidence]) -> list[Decision]:
    """Take the checkpoint that a rank found corrupt out of use, so that the next generation reads an older one."""
    source = _source(run)
    accuser = next((e for e in evidence if e.kind is FailureKind.CORRUPT_CHECKPOINT), None)
    if source is None or accuser is None or source.status is CheckpointStatus.CORRUPT:
        return []
    reason = clip(f"rank {accuser.rank} on node {accuser.node} {accuser.said}", MAX_REASON_BYTES)
    command = MarkCheckpointCorrupt(
        job_id=run.job.job_id,
        step=source.step,
        manifest_sha256=source.manifest_sha256,
        reason=reason,
    )
    return [Decision(action=command, reason=f"checkpoint of step {source.step}: {reason}")]


def _checked(run: Running, verdict: Blame) -> Blame:
    """A corrupt checkpoint costs no restart, so a claim that names none is an error like any other."""
    if verdict.cause.kind is FailureKind.CORRUPT_CHECKPOINT and _source(run) is None:
        return replace(verdict, cause=replace(verdict.cause, kind=FailureKind.ERROR))
    return verdict


def _source(run: Running) -> Checkpoint | None:
    """The checkpoint that the generation started from."""
    wanted = run.generation.checkpoint_step
    return next((c for c in run.job.checkpoints if c.step == wanted), None)


def late_start(turn: Turn, run: Running) -> Blame | None:
    """The blame for a generation that is not training in time; None while it has time left."""
    waited_s = turn.now.monotonic_s - sighting_of(run.job, turn.facts).since_s
    late = [m for m in run.generation.members if not _started(run, m)]
    if waited_s < turn.settings.start_deadline_s or not late:
        return None
    where = [
        f"rank {m.rank} on node {m.node} is {run.ranks[m.rank].phase if m.rank in run.ranks else 'unknown'}"
        for m in late
    ]
    reason = f"not all workers train after {waited_s:.0f} s: {', '.join(where)}"
    return _made_up(turn, run, FailureKind.START_TIMEOUT, reason, late)


def _started(run: Running, member: Member) -> bool:
    fact = run.ranks.get(member.rank)
    return fact is not None and is_beyond_start(fact)


def unasked_stop(turn: Turn, run: Running) -> Blame:
    """The verdict over workers that stopped in good order although nobody asked."""
    reason = f"{ranks_text(sorted(run.ranks))} stopped at step {run.highest_step} without a request"
    return _made_up(turn, run, FailureKind.ERROR, reason, run.generation.members)


def _made_up(
    turn: Turn, run: Running, kind: FailureKind, reason: str, blamed: Iterable[Member]
) -> Blame:
    """A verdict without evidence against a single worker."""
    guilty = list(blamed)
    ranks = {member.rank for member in guilty}
    return Blame(
        cause=Cause(
            kind=kind,
            rank=guilty[0].rank,
            node=guilty[0].node,
            error=clip(reason, MAX_ERROR_BYTES),
        ),
        collateral=tuple(m.rank for m in run.generation.members if m.rank not in ranks),
        observed_at=turn.now.wall_s,
        reason=reason,
        echoes_only=False,
    )


def is_beyond_start(fact: WorkerFact) -> bool:
    """Whether a worker came as far as training."""
    return fact.outcome is not None or fact.phase in _BEYOND_START
