"""What handlers are given and give back, and the small steps that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from distroml.consensus.state import ClusterState
from distroml.model import TERMINAL, TRANSITIONS, Event, Job, JobStatus


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


def current_job(state: ClusterState, job_id: str, generation: int, *statuses: JobStatus) -> Job:
    """The job, if ``generation`` is its newest and it stands in one of ``statuses``. Raises Refused otherwise."""
    job = find_job(state, job_id)
    if job.generation_number != generation:
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
    return _with_job(state, stamped)


def moved(
    state: ClusterState, job: Job, context: Context, status: JobStatus, reason: str, **changes: Any
) -> Change:
    """The job in its next status, with the event that tells of it. Raises Refused where there is no such way."""
    if status not in TRANSITIONS[job.status]:
        raise Refused("wrong-status", f"job '{job.job_id}' is {job.status}, cannot be {status}")
    if status in TERMINAL:
        changes.setdefault("finished_at", context.at)
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
    return Change(state, (event,), job.job_id)


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
