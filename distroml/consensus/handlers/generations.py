"""Generations of ranks are formed, train, change, fail and end with their run; each failure leaves an incident."""

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
    moved,
    new_event,
    updated,
)
from distroml.consensus.state import MAX_INCIDENTS, ClusterState
from distroml.model import (
    ASSIGNED,
    BLAMELESS,
    TERMINAL,
    Incident,
    Job,
    JobStatus,
    Member,
    NodeStatus,
)

S = JobStatus
_TRAINING = (S.RUNNING, S.CHECKPOINTING)


def _form_generation(state: ClusterState, context: Context, command: c.FormGeneration) -> Change:
    generation = command.generation
    before = generation.number - 1
    if generation.planned:
        return _plan_generation(state, context, command)
    job = current_job(state, command.job_id, before, S.QUEUED, S.RECOVERING)
    _check_members(state, job, generation.members)
    newest = job.steps_in(job.origin())
    if generation.resume_step < newest:
        raise Refused("conflict", f"step {newest} was committed since this was decided")
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


def _plan_generation(state: ClusterState, context: Context, command: c.FormGeneration) -> Change:
    """The ranks change over by themselves; until then the job is what it was."""
    generation = command.generation
    job = current_job(state, command.job_id, generation.number - 1, *_TRAINING)
    if job.at_work is not None and job.at_work.vacated:
        raise Refused("wrong-status", f"the ranks of job '{job.job_id}' are about to end")
    if job.status is S.CHECKPOINTING and job.outgoing is None:
        raise Refused("wrong-status", f"job '{job.job_id}' is saving a checkpoint")
    _check_members(state, job, generation.members)
    event = new_event(
        context,
        "state",
        job_id=job.job_id,
        status=job.status.value,
        reason=generation.reason,
        generation=generation.number,
    )
    changed = updated(
        state,
        job,
        context,
        generation=generation,
        outgoing=job.at_work,
        reason=generation.reason,
    )
    return Change(changed, (event,), job.job_id)


def _check_members(state: ClusterState, job: Job, members: Iterable[Member]) -> None:
    """The last line of defence: a slot is never given twice, a gone node never gets a rank.

    A rank may stay on a node that is drained; no other may come there. Of a job that recovers from a failure, also
    one that a planned change had been about to move.
    """
    used = state.slots_used(but_for=job.job_id)
    present = [one for one in (job.generation, job.outgoing) if one is not None]
    staying = {member.node for one in present for member in one.members}
    for member in members:
        node = state.nodes.get(member.node)
        if node is None or not node.holds(member):
            raise Refused("stale-node", f"node '{member.node}' has changed since it was chosen")
        was_there = member.node in staying or job.status is S.RECOVERING
        stays = was_there and node.status is NodeStatus.DRAINING
        if node.status is not NodeStatus.ALIVE and not stays:
            raise Refused("stale-node", f"node '{member.node}' is {node.status}")
        used[member.node] = used.get(member.node, 0) + 1
        if used[member.node] > node.slots:
            raise Refused("no-slot", f"node '{member.node}' has no free slot left")


def _place_spares(state: ClusterState, context: Context, command: c.PlaceSpares) -> Change:
    job = current_job(state, command.job_id, command.generation, *ASSIGNED)
    assert job.generation is not None  # its number was just compared with one that is >= 1
    for spare in command.spares:
        node = state.nodes.get(spare.node)
        if node is None or not node.holds(spare) or node.status is not NodeStatus.ALIVE:
            raise Refused("stale-node", f"node '{spare.node}' has changed since it was chosen")
    generation = replace(job.generation, spares=command.spares)
    return Change(updated(state, job, context, generation=generation), job_id=job.job_id)


def _vacate_generation(
    state: ClusterState, context: Context, command: c.VacateGeneration
) -> Change:
    job = current_job(state, command.job_id, command.generation, *_TRAINING)
    assert job.generation is not None  # its number was just compared with one that is >= 1
    if job.outgoing is not None:
        raise Refused("wrong-status", f"job '{job.job_id}' is about to change its ranks")
    event = new_event(
        context,
        "state",
        job_id=job.job_id,
        status=job.status.value,
        reason=command.reason,
        generation=command.generation,
    )
    generation = replace(job.generation, vacated=True)
    changed = updated(state, job, context, generation=generation, reason=command.reason)
    return Change(changed, (event,), job.job_id)


def _mark_running(state: ClusterState, context: Context, command: c.MarkRunning) -> Change:
    statuses = (S.STARTING, S.STOPPING, *_TRAINING)
    job = current_job(state, command.job_id, command.generation, *statuses)
    assert job.generation is not None  # its number was just compared with one that is >= 1
    if job.generation.running_at is not None:
        raise Refused("wrong-status", f"generation {command.generation} trains already")
    incidents = job.incidents
    if incidents and incidents[-1].next_generation == command.generation:
        recovered = replace(
            incidents[-1],
            recovered_at=context.at,
            left_at=command.left_at,
            met_at=command.met_at,
            restored_at=command.restored_at,
            source=command.source,
        )
        if command.resume_step is not None:
            recovered = replace(recovered, resume_step=command.resume_step)
        incidents = (*incidents[:-1], recovered)
    changes: dict[str, Any] = {
        "generation": replace(job.generation, running_at=context.at),
        "outgoing": None,
        "incidents": incidents,
        "total_steps": command.total_steps,
    }
    if job.status in (S.STOPPING, S.RUNNING):
        return Change(updated(state, job, context, **changes), job_id=job.job_id)
    workers = len(job.generation.members)
    reason = f"generation {command.generation}: {workers} worker{'s'[: workers != 1]} training"
    return moved(state, job, context, S.RUNNING, reason, **changes)


def _mark_stepped(state: ClusterState, context: Context, command: c.MarkStepped) -> Change:
    job = current_job(state, command.job_id, command.generation, *ASSIGNED)
    last = job.incidents[-1] if job.incidents else None
    if last is None or last.next_generation != command.generation:
        raise Refused("wrong-status", f"generation {command.generation} ends no incident")
    stepped = replace(last, first_step_at=command.stepped_at)
    incidents = (*job.incidents[:-1], stepped)
    event = new_event(
        context, "recovered", job_id=job.job_id, incident=last.number, phases_ms=stepped.phases_ms
    )
    return Change(updated(state, job, context, incidents=incidents), (event,), job.job_id)


def _fail_generation(state: ClusterState, context: Context, command: c.FailGeneration) -> Change:
    job = current_job(
        state, command.job_id, command.generation, S.STARTING, S.RUNNING, S.CHECKPOINTING
    )
    counted = command.cause.kind not in BLAMELESS
    strikes = 0 if job.made_progress(command.highest_step) else job.strikes
    return moved(
        state,
        job,
        context,
        S.RECOVERING,
        command.reason,
        outgoing=None,
        restarts=job.restarts + counted,
        strikes=strikes + counted,
        first_strike=(job.first_strike if strikes else "") or (command.reason if counted else ""),
        highest_step=max(job.highest_step, command.highest_step),
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
        outgoing=None,
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
        culprits=failure.culprits,
        observed_at=failure.observed_at,
        decided_at=context.at,
        highest_step=failure.highest_step,
    )
    return (*job.incidents, incident)[-MAX_INCIDENTS:]


HANDLERS: Final[Handlers] = {
    c.FormGeneration: _form_generation,
    c.PlaceSpares: _place_spares,
    c.VacateGeneration: _vacate_generation,
    c.MarkRunning: _mark_running,
    c.MarkStepped: _mark_stepped,
    c.FailGeneration: _fail_generation,
    c.FinishRun: _finish_run,
}
