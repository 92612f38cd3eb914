"""Desired and observed in, decisions out: what the leader does next about every job and node, and why.

``reconcile`` is pure. The coordinator calls it once per turn and carries the decisions out in order: it proposes
commands to the log and performs effects. All of it is level-triggered: a decision that was lost is taken again in
the next turn, and one that took effect is not repeated, because the state says so. A decision names the generation
that it is about, and the state machine refuses it if another one was formed meanwhile.

The story of a job is the ``_HANDLERS`` table: one function per status. The parts live beside this module:
``node_survey`` (who is gone, who may get work), ``evidence`` (why a generation failed), ``failing`` (what follows),
``checkpoint_progress`` (which checkpoints are whole), ``completion`` (how a run ends), ``scheduler`` (who runs where).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from distroml.commands import FailGeneration, FormGeneration, MarkRunning
from distroml.consensus.state import ClusterState
from distroml.model import Generation, Job, JobStatus, Member
from distroml.runtime.checkpoint_progress import checkpoint_decisions, progress, write_decisions
from distroml.runtime.completion import conclude, outcomes_of, stopped_by_failure
from distroml.runtime.decisions import Decision, Running, Turn, WriteManifest, running
from distroml.runtime.facts import Facts, Now, ReconcilerSettings, sighting_of, workers_of
from distroml.runtime.failing import (
    evidence_of,
    fail_generation,
    fail_when_known,
    is_beyond_start,
    late_start,
    unasked_stop,
    verdict_on,
)
from distroml.runtime.node_survey import Survey, released_index, survey
from distroml.runtime.scheduler import (
    Request,
    Schedule,
    describe,
    is_alive,
    possible_workers,
    schedule,
)

__all__ = [
    "Decision",
    "Facts",
    "Now",
    "ReconcilerSettings",
    "WriteManifest",
    "reconcile",
    "waiting_reasons",
]

_DEFAULTS = ReconcilerSettings()


def reconcile(
    state: ClusterState, facts: Facts, now: Now, settings: ReconcilerSettings = _DEFAULTS
) -> list[Decision]:
    """All decisions of one turn: nodes by name, then jobs by submission.

    At most one of them changes the status or generation of a job, checkpoint marks aside.
    """
    turn = _turn(state, facts, now, settings)
    decisions = [
        Decision(action=change, reason=f"node {change.name}: {change.reason}")
        for change in turn.survey.changes()
    ]
    for job in turn.active:
        decisions += _HANDLERS[job.status](turn, job)
    return decisions


def waiting_reasons(
    state: ClusterState, facts: Facts, now: Now, settings: ReconcilerSettings = _DEFAULTS
) -> dict[str, str]:
    """Why each QUEUED or RECOVERING job does not start in this turn, by job id in queue order."""
    return _turn(state, facts, now, settings).schedule.waiting


def _turn(state: ClusterState, facts: Facts, now: Now, settings: ReconcilerSettings) -> Turn:
    seen = survey(state, facts, now, settings)
    active = tuple(state.active_jobs())
    waiting = [job for job in active if job.status in _WAITING]
    requests = [_request(job, facts, now, settings, seen) for job in waiting]
    if seen.unheard:
        missing = ", ".join(seen.unheard)
        reason = f"waiting for the first report of node{'s'[: len(seen.unheard) != 1]} {missing}"
        plan = Schedule(placements={}, waiting={r.job_id: reason for r in requests})
    else:
        plan = schedule(requests, seen.hosts, returning_slots=seen.returning_slots)
    return Turn(active=active, facts=facts, now=now, settings=settings, survey=seen, schedule=plan)


# --- waiting for slots -----------------------------------------------------------------------------------------

_WAITING = frozenset({JobStatus.QUEUED, JobStatus.RECOVERING})


def _request(
    job: Job, facts: Facts, now: Now, settings: ReconcilerSettings, seen: Survey
) -> Request:
    recovering = job.status is JobStatus.RECOVERING
    return Request(
        job_id=job.job_id,
        workers=job.spec.resources.workers,
        priority=job.spec.priority,
        submit_index=job.submit_index,
        recovering=recovering,
        held=_held(job, facts, now, settings, seen) if recovering else "",
    )


def _held(job: Job, facts: Facts, now: Now, settings: ReconcilerSettings, seen: Survey) -> str:
    """Why a recovering job may not start yet although there may be slots; empty if it may."""
    waited_s = now.monotonic_s - sighting_of(job, facts).since_s
    if waited_s < job.backoff_s:
        return f"restart in {job.backoff_s - waited_s:.1f} s"
    ending = _still_ending(job, facts, seen)
    if ending and waited_s < settings.leftover_wait_s:
        return f"{ending} worker{'s'[: ending != 1]} of generation {job.generation_number} still ending"
    committing = [
        step for j, g, step in facts.writing if (j, g) == (job.job_id, job.generation_number)
    ]
    if committing and waited_s < settings.commit_wait_s:
        return f"checkpoint of step {max(committing)} is being committed"
    return ""


def _still_ending(job: Job, facts: Facts, seen: Survey) -> int:
    """Workers of the job that live, or may live, on nodes that can tell."""
    speaking = {name: view.report for name, view in seen.views.items() if view.speaks}
    alive = sum(1 for name, fact in workers_of(job, facts) if name in speaking and is_alive(fact))
    released, jobs = {job.job_id: released_index(job, facts)}, {job.job_id: job}
    return alive + sum(possible_workers(r, released, jobs) for r in speaking.values() if r)


def _on_waiting(turn: Turn, job: Job) -> list[Decision]:
    """QUEUED and RECOVERING: form the next generation once the scheduler found slots for all ranks."""
    members = turn.schedule.placements.get(job.job_id)
    return [_form(turn, job, members)] if members else []


def _on_recovering(turn: Turn, job: Job) -> list[Decision]:
    """RECOVERING: what was whole when the generation failed is still committed, and then resumed from."""
    run = running(job, turn.facts)
    return write_decisions(turn, run, progress(turn, run).whole) or _on_waiting(turn, job)


def _form(turn: Turn, job: Job, members: tuple[Member, ...]) -> Decision:
    newest = job.newest_checkpoint()
    number = job.generation_number + 1
    source = ""
    if number > 1:
        source = f" from the checkpoint of step {newest.step}" if newest else " from scratch"
    reason = f"generation {number}: {describe(members)}{source}"
    generation = Generation(
        number=number,
        members=members,
        formed_at=turn.now.wall_s,
        reason=reason,
        resume_step=newest.step if newest else 0,
        checkpoint_step=newest.step if newest else None,
    )
    return Decision(action=FormGeneration(job_id=job.job_id, generation=generation), reason=reason)


# --- a generation at work --------------------------------------------------------------------------------------


def _on_starting(turn: Turn, job: Job) -> list[Decision]:
    run = running(job, turn.facts)
    evidence = evidence_of(turn, run)
    if evidence:
        return fail_when_known(turn, run, evidence)
    late = late_start(turn, run)
    if late is not None:
        return fail_generation(turn, run, late, [])
    return _mark_running(run)


def _on_running(turn: Turn, job: Job) -> list[Decision]:
    """RUNNING and CHECKPOINTING."""
    run = running(job, turn.facts)
    at = progress(turn, run)
    evidence = evidence_of(turn, run)
    failing = fail_when_known(turn, run, evidence) if evidence else []
    if failing:
        recovers = isinstance(failing[-1].action, FailGeneration)
        return [*failing, *(write_decisions(turn, run, at.whole) if recovers else [])]
    outcomes = outcomes_of(run)
    if outcomes is not None:
        if any(o.stopped for o in outcomes.values()) and not job.stop_requested:
            return fail_generation(turn, run, unasked_stop(turn, run), [])
        ending = conclude(turn, run, outcomes, at)
        if ending is not None:
            return [ending]
    return checkpoint_decisions(turn, run, at)


def _on_stopping(turn: Turn, job: Job) -> list[Decision]:
    run = running(job, turn.facts)
    at = progress(turn, run)
    outcomes = outcomes_of(run)
    if outcomes is not None:
        ending = conclude(turn, run, outcomes, at)
        return [ending] if ending else checkpoint_decisions(turn, run, at)
    waited_s = turn.now.monotonic_s - sighting_of(job, turn.facts).since_s
    if waited_s >= turn.settings.stop_deadline_s:
        return [stopped_by_failure(run, f"its workers did not stop within {waited_s:.0f} s")]
    evidence = evidence_of(turn, run)
    verdict = verdict_on(turn, run, evidence) if evidence else None
    if verdict is not None and not at.whole:
        why = f"generation {run.generation.number}: {verdict.reason}"
        return [stopped_by_failure(run, why, verdict)]
    starting = _mark_running(run) if run.generation.running_at is None else []
    return [*starting, *checkpoint_decisions(turn, run, at)]


def _mark_running(run: Running) -> list[Decision]:
    if len(run.ranks) < len(run.generation.members):
        return []
    if not all(is_beyond_start(fact) for fact in run.ranks.values()):
        return []
    totals = [f.total_steps for f in run.ranks.values() if f.total_steps is not None]
    command = MarkRunning(
        job_id=run.job.job_id,
        generation=run.generation.number,
        total_steps=totals[0] if totals else run.job.spec.steps or run.highest_step,
    )
    reason = f"generation {run.generation.number}: all {len(run.ranks)} ranks train"
    return [Decision(action=command, reason=reason)]


def _on_ended(turn: Turn, job: Job) -> list[Decision]:
    """COMPLETED, FAILED and CANCELLED: agents end leftover workers by themselves."""
    return []


_HANDLERS: Final[dict[JobStatus, Callable[[Turn, Job], list[Decision]]]] = {
    JobStatus.QUEUED: _on_waiting,
    JobStatus.STARTING: _on_starting,
    JobStatus.RUNNING: _on_running,
    JobStatus.CHECKPOINTING: _on_running,
    JobStatus.RECOVERING: _on_recovering,
    JobStatus.STOPPING: _on_stopping,
    JobStatus.COMPLETED: _on_ended,
    JobStatus.FAILED: _on_ended,
    JobStatus.CANCELLED: _on_ended,
}
