"""What an incident was, as a trace: one span for the recovery and one for each of its phases. Pure.

An incident *closes* when all ranks of the next generation have completed a step, when that generation fails too, or
when the run ends. ``IncidentWatch`` sees it close in the replicated log. Each node applies every entry, so the node that
*proposed* the closing one makes the trace: one entry has one proposer, whoever leads by then, and a restarted node has
another incarnation. So a trace is made at most once, and lost only with the node that was about to make it. Its ids
follow from the run and the incident's number: should two nodes ever make the same trace, it is the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from distroml.commands import Entry, Outcome
from distroml.consensus.state import ClusterState
from distroml.model import Event, Incident, Job, JobStatus

ROOT_NAME: Final = "recovery"
AttributeValue = str | int | float | bool | tuple[int, ...]


class Span(Struct, frozen=True):
    """Something that lasted; times are Unix seconds."""

    name: str
    span_id: int
    """64 bits."""
    began_at: float
    ended_at: float
    attributes: Mapping[str, AttributeValue] = {}


class IncidentTrace(Struct, frozen=True):
    """All spans of one incident."""

    trace_id: int
    """128 bits."""
    root: Span
    phases: tuple[Span, ...]
    error: str
    """Why the run did not recover; empty where it did, or where somebody ended it."""


class IncidentWatch:
    """A replica's listener that hands on each incident which an entry of this node closes.

    Args:
        state: the replicated state as of the entry that is told.
        closed: called with the trace, within the event loop's turn: must not block.
    """

    def __init__(
        self,
        node: str,
        incarnation: int,
        state: Callable[[], ClusterState],
        closed: Callable[[IncidentTrace], None],
    ) -> None:
        self._own = (node, incarnation)
        self._state, self._closed = state, closed
        self._seen = state()

    def on_applied(self, entry: Entry | None, outcome: Outcome, events: tuple[Event, ...]) -> None:
        """An entry was applied, or (None) a snapshot, which closes nothing."""
        before, self._seen = self._seen, self._state()
        if entry is None or (entry.proposer, entry.incarnation) != self._own:
            return
        job = self._seen.jobs.get(outcome.job_id or "")
        if job is None:
            return
        for incident in newly_closed(before.jobs.get(job.job_id), job):
            self._closed(trace_of(job, incident))


def newly_closed(before: Job | None, after: Job) -> list[Incident]:
    """Incidents that the change from ``before`` to ``after`` closed."""
    was = set(_closed_numbers(before)) if before is not None else set()
    now = _closed_numbers(after)
    return [one for one in after.incidents if one.number in now and one.number not in was]


def _closed_numbers(job: Job) -> list[int]:
    last = job.incidents[-1].number if job.incidents else 0
    return [
        one.number
        for one in job.incidents
        if one.first_step_at is not None or one.number != last or job.terminal
    ]


def trace_of(job: Job, incident: Incident) -> IncidentTrace:
    """The trace of a closed incident of ``job``."""
    ended = _ending(job, incident)
    phases = incident.phases
    ended_at = max([ended.at, incident.observed_at, *(end for _, end in phases.values())])
    root = _span(job, incident, ROOT_NAME, incident.observed_at, ended_at)
    attributes = _attributes(job, incident) | {"distroml.incident.outcome": ended.outcome}
    return IncidentTrace(
        trace_id=_id(16, job.run_id, incident.number),
        root=Span(root.name, root.span_id, root.began_at, root.ended_at, attributes),
        phases=tuple(_span(job, incident, name, *span) for name, span in phases.items()),
        error=ended.error,
    )


class _Ending(Struct, frozen=True):
    outcome: str
    at: float
    error: str = ""


def _ending(job: Job, incident: Incident) -> _Ending:
    """What closed it, and when."""
    if incident.first_step_at is not None:
        return _Ending("recovered", incident.first_step_at)
    later = [one for one in job.incidents if one.number > incident.number]
    if later:
        reason = f"incident {later[0].number} came before it was over: {later[0].reason}"
        return _Ending("failed_again", later[0].decided_at, reason)
    over_at = job.finished_at or incident.decided_at
    if job.status is JobStatus.FAILED:
        return _Ending("failed", over_at, job.reason)
    return _Ending(job.status.value.lower(), over_at)


def _attributes(job: Job, incident: Incident) -> dict[str, AttributeValue]:
    cause = incident.cause
    known: dict[str, AttributeValue | None] = {
        "distroml.job.id": job.job_id,
        "distroml.job.name": job.name,
        "distroml.run.id": job.run_id,
        "distroml.generation": incident.generation,
        "distroml.next_generation": incident.next_generation,
        "distroml.incident.number": incident.number,
        "distroml.incident.reason": incident.reason,
        "distroml.steps_lost": incident.steps_lost,
        "distroml.resume_step": incident.resume_step,
        "distroml.state_source": incident.source or None,
        "distroml.collateral_ranks": incident.collateral,
        "distroml.cause.kind": cause.kind.value,
        "distroml.cause.rank": cause.rank,
        "distroml.cause.node": cause.node,
        "distroml.cause.signal": cause.signal,
        "distroml.cause.exit_code": cause.exit_code,
        "distroml.cause.error": cause.error,
    }
    return {name: value for name, value in known.items() if value is not None}


def _span(job: Job, incident: Incident, name: str, began_at: float, ended_at: float) -> Span:
    return Span(name, _id(8, job.run_id, incident.number, name), began_at, ended_at)


def _id(size_bytes: int, *of: object) -> int:
    """Never 0, which OpenTelemetry takes for no id."""
    digest = hashlib.sha256("/".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest[:size_bytes], "big") or 1
