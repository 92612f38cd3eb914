"""What handlers are given and give back, and the small steps that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from distroml.consensus.state import MAX_ENDED_BYTES, MAX_ENDED_INCIDENTS, ClusterState
from distroml.model import TERMINAL, TRANSITIONS, Event, Incident, Job, JobStatus


class Refused(Exception):
    """A command that may not take effect; becomes an ``Outcome``, never leaves the state machine."""

    def __init__(self, slug: str, detail: str) -> None:
        super().__init__(detail)
        self.slug = slug
        self.detail = detail


class Context(Struct, frozen=True):
    """Where and when: everything of the entry that handlers may read besides the command."""

    index: int
    at: float


class Change(Struct, frozen=True):
    """What a command did to the state."""

    state: ClusterState
    events: tuple[Event, ...] = ()
    job_id: str | None = None


Handlers = dict[type, Callable[[ClusterState, Context, Any], Change]]
"""The function of each command. It raises ``Refused`` for what cannot be done, and nothing else."""


def find_job(state: ClusterState, job_id: str) -> Job:
    """The job. Raises Refused where there is none."""
    job = state.jobs.get(job_id)
    if job is None:
        raise Refused("not-found", f"There is no job '{job_id}'.")
    return job


def current_job(
    state: ClusterState, job_id: str, generation: int, *statuses: JobStatus, outgoing: bool = False
) -> Job:
    """The job, if ``generation`` is its newest and it stands in one of ``statuses``. Raises Refused otherwise.

    With ``outgoing`` the generation that a planned change has yet to relieve will do as well.
    """
    job = find_job(state, job_id)
    relieved = job.outgoing.number if outgoing and job.outgoing else None
    if generation not in (job.generation_number, relieved):
        raise Refused(
            "stale-generation",
            f"job '{job_id}' is at generation {job.generation_number}, not {generation}",
        )
    if job.status not in statuses:
        raise Refused("wrong-status", f"job '{job_id}' is {job.status}")
    return job


def _with_job(state: ClusterState, job: Job) -> ClusterState:
    return replace(state, jobs={**state.jobs, job.job_id: job})


def updated(state: ClusterState, job: Job, context: Context, **changes: Any) -> ClusterState:
    """The state with a changed job in it, which is stamped with when and where."""
    stamped = replace(job, changed_at=context.at, change_index=context.index, **changes)
    if stamped.terminal:
        size_bytes = len(msgspec.msgpack.encode(replace(stamped, size_bytes=0)))
        stamped = replace(stamped, size_bytes=size_bytes)
    return _with_job(state, stamped)


def make_room(state: ClusterState, context: Context) -> tuple[ClusterState, tuple[Event, ...]]:
    """The state without the oldest of the ended jobs where they take more than ``MAX_ENDED_BYTES``, and what to tell."""
    over_bytes = sum(job.size_bytes for job in state.jobs.values()) - MAX_ENDED_BYTES
    if over_bytes <= 0:
        return state, ()
    jobs, events = dict(state.jobs), []
    ended = [job for job in state.jobs.values() if job.terminal]
    for job in sorted(ended, key=lambda job: job.change_index):
        if over_bytes <= 0:
            break
        over_bytes -= job.size_bytes
        del jobs[job.job_id]
        events.append(new_event(context, "removed", job_id=job.job_id))
    return replace(state, jobs=jobs), tuple(events)


def _of_ended(incidents: tuple[Incident, ...]) -> tuple[Incident, ...]:
    """What is kept of a job's incidents when it ends: the first and the last ones, and of what processes said there
    the first and the last."""
    if len(incidents) > MAX_ENDED_INCIDENTS:
        incidents = (incidents[0], *incidents[1 - MAX_ENDED_INCIDENTS :])
    said = [one.number for one in incidents if one.cause.traceback or one.cause.last_lines]
    ends = {*said[:1], *said[-1:]}
    return tuple(
        one
        if one.number in ends
        else replace(one, cause=replace(one.cause, traceback=None, last_lines=()))
        for one in incidents
    )


def moved(
    state: ClusterState, job: Job, context: Context, status: JobStatus, reason: str, **changes: Any
) -> Change:
    """The job in its next status, with the event that tells of it. Raises Refused where there is no such way."""
    if status not in TRANSITIONS[job.status]:
        raise Refused("wrong-status", f"job '{job.job_id}' is {job.status}, cannot be {status}")
    if status in TERMINAL:
        changes.setdefault("finished_at", context.at)
        changes["incidents"] = _of_ended(changes.get("incidents", job.incidents))
    generation = changes.get("generation", job.generation)
    event = new_event(
        context,
        "state",
        job_id=job.job_id,
        status=status.value,
        reason=reason,
        generation=generation.number if generation else 0,
    )
    state = updated(state, job, context, status=status, reason=reason, **changes)
    state, removed = make_room(state, context) if status in TERMINAL else (state, ())
    return Change(state, (*removed, event), job.job_id)


def new_event(
    context: Context,
    type_: str,
    *,
    job_id: str | None = None,
    node: str | None = None,
    **data: Any,
) -> Event:
    """What the entry tells to those who follow the cluster; ``data`` depends on ``type_``."""
    return Event(
        index=context.index, at=context.at, type=type_, job_id=job_id, node=node, data=data
    )
