"""How a run ends: from the outcomes of all ranks to ``FinishRun``, once the final checkpoint is settled.

Pure; used by ``runtime.reconciler``.
"""

from __future__ import annotations

from collections.abc import Mapping

from distroml.commands import FinishRun
from distroml.model import Cause, CheckpointStatus, FailureKind, Job, JobStatus, Result
from distroml.reports import WorkerOutcome
from distroml.runtime.checkpoint_progress import Progress
from distroml.runtime.decisions import Decision, Running, Turn
from distroml.runtime.evidence import MAX_REASON_BYTES, Blame, clip, ranks_text
from distroml.runtime.facts import sighting_of

DIGEST_CHARS = 12
"""How much of a digest a sentence shows."""


def outcomes_of(run: Running) -> dict[int, WorkerOutcome] | None:
    """The outcome of each rank, or None while one is missing."""
    outcomes = {
        member.rank: fact.outcome
        for member in run.generation.members
        if (fact := run.ranks.get(member.rank)) is not None and fact.outcome is not None
    }
    return outcomes if len(outcomes) == len(run.generation.members) else None


def have_diverged(outcomes: Mapping[int, WorkerOutcome]) -> bool:
    """Whether ranks ended with different states."""
    return len({outcome.state_digest for outcome in outcomes.values()}) > 1


def finish(
    run: Running,
    status: JobStatus,
    reason: str,
    result: Result | None = None,
    because: Blame | None = None,
) -> Decision:
    """End the run; ``because`` of a failure, it leaves an incident."""
    reason = clip(reason, MAX_REASON_BYTES)
    command = FinishRun(
        job_id=run.job.job_id,
        generation=run.job.generation_number,
        status=status,
        reason=reason,
        result=result,
        cause=because.cause if because else None,
        collateral=because.collateral if because else (),
        culprits=because.culprits if because else (),
        observed_at=because.observed_at if because else 0.0,
        highest_step=run.highest_step,
    )
    return Decision(action=command, reason=reason)


def conclude(
    turn: Turn, run: Running, outcomes: dict[int, WorkerOutcome], at: Progress
) -> Decision | None:
    """The end of a run whose ranks all finished; None while the final checkpoint is still being committed."""
    if have_diverged(outcomes):
        verdict = _diverged(turn, run, outcomes)
        reason = f"generation {run.generation.number}: {verdict.reason}"
        return finish(run, JobStatus.FAILED, reason, because=verdict)
    first = outcomes[min(outcomes)]
    saves = run.job.spec.checkpointing.enabled
    problem = final_checkpoint_problem(turn, run, first, at) if saves else ""
    if problem is None:
        return None
    result = Result(
        state_digest=first.state_digest,
        sample_digest=first.sample_digest,
        step=first.step,
        epoch=first.epoch,
        metrics=first.metrics,
        checkpoint_step=_newest_step(run.job),
        duration_s=max(0.0, turn.now.wall_s - (run.job.started_at or turn.now.wall_s)),
    )
    if first.stopped:
        reason = f"stopped by request at step {first.step}; {_after_stop(run.job, problem)}"
        return finish(run, JobStatus.CANCELLED, reason, result)
    who = f"{len(outcomes)} workers" if len(outcomes) > 1 else "its worker"
    same = " with the same state" if len(outcomes) > 1 else ""
    reason = f"{who} finished at step {first.step}{same}"
    if problem:
        reason += f"; no final checkpoint because {problem}"
    return finish(run, JobStatus.COMPLETED, reason, result)


def stopped_by_failure(run: Running, why: str, because: Blame | None = None) -> Decision:
    """The end of a run that failed while it was stopping."""
    reason = f"stopped; {_after_stop(run.job, why)}"
    return finish(run, JobStatus.CANCELLED, reason, because=because)


def final_checkpoint_problem(
    turn: Turn, run: Running, outcome: WorkerOutcome, at: Progress
) -> str | None:
    """Empty if all is well, else why there is no final checkpoint; None while that is open."""
    step = outcome.checkpoint_step
    if step is None:
        return next(reversed(at.dead.values()), "the workers wrote none")
    if any(c.step == step and c.status is CheckpointStatus.COMMITTED for c in run.job.checkpoints):
        return ""
    if step in at.dead:
        return at.dead[step]
    finished_s = sighting_of(run.job, turn.facts).finished_since_s
    waited_s = turn.facts.looked_s - (turn.facts.looked_s if finished_s is None else finished_s)
    if waited_s >= _patience_s(turn, run, step, at):
        return f"it was not committed within {waited_s:.0f} s"
    return None


def _patience_s(turn: Turn, run: Running, step: int, at: Progress) -> float:
    if any(one.step == step for one in at.whole):
        return turn.settings.final_commit_wait_s
    copying = [
        member
        for member in run.generation.members
        if (fact := run.ranks.get(member.rank)) is not None and step in fact.copying
    ]
    if any(turn.survey.gone(member, may_move=True) is None for member in copying):
        return turn.settings.checkpoint_deadline_s
    return turn.settings.final_checkpoint_wait_s


def _after_stop(job: Job, problem: str) -> str:
    if not job.spec.checkpointing.enabled:
        return f"{problem}; checkpoints are off" if problem else "checkpoints are off"
    if not problem:
        return "its final checkpoint is committed"
    newest = _newest_step(job)
    left = "none is committed" if newest is None else f"newest committed is step {newest}"
    return f"no final checkpoint because {problem}; {left}"


def _newest_step(job: Job) -> int | None:
    newest = job.newest_checkpoint()
    return newest.step if newest else None


def _diverged(turn: Turn, run: Running, outcomes: dict[int, WorkerOutcome]) -> Blame:
    by_digest: dict[str, list[int]] = {}
    for rank in sorted(outcomes):
        by_digest.setdefault(outcomes[rank].state_digest, []).append(rank)
    parts = [
        f"{ranks_text(ranks)} ended with {digest[:DIGEST_CHARS]}"
        for digest, ranks in by_digest.items()
    ]
    reason = clip(f"the final states differ: {'; '.join(parts)}", MAX_REASON_BYTES)
    return Blame(
        cause=Cause(kind=FailureKind.DIVERGED, error=reason),
        collateral=(),
        observed_at=turn.now.wall_s,
        reason=reason,
        echoes_only=False,
    )
