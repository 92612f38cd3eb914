"""What clients ask for: a job is submitted, cancelled, stopped or removed."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from distroml import commands as c
from distroml.consensus.handlers.change import (
    Change,
    Context,
    Handlers,
    Refused,
    find_job,
    moved,
    new_event,
)
from distroml.consensus.state import MAX_JOBS, ClusterState
from distroml.model import TERMINAL, Checkpoint, CheckpointStatus, Job, JobStatus
from distroml.spec import JobSpec

S = JobStatus


def _submit_job(state: ClusterState, context: Context, command: c.SubmitJob) -> Change:
    if command.job_id in state.jobs:
        raise Refused("conflict", f"job '{command.job_id}' exists already")
    job = Job(
        job_id=command.job_id,
        run_id=command.run_id,
        spec=command.spec,
        status=S.QUEUED,
        reason="waiting to be scheduled",
        created_at=context.at,
        changed_at=context.at,
        submit_index=context.index,
        change_index=context.index,
        initial=_initial(state, command.spec),
    )
    return with_new_job(state, context, job)


def with_new_job(state: ClusterState, context: Context, job: Job) -> Change:
    """The state with one more job in it. Raises Refused where there is no room."""
    removed = _oldest_finished_if_full(state.jobs)
    jobs = dict(state.jobs)  # with thousands of jobs much faster than a comprehension
    if removed is not None:
        del jobs[removed]
    event = new_event(
        context,
        "state",
        job_id=job.job_id,
        status=job.status.value,
        reason=job.reason,
        generation=0,
    )
    jobs[job.job_id] = job
    events = (new_event(context, "removed", job_id=removed), event) if removed else (event,)
    return Change(replace(state, jobs=jobs), events, job.job_id)


def _initial(state: ClusterState, spec: JobSpec) -> Checkpoint | None:
    """The checkpoint that ``init_from`` means now. Raises Refused where there is none, or nothing left to train."""
    wanted = spec.init_from
    if wanted is None:
        return None
    other = state.jobs.get(wanted.job)
    if other is None:
        raise Refused("invalid-spec", f"init_from.job: there is no job '{wanted.job}'.")
    if wanted.step is None:
        found = other.newest_checkpoint()
    else:
        found = next((one for one in other.checkpoints if one.step == wanted.step), None)
    if found is None or found.status is not CheckpointStatus.COMMITTED:
        committed = CheckpointStatus.COMMITTED
        has = ", ".join(str(o.step) for o in other.checkpoints[-8:] if o.status is committed)
        what = "no checkpoint" if wanted.step is None else f"no checkpoint of step {wanted.step}"
        raise Refused(
            "invalid-spec",
            f"init_from.step: job '{wanted.job}' has {what} to begin with; its newest are: {has or 'none'}.",
        )
    if spec.steps is not None and not wanted.weights_only and spec.steps <= found.step:
        raise Refused(
            "invalid-spec",
            f"steps ({spec.steps}) must be more than the {found.step} that are done in the checkpoint of "
            "init_from; or take its model alone with init_from.weights_only.",
        )
    return found


def _oldest_finished_if_full(jobs: dict[str, Job]) -> str | None:
    """Which job makes room for a new one; None while there is room."""
    if len(jobs) < MAX_JOBS:
        return None
    finished = [job for job in jobs.values() if job.status in TERMINAL]
    if not finished:
        raise Refused(
            "too-many-requests", f"{MAX_JOBS} jobs are waiting or running; submit again later."
        )
    return min(finished, key=lambda job: job.change_index).job_id


def _cancel_job(state: ClusterState, context: Context, command: c.CancelJob) -> Change:
    job = find_job(state, command.job_id)
    if job.status is S.CANCELLED or (job.terminal and command.if_active):
        return Change(state, job_id=job.job_id)
    if job.terminal:
        raise Refused("conflict", f"Job '{job.job_id}' is {job.status}; it cannot be cancelled.")
    return moved(state, job, context, S.CANCELLED, command.reason)


def _stop_job(state: ClusterState, context: Context, command: c.StopJob) -> Change:
    job = find_job(state, command.job_id)
    if job.terminal:
        raise Refused("conflict", f"Job '{job.job_id}' is {job.status}; it cannot be stopped.")
    if job.status is S.STOPPING:
        return Change(state, job_id=job.job_id)
    if job.status is S.QUEUED:
        reason = "stopped before it started"
        return moved(state, job, context, S.CANCELLED, reason, stop_requested=True)
    if job.status is S.RECOVERING:
        newest = job.newest_checkpoint()
        left = f"newest checkpoint is step {newest.step}" if newest else "it has no checkpoint"
        reason = f"stopped while recovering; {left}"
        return moved(state, job, context, S.CANCELLED, reason, stop_requested=True)
    return moved(state, job, context, S.STOPPING, command.reason, stop_requested=True)


def _remove_job(state: ClusterState, context: Context, command: c.RemoveJob) -> Change:
    job = find_job(state, command.job_id)
    if not job.terminal:
        raise Refused("conflict", f"Job '{job.job_id}' is {job.status}; cancel it first.")
    jobs = {job_id: kept for job_id, kept in state.jobs.items() if job_id != job.job_id}
    event = new_event(context, "removed", job_id=job.job_id)
    return Change(replace(state, jobs=jobs), (event,), job.job_id)


HANDLERS: Final[Handlers] = {
    c.SubmitJob: _submit_job,
    c.CancelJob: _cancel_job,
    c.StopJob: _stop_job,
    c.RemoveJob: _remove_job,
}
