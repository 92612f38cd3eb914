"""Desired and observed in, decisions out: what the leader does next about every job and node, and why.

``reconcile`` is pure. The coordinator calls it once per turn and carries the decisions out in order: it proposes
commands to the log and performs effects. All of it is level-triggered: a decision that was lost is taken again in
the next turn, and one that took effect is not repeated, because the state says so. A decision names the generation
that it is about, and the state machine refuses it if another one was formed meanwhile.

The story of a job is the ``_HANDLERS`` table: one function per status. The parts live beside this module:
``node_survey`` (who is gone, who may get work), ``evidence`` (why a generation failed), ``failing`` (what follows),
``checkpoint_progress`` (which checkpoints are whole), ``completion`` (how a run ends), ``forming`` (the next generation),
``scheduler`` (who runs where).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from msgspec.structs import replace

from distroml.commands import (
    FailGeneration,
    FinishRun,
    FormGeneration,
    MarkRunning,
    MarkStepped,
    RetireCheckpoints,
)
from distroml.consensus.state import ClusterState
from distroml.model import Job, JobStatus
from distroml.reports import WorkerOutcome
from distroml.runtime.checkpoint_progress import (
    Progress,
    checkpoint_decisions,
    left_behind,
    progress,
    write_decisions,
)
from distroml.runtime.completion import (
    conclude,
    have_diverged,
    outcomes_of,
    stopped_by_failure,
)
from distroml.runtime.decisions import Decision, Running, Turn, WriteManifest, at_work, running
from distroml.runtime.evidence import Evidence
from distroml.runtime.facts import Facts, Now, ReconcilerSettings, sighting_of
from distroml.runtime.failing import (
    evidence_of,
    fail_generation,
    fail_when_known,
    hanging,
    is_beyond_start,
    late_start,
    lost_at_the_end,
    unasked_stop,
    verdict_on,
)
from distroml.runtime.forming import (
    WAITING,
    change,
    on_recovering,
    on_waiting,
    request_of,
    undo,
)
from distroml.runtime.node_survey import survey
from distroml.runtime.resizing import changes
from distroml.runtime.retention import describe_policy, surplus
from distroml.runtime.scheduler import Schedule, schedule
from distroml.runtime.vacating import must_vacate, vacate, vacated

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
        found = _HANDLERS[job.status](turn, job)
        decisions += found
        # Nothing comes between the end of a generation and the next one.
        if not any(isinstance(one.action, FailGeneration | FormGeneration) for one in found):
            decisions += _retire(state, job)
    return decisions


def _retire(state: ClusterState, job: Job) -> list[Decision]:
    gone = surplus(state, job)
    if not gone:
        return []
    policy = describe_policy(job.spec.checkpointing)
    command = RetireCheckpoints(
        job_id=job.job_id, steps=tuple(one.step for one in gone), reason=policy
    )
    steps = ", ".join(str(one.step) for one in gone)
    return [Decision(action=command, reason=f"checkpoints of steps {steps} go: {policy}")]


def waiting_reasons(
    state: ClusterState, facts: Facts, now: Now, settings: ReconcilerSettings = _DEFAULTS
) -> dict[str, str]:
    """Why each QUEUED or RECOVERING job does not start in this turn, by job id in queue order."""
    return _turn(state, facts, now, settings).schedule.waiting


def _turn(state: ClusterState, facts: Facts, now: Now, settings: ReconcilerSettings) -> Turn:
    seen = survey(state, facts, now, settings)
    active = tuple(state.active_jobs())
    waiting = [job for job in active if job.status in WAITING]
    requests = [request_of(job, facts, now, settings, seen) for job in waiting]
    if seen.unheard:
        missing = ", ".join(seen.unheard)
        reason = f"waiting for the first report of node{'s'[: len(seen.unheard) != 1]} {missing}"
        plan = Schedule(placements={}, waiting={r.job_id: reason for r in requests})
    else:
        plan = schedule(requests, seen.hosts, returning_slots=seen.returning_slots)
    turn = Turn(active=active, facts=facts, now=now, settings=settings, survey=seen, schedule=plan)
    return replace(turn, changes={} if seen.unheard else changes(turn))


def _nobody_changed_over(run: Running) -> bool:
    """Whether all ranks that were there before a planned change still train as before."""
    return run.job.outgoing is not None and set(run.ranks) <= set(run.generation.joining)


def _only_joining(evidence: list[Evidence]) -> bool:
    return all(one.joins for one in evidence)


# --- a generation at work --------------------------------------------------------------------------------------


def _on_starting(turn: Turn, job: Job) -> list[Decision]:
    run = running(job, turn.facts)
    evidence = evidence_of(turn, run)
    if evidence:
        failing = fail_when_known(turn, run, evidence)
        return failing + _still_written(turn, run, progress(turn, run), failing)
    blamed = hanging(turn, run) or late_start(turn, run)
    if blamed is not None:
        return fail_generation(turn, run, blamed, [])
    return _mark_running(run)


def _on_running(turn: Turn, job: Job) -> list[Decision]:
    """RUNNING and CHECKPOINTING."""
    run, work = running(job, turn.facts), at_work(job, turn.facts)
    at = progress(turn, work)
    leaves = run.generation.vacated or must_vacate(turn, run)
    may_move = leaves or job.outgoing is not None or job.job_id in turn.changes
    evidence = evidence_of(turn, run, may_move=may_move)
    if evidence and _only_joining(evidence) and _nobody_changed_over(run):
        return undo(turn, run, f"worker {evidence[0].rank} {evidence[0].said}")
    failing = fail_when_known(turn, run, evidence) if evidence else []
    if failing:
        return failing + _still_written(turn, work, at, failing)
    for done in (run, work):
        outcomes = outcomes_of(done)
        if outcomes is not None:
            ending = _ended(turn, run, done, outcomes)
            if ending:
                return ending
    ongoing = _go_on(turn, run, work, at)
    if any(isinstance(one.action, FailGeneration | FinishRun) for one in ongoing):
        return ongoing
    saving = checkpoint_decisions(turn, work, at)
    # While its ranks change over, the outgoing generation can still be spoken of before the next one is marked.
    return saving + ongoing if job.outgoing else ongoing + saving


def _still_written(
    turn: Turn, work: Running, at: Progress, failing: list[Decision]
) -> list[Decision]:
    """What a generation that fails now had whole; nothing where its run has failed with it."""
    recovers = bool(failing) and isinstance(failing[-1].action, FailGeneration)
    return write_decisions(turn, work, at.whole) if recovers else []


def _ended(
    turn: Turn, run: Running, done: Running, outcomes: dict[int, WorkerOutcome]
) -> list[Decision]:
    """What follows once all ranks of ``done`` have; nothing while their checkpoint is being committed."""
    at = progress(turn, done)
    stopped = any(outcome.stopped for outcome in outcomes.values())
    if stopped and not done.generation.vacated:
        return fail_generation(turn, run, unasked_stop(turn, run), [])
    if stopped and not have_diverged(outcomes):
        return vacated(turn, done, outcomes, at)
    if ending := conclude(turn, done, outcomes, at):
        return [ending]
    lost = lost_at_the_end(turn, done, outcomes, at)
    return fail_generation(turn, run, lost, []) if lost else []


def _go_on(turn: Turn, run: Running, work: Running, at: Progress) -> list[Decision]:
    """Nobody failed or finished: does somebody hang, has a change been made, is there one to make?"""
    job = run.job
    blamed = hanging(turn, work)
    if blamed is None and job.outgoing is not None:
        blamed = late_start(turn, run)
        if blamed is not None and _nobody_changed_over(run):
            return undo(turn, run, blamed.reason)
        if not _nobody_changed_over(run):
            blamed = blamed or hanging(turn, run)
    if blamed is not None:
        return fail_generation(turn, run, blamed, [])
    if run.generation.running_at is None:
        return _take_over(turn, run, work)
    if _steps_are_due(run):
        return _mark_stepped(run)
    settled = job.status is JobStatus.RUNNING and not at.open
    return vacate(turn, run) or (change(turn, run) if settled else [])


def _on_stopping(turn: Turn, job: Job) -> list[Decision]:
    run, work = running(job, turn.facts), at_work(job, turn.facts)
    at = progress(turn, work)
    for done in (run, work):
        outcomes = outcomes_of(done)
        if outcomes is not None:
            at = progress(turn, done)
            ending = conclude(turn, done, outcomes, at)
            return [ending] if ending else checkpoint_decisions(turn, done, at)
    waited_s = turn.now.monotonic_s - sighting_of(job, turn.facts).since_s
    if waited_s >= turn.settings.stop_deadline_s:
        return [stopped_by_failure(run, f"its workers did not stop within {waited_s:.0f} s")]
    evidence = [e for e in evidence_of(turn, run) if not e.joins or not _nobody_changed_over(run)]
    verdict = verdict_on(turn, run, evidence) if evidence else hanging(turn, work)
    if verdict is not None and not at.whole:
        why = f"generation {run.generation.number}: {verdict.reason}"
        return [stopped_by_failure(run, why, verdict)]
    starting = _mark_running(run) if run.generation.running_at is None else []
    return [*starting, *checkpoint_decisions(turn, work, at)]


def _take_over(turn: Turn, run: Running, work: Running) -> list[Decision]:
    """The newest generation trains; what the one before it left open is settled first."""
    marking = _mark_running(run)
    if not marking or run.job.outgoing is None:
        return marking
    settled = left_behind(turn, work, run.generation.number)
    return [] if settled is None else [*settled, *marking]


def _mark_running(run: Running) -> list[Decision]:
    if len(run.ranks) < len(run.generation.members):
        return []
    if not all(is_beyond_start(fact) for fact in run.ranks.values()):
        return []
    totals = [f.total_steps for f in run.ranks.values() if f.total_steps is not None]
    marks = [fact.marks for _, fact in sorted(run.ranks.items())]
    command = MarkRunning(
        job_id=run.job.job_id,
        generation=run.generation.number,
        total_steps=totals[0] if totals else run.job.spec.steps or run.highest_step,
        left_at=_last(one.left_at for one in marks),
        met_at=_last(one.met_at for one in marks),
        restored_at=_last(one.restored_at for one in marks),
        resume_step=next((m.resume_step for m in marks if m.resume_step is not None), None),
        source=next((m.source for m in marks if m.source), ""),
    )
    reason = f"generation {run.generation.number}: all {len(run.ranks)} ranks train"
    return [Decision(action=command, reason=reason)]


def _last(marks: Iterable[float | None]) -> float | None:
    return max((mark for mark in marks if mark is not None), default=None)


def _steps_are_due(run: Running) -> bool:
    """Whether the recovery's last phase can be told: each rank has completed a step since."""
    last = run.job.incidents[-1] if run.job.incidents else None
    return (
        last is not None
        and last.next_generation == run.generation.number
        and last.first_step_at is None
        and len(run.ranks) == len(run.generation.members)
        and all(fact.marks.stepped_at is not None for fact in run.ranks.values())
    )


def _mark_stepped(run: Running) -> list[Decision]:
    command = MarkStepped(
        job_id=run.job.job_id,
        generation=run.generation.number,
        stepped_at=_last(fact.marks.stepped_at for fact in run.ranks.values()) or 0.0,
    )
    reason = f"generation {run.generation.number}: all {len(run.ranks)} ranks completed a step"
    return [Decision(action=command, reason=reason)]


def _on_ended(turn: Turn, job: Job) -> list[Decision]:
    """COMPLETED, FAILED and CANCELLED: agents end leftover workers by themselves."""
    return []


_HANDLERS: Final[dict[JobStatus, Callable[[Turn, Job], list[Decision]]]] = {
    JobStatus.QUEUED: on_waiting,
    JobStatus.STARTING: _on_starting,
    JobStatus.RUNNING: _on_running,
    JobStatus.CHECKPOINTING: _on_running,
    JobStatus.RECOVERING: on_recovering,
    JobStatus.STOPPING: _on_stopping,
    JobStatus.COMPLETED: _on_ended,
    JobStatus.FAILED: _on_ended,
    JobStatus.CANCELLED: _on_ended,
}
