"""A checkpoint is asked for or due, begun, then committed or abandoned; a committed one is retired, removed by
request, or turns out to be corrupt. Those of jobs that are not known may be imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec.structs import replace

from distroml import commands as c
from distroml.consensus.handlers.change import (
    Change,
    Context,
    Handlers,
    Refused,
    current_job,
    find_job,
    make_room,
    moved,
    new_event,
    updated,
)
from distroml.consensus.handlers.jobs import with_new_job
from distroml.consensus.keeping import indispensable, leaving, referred
from distroml.consensus.state import MAX_CHECKPOINTS, ClusterState
from distroml.model import ASSIGNED, Checkpoint, CheckpointStatus, Event, Job, JobStatus

S = JobStatus
_TRAINING = (S.RUNNING, S.CHECKPOINTING)


def _request_checkpoint(
    state: ClusterState, context: Context, command: c.RequestCheckpoint
) -> Change:
    job = find_job(state, command.job_id)
    if not job.spec.checkpointing.enabled:
        raise Refused(
            "conflict",
            f"Job '{job.job_id}' was submitted with checkpointing.enabled false; it saves none.",
        )
    if job.status is S.STOPPING:
        raise Refused(
            "conflict", f"Job '{job.job_id}' is STOPPING; it saves a final checkpoint anyway."
        )
    if job.status not in (*_TRAINING, S.STARTING, S.RECOVERING):
        raise Refused(
            "conflict", f"Job '{job.job_id}' is {job.status}; only one that runs can save."
        )
    changed = updated(state, job, context, save_request=job.save_request + 1)
    return Change(changed, job_id=job.job_id)


def _begin_checkpoint(state: ClusterState, context: Context, command: c.BeginCheckpoint) -> Change:
    job = current_job(state, command.job_id, command.generation, S.RUNNING, outgoing=True)
    return moved(state, job, context, S.CHECKPOINTING, f"saving checkpoint of step {command.step}")


def _commit_checkpoint(
    state: ClusterState, context: Context, command: c.CommitCheckpoint
) -> Change:
    # A RECOVERING job's last generation may still commit what was whole before it failed.
    job = current_job(
        state,
        command.job_id,
        _generation_of(state, command),
        *ASSIGNED,
        S.RECOVERING,
        outgoing=True,
    )
    new = replace(command.checkpoint, committed_at=context.at)
    known = next((one for one in job.checkpoints if one.step == new.step), None)
    if known is not None and known.status is CheckpointStatus.COMMITTED:
        if known.manifest_sha256 == new.manifest_sha256:
            return Change(state, job_id=job.job_id)
        raise Refused("conflict", f"step {new.step} is committed already, with other bytes")
    _check_not_passed(job, new)
    _check_references(job, new)
    kept = [one for one in job.checkpoints if one.step != new.step]
    grown = replace(job, checkpoints=tuple(sorted([*kept, new], key=lambda one: one.step)))
    checkpoints, dropped = _bounded(state, grown)
    event = new_event(
        context, "checkpoint", job_id=job.job_id, step=new.step, size_bytes=new.size_bytes
    )
    change = _back_to_running(
        state,
        job,
        context,
        f"checkpoint of step {new.step} committed",
        event,
        checkpoints=checkpoints,
        committed_step=new.step,
        committed_generation=new.generation,
        removed=_still_removed(job, [new]),
        saved_request=max(job.saved_request, min(new.save_request, job.save_request)),
    )
    limit = f"more than {MAX_CHECKPOINTS} checkpoints"
    return replace(change, events=(*change.events, *_retired(context, job, dropped, limit)))


def _check_not_passed(job: Job, new: Checkpoint) -> None:
    passed = job.passed_by(new.generation)
    if new.step < passed:
        raise Refused(
            "conflict", f"step {new.step} is behind step {passed}, which was committed before it"
        )


def _check_references(job: Job, new: Checkpoint) -> None:
    """The files that a delta checkpoint needs are those of checkpoints that the job keeps."""
    whole = {one.directory for one in job.checkpoints if one.status is CheckpointStatus.COMMITTED}
    for directory in new.refers_to:
        if directory not in whole:
            raise Refused(
                "conflict", f"step {new.step} refers to {directory}, which is not kept any more"
            )


def _bounded(state: ClusterState, job: Job) -> tuple[tuple[Checkpoint, ...], list[Checkpoint]]:
    """The checkpoints without the oldest that may go, where there are too many; and those."""
    left, dropped = job.checkpoints, []
    while len(left) > MAX_CHECKPOINTS:
        stays = indispensable(state, replace(job, checkpoints=left))
        needed = referred(left)
        oldest = next((o for o in left if o.step not in stays and o.directory not in needed), None)
        if oldest is None:
            raise Refused("conflict", f"job '{job.job_id}' cannot keep another checkpoint")
        dropped.append(oldest)
        left = tuple(one for one in left if one is not oldest)
    return left, dropped


def _generation_of(state: ClusterState, command: c.CommitCheckpoint) -> int:
    """The generation to judge a commit by: that of its shards, or the next one that went on from beyond its step.

    Survivors do not wait for the commit of what was whole when their generation failed, and may be gone too when it
    comes; nor does the end of a planned change that failed, which began with all that was done before it.
    """
    job = find_job(state, command.job_id)
    now = job.generation
    if now is None or now.number != command.generation + 1:
        return command.generation
    if now.planned:
        went_on = job.status is S.RECOVERING
    else:
        went_on = now.resume_step >= command.checkpoint.step
    return now.number if went_on else command.generation


def _abandon_checkpoint(
    state: ClusterState, context: Context, command: c.AbandonCheckpoint
) -> Change:
    job = current_job(
        state, command.job_id, command.generation, *ASSIGNED, S.RECOVERING, outgoing=True
    )
    event = new_event(
        context, "checkpoint_abandoned", job_id=job.job_id, step=command.step, reason=command.reason
    )
    reason = f"checkpoint of step {command.step} abandoned: {command.reason}"
    return _back_to_running(state, job, context, reason, event)


def _back_to_running(
    state: ClusterState, job: Job, context: Context, reason: str, event: Event, **changes: Any
) -> Change:
    if job.status is not S.CHECKPOINTING:
        return Change(updated(state, job, context, **changes), (event,), job.job_id)
    change = moved(state, job, context, S.RUNNING, reason, **changes)
    return replace(change, events=(event, *change.events))


def _mark_checkpoint_corrupt(
    state: ClusterState, context: Context, command: c.MarkCheckpointCorrupt
) -> Change:
    job = find_job(state, command.job_id)
    marked = tuple(
        replace(one, status=CheckpointStatus.CORRUPT, reason=command.reason)
        if one.step == command.step and one.manifest_sha256 == command.manifest_sha256
        else one
        for one in job.checkpoints
    )
    initial = job.initial
    if initial is not None and initial.manifest_sha256 == command.manifest_sha256:
        initial = replace(initial, status=CheckpointStatus.CORRUPT, reason=command.reason)
    if marked == job.checkpoints and initial == job.initial:
        raise Refused("not-found", f"job '{job.job_id}' has no such checkpoint")
    event = new_event(
        context, "checkpoint_corrupt", job_id=job.job_id, step=command.step, reason=command.reason
    )
    changed = updated(state, job, context, checkpoints=marked, initial=initial)
    return Change(changed, (event,), job.job_id)


# --- the end of a checkpoint -------------------------------------------------------------------------------------


def _retire_checkpoints(
    state: ClusterState, context: Context, command: c.RetireCheckpoints
) -> Change:
    job = find_job(state, command.job_id)
    newest = job.newest_checkpoint()
    stays = {*indispensable(state, job), *([newest.step] if newest else ())}
    gone = leaving(job.checkpoints, set(command.steps) - stays)
    if not gone:
        return Change(state, job_id=job.job_id)
    left = tuple(one for one in job.checkpoints if one not in gone)
    events = _retired(context, job, gone, command.reason)
    return Change(updated(state, job, context, checkpoints=left), events, job.job_id)


def _remove_checkpoint(
    state: ClusterState, context: Context, command: c.RemoveCheckpoint
) -> Change:
    job = find_job(state, command.job_id)
    one = next((one for one in job.checkpoints if one.step == command.step), None)
    if one is None:
        raise Refused("not-found", f"Job '{job.job_id}' has no checkpoint of step {command.step}.")
    why = indispensable(state, job).get(one.step)
    if why is None:
        user = next((o.step for o in job.checkpoints if one.directory in o.refers_to), None)
        why = None if user is None else f"the one of step {user} refers to its files"
    if why is not None:
        raise Refused("conflict", f"The checkpoint of step {one.step} cannot be removed: {why}.")
    changed = updated(
        state,
        job,
        context,
        checkpoints=tuple(other for other in job.checkpoints if other is not one),
        removed=(*job.removed, one.directory)[-MAX_CHECKPOINTS:],
    )
    return Change(changed, _retired(context, job, [one], "removed by request"), job.job_id)


def _still_removed(job: Job, listed: Iterable[Checkpoint]) -> tuple[str, ...]:
    """What was removed by request, but for directories that checkpoints are in again."""
    names = {one.directory for one in listed}
    return tuple(directory for directory in job.removed if directory not in names)


def _retired(
    context: Context, job: Job, gone: Iterable[Checkpoint], reason: str
) -> tuple[Event, ...]:
    return tuple(
        new_event(context, "checkpoint_retired", job_id=job.job_id, step=one.step, reason=reason)
        for one in gone
    )


# --- import ------------------------------------------------------------------------------------------------------


def _import_checkpoints(
    state: ClusterState, context: Context, command: c.ImportCheckpoints
) -> Change:
    """Make the record of a job that ended long ago, or add to it. What is known already stays as it is."""
    job = state.jobs.get(command.job_id)
    if job is None:
        made = Job(
            job_id=command.job_id,
            run_id=command.run_id,
            spec=command.spec,
            status=S.COMPLETED,
            reason="imported from a checkpoint store",
            created_at=context.at,
            changed_at=context.at,
            submit_index=context.index,
            change_index=context.index,
            finished_at=context.at,
            imported=True,
        )
        change = with_new_job(state, context, made)
        state, events, job = change.state, change.events, made
    else:
        events = ()
    if not job.imported or job.run_id != command.run_id:
        raise Refused(
            "conflict",
            f"Job '{job.job_id}' is known to this cluster as run {job.run_id}; nothing is imported over it.",
        )
    known = {one.step: one for one in job.checkpoints}
    for one in command.checkpoints:
        if known.setdefault(one.step, one).manifest_sha256 != one.manifest_sha256:
            raise Refused("conflict", f"step {one.step} of job '{job.job_id}' has other bytes")
    if len(known) > MAX_CHECKPOINTS:
        raise Refused("too-many-requests", f"a job keeps at most {MAX_CHECKPOINTS} checkpoints")
    added = [one for one in known.values() if one not in job.checkpoints]
    checkpoints = tuple(known[step] for step in sorted(known))
    removed = _still_removed(job, added)
    told = tuple(
        new_event(
            context, "checkpoint", job_id=job.job_id, step=one.step, size_bytes=one.size_bytes
        )
        for one in added
    )
    changed = updated(state, job, context, checkpoints=checkpoints, removed=removed)
    changed, forgotten = make_room(changed, context)
    return Change(changed, (*forgotten, *events, *told), job.job_id)


HANDLERS: Final[Handlers] = {
    c.BeginCheckpoint: _begin_checkpoint,
    c.CommitCheckpoint: _commit_checkpoint,
    c.AbandonCheckpoint: _abandon_checkpoint,
    c.MarkCheckpointCorrupt: _mark_checkpoint_corrupt,
    c.RequestCheckpoint: _request_checkpoint,
    c.RetireCheckpoints: _retire_checkpoints,
    c.RemoveCheckpoint: _remove_checkpoint,
    c.ImportCheckpoints: _import_checkpoints,
}
