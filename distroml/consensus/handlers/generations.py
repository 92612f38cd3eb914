"""Generations of ranks are formed, train, fail and end with their run; each failure leaves an incident."""

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
    moved,
    updated,
)
from distroml.consensus.state import MAX_INCIDENTS, ClusterState
from distroml.model import ASSIGNED, BLAMELESS, TERMINAL, Incident, Job, JobStatus, NodeStatus

S = JobStatus


def _form_generation(state: ClusterState, context: Context, command: c.FormGeneration) -> Change:
    generation = command.generation
    job = current_job(state, command.job_id, generation.number - 1, S.QUEUED, S.RECOVERING)
    _check_members(state, command)
    incidents = job.incidents
    if incidents and incidents[-1].next_generation is None:
        recovering = replace(
            incidents[-1],
            next_generation=generation.number,
            formed_at=context.at,
            resume_step=generation.resume_step,
        )
        incidents = (*incidents[:-1], recovering)
    return moved(
        state,
        job,
        context,
        S.STARTING,
        generation.reason,
        generation=generation,
        incidents=incidents,
        started_at=job.started_at if job.started_at is not None else context.at,
    )


def _check_members(state: ClusterState, command: c.FormGeneration) -> None:
    """The last line of defence: a slot is never given twice, a dead node never gets a rank."""
    used = state.slots_used(but_for=command.job_id)
    for member in command.generation.members:
        node = state.nodes.get(member.node)
        if node is None or node.incarnation != member.incarnation:
            raise Refused("stale-node", f"node '{member.node}' has changed since it was chosen")
        if node.status is not NodeStatus.ALIVE:
            raise Refused("stale-node", f"node '{member.node}' is {node.status}")
        used[member.node] = used.get(member.node, 0) + 1
        if used[member.node] > node.slots:
            raise Refused("no-slot", f"node '{member.node}' has no free slot left")


def _mark_running(state: ClusterState, context: Context, command: c.MarkRunning) -> Change:
    job = current_job(state, command.job_id, command.generation, S.STARTING, S.STOPPING)
    assert job.generation is not None  # its number was just compared with one that is >= 1
    incidents = job.incidents
    if incidents and incidents[-1].recovered_at is None:
        incidents = (*incidents[:-1], replace(incidents[-1], recovered_at=context.at))
    changes: dict[str, Any] = {
        "generation": replace(job.generation, running_at=context.at),
        "incidents": incidents,
        "total_steps": command.total_steps,
    }
    if job.status is S.STOPPING:
        return Change(updated(state, job, context, **changes), job_id=job.job_id)
    workers = len(job.generation.members)
    reason = f"generation {command.generation}: {workers} worker{'s'[: workers != 1]} training"
    return moved(state, job, context, S.RUNNING, reason, **changes)


def _fail_generation(state: ClusterState, context: Context, command: c.FailGeneration) -> Change:
    job = current_job(
        state, command.job_id, command.generation, S.STARTING, S.RUNNING, S.CHECKPOINTING
    )
    counted = command.cause.kind not in BLAMELESS
    return moved(
        state,
        job,
        context,
        S.RECOVERING,
        command.reason,
        restarts=job.restarts + counted,
        backoff_s=command.backoff_s,
        incidents=_with_incident(job, context, command, command.reason),
    )


def _finish_run(state: ClusterState, context: Context, command: c.FinishRun) -> Change:
    job = current_job(
        state, command.job_id, command.generation, *(ASSIGNED | {S.QUEUED, S.RECOVERING})
    )
    if command.status not in TERMINAL:
        raise Refused("wrong-status", f"{command.status} does not end a run")
    result = command.result
    if result is not None and job.started_at is not None:
        result = replace(result, duration_s=round(context.at - job.started_at, 3))
    return moved(
        state,
        job,
        context,
        command.status,
        command.reason,
        result=result,
        incidents=_with_incident(job, context, command, command.reason),
    )


def _with_incident(
    job: Job, context: Context, failure: c.Failure, reason: str
) -> tuple[Incident, ...]:
    if failure.cause is None:
        return job.incidents
    incident = Incident(
        number=job.incidents[-1].number + 1 if job.incidents else 1,
        generation=job.generation_number,
        reason=reason,
        cause=failure.cause,
        collateral=failure.collateral,
        observed_at=failure.observed_at,
        decided_at=context.at,
        highest_step=failure.highest_step,
    )
    return (*job.incidents, incident)[-MAX_INCIDENTS:]


HANDLERS: Final[Handlers] = {
    c.FormGeneration: _form_generation,
    c.MarkRunning: _mark_running,
    c.FailGeneration: _fail_generation,
    c.FinishRun: _finish_run,
}
