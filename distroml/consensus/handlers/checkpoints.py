"""A checkpoint is begun and then committed or abandoned; a committed one may turn out to be corrupt."""

from __future__ import annotations

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
    moved,
    new_event,
    updated,
)
from distroml.consensus.state import MAX_CHECKPOINTS, ClusterState
from distroml.model import ASSIGNED, CheckpointStatus, Event, Job, JobStatus

S = JobStatus


def _begin_checkpoint(state: ClusterState, context: Context, command: c.BeginCheckpoint) -> Change:
    job = current_job(state, command.job_id, command.generation, S.RUNNING)
    return moved(state, job, context, S.CHECKPOINTING, f"saving checkpoint of step {command.step}")


def _commit_checkpoint(
    state: ClusterState, context: Context, command: c.CommitCheckpoint
) -> Change:
    # A RECOVERING job's last generation may still commit what was whole before it failed.
    job = current_job(state, command.job_id, command.generation, *ASSIGNED, S.RECOVERING)
    new = replace(command.checkpoint, committed_at=context.at)
    known = next((one for one in job.checkpoints if one.step == new.step), None)
    if known is not None and known.status is CheckpointStatus.COMMITTED:
        if known.manifest_sha256 == new.manifest_sha256:
            return Change(state, job_id=job.job_id)
        raise Refused("conflict", f"step {new.step} is committed already, with other bytes")
    kept = [one for one in job.checkpoints if one.step != new.step]
    checkpoints = tuple(sorted([*kept, new], key=lambda one: one.step))[-MAX_CHECKPOINTS:]
    event = new_event(
        context, "checkpoint", job_id=job.job_id, step=new.step, size_bytes=new.size_bytes
    )
    return _back_to_running(
        state,
        job,
        context,
        f"checkpoint of step {new.step} committed",
        event,
        checkpoints=checkpoints,
    )


def _abandon_checkpoint(
    state: ClusterState, context: Context, command: c.AbandonCheckpoint
) -> Change:
    job = current_job(state, command.job_id, command.generation, *ASSIGNED, S.RECOVERING)
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
    if marked == job.checkpoints:
        raise Refused("not-found", f"job '{job.job_id}' has no such checkpoint")
    event = new_event(
        context, "checkpoint_corrupt", job_id=job.job_id, step=command.step, reason=command.reason
    )
    return Change(updated(state, job, context, checkpoints=marked), (event,), job.job_id)


HANDLERS: Final[Handlers] = {
    c.BeginCheckpoint: _begin_checkpoint,
    c.CommitCheckpoint: _commit_checkpoint,
    c.AbandonCheckpoint: _abandon_checkpoint,
    c.MarkCheckpointCorrupt: _mark_checkpoint_corrupt,
}
