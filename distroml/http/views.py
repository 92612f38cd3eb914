"""What the API shows of jobs: replicated state and observed facts in, JSON shapes out. Pure.

Position and workers come from the reports of the current generation; where there are none (queued, between
generations, finished) from the result or the newest committed checkpoint. Times are RFC 3339 strings in UTC with
milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated

from msgspec import Meta, Struct

from distroml.http.services import ObservedNode
from distroml.model import ASSIGNED, Cause, Generation, Incident, Job, JobStatus, Member
from distroml.reports import StepTiming, WorkerFact
from distroml.spec import JobSpec

Timestamp = Annotated[
    str, Meta(description="RFC 3339, UTC, milliseconds", examples=["2026-01-31T12:00:00.250Z"])
]
PENDING = "PENDING"

WorkerKey = tuple[str, int, int, str]
"""(job id, generation, rank, node)"""
Facts = Mapping[WorkerKey, WorkerFact]


class WorkerView(Struct, frozen=True, kw_only=True):
    """One rank of the current generation."""

    rank: int
    node: str
    pid: int | None
    phase: Annotated[
        str, Meta(description="a WorkerPhase, or PENDING: assigned and not yet reported")
    ]
    step: Annotated[int, Meta(description="steps completed, earlier generations included")]
    worker: Annotated[
        int | None, Meta(description="names the process on its node; it outlives generations")
    ] = None
    timing: Annotated[
        StepTiming | None, Meta(description="where its time goes; null until it has trained")
    ] = None


class GenerationView(Struct, frozen=True, kw_only=True):
    """The fixed set of ranks a run has now."""

    number: int
    reason: str
    formed_at: Timestamp
    running_at: Timestamp | None
    resume_step: int
    checkpoint_step: Annotated[
        int | None, Meta(description="what ranks read if none has a state; null: from scratch")
    ]
    world_size: Annotated[int, Meta(description="number of ranks")] = 0
    planned: Annotated[
        bool, Meta(description="not because of a failure: its ranks change over after a whole step")
    ] = False
    joining: Annotated[
        list[int], Meta(description="ranks that had no part in the generation before")
    ] = []
    spares: Annotated[list[str], Meta(description="nodes of its prepared processes")] = []


class CheckpointSummary(Struct, frozen=True, kw_only=True):
    """Committed checkpoints in short."""

    count: int
    newest_step: int | None


class ResultView(Struct, frozen=True, kw_only=True):
    """What a finished run left behind."""

    state_digest: Annotated[
        str, Meta(description="SHA-256 over the final model and optimizer tensors in name order")
    ]
    sample_digest: Annotated[
        str, Meta(description="rolling SHA-256 over the sample ids that each step consumed")
    ]
    step: int
    epoch: int
    metrics: dict[str, float]
    checkpoint_step: int | None
    duration_s: float


class JobView(Struct, frozen=True, kw_only=True):
    """A job with its run as it stands."""

    job_id: str
    run_id: str
    name: str
    status: JobStatus
    reason: Annotated[str, Meta(description="why it has this status, for people")]
    generation: Annotated[int, Meta(description="0 before the first is formed")]
    restarts: int
    step: Annotated[int, Meta(description="steps completed")]
    total_steps: Annotated[int | None, Meta(description="null until the workers know it")]
    epoch: int
    eta_s: Annotated[float | None, Meta(description="estimate from this generation's pace")]
    created_at: Timestamp
    changed_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    stop_requested: bool
    workers: list[WorkerView]
    current_generation: GenerationView | None
    checkpoints: CheckpointSummary
    incidents: Annotated[int, Meta(description="number of failures so far")]
    metrics: Annotated[dict[str, float], Meta(description="newest value of each metric")]
    result: ResultView | None
    spec: JobSpec


class JobList(Struct, frozen=True):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    next_cursor: Annotated[str | None, Meta(description="null on the last page")]


class IncidentView(Struct, frozen=True, kw_only=True):
    """A failure and the recovery from it."""

    number: int
    generation: Annotated[int, Meta(description="the one that failed")]
    next_generation: int | None
    reason: str
    cause: Cause
    collateral: list[int]
    observed_at: Timestamp
    decided_at: Timestamp
    formed_at: Timestamp | None
    recovered_at: Timestamp | None
    first_step_at: Timestamp | None
    highest_step: int
    resume_step: int | None
    steps_lost: Annotated[
        int | None, Meta(description="completed steps done again; null until a generation resumed")
    ]
    source: Annotated[str, Meta(description="where the state came from; empty until it is known")]
    phases_ms: Annotated[
        dict[str, float],
        Meta(
            description="milliseconds of each finished phase: detect, decide, abort, rendezvous, "
            "restore, first_step; and their total"
        ),
    ]


class IncidentList(Struct, frozen=True):
    job_id: str
    incidents: list[IncidentView]


def timestamp(at: float) -> str:
    """Unix seconds as RFC 3339 in UTC with milliseconds."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def facts_of(observed: Mapping[str, ObservedNode]) -> Facts:
    """All worker facts by (job, generation, rank, node)."""
    return {
        (fact.job_id, fact.generation, fact.rank, name): fact
        for name, node in observed.items()
        for fact in node.report.workers
    }


def job_view(job: Job, facts: Facts, metrics: Mapping[str, float], now: float) -> JobView:
    """The full body of one job.

    Args:
        facts: see ``facts_of``.
        metrics: newest values; the result's take their place once there is one.
        now: Unix seconds.
    """
    mine = _facts_of_job(job, facts)
    step, epoch = _position(job, mine)
    total = job.total_steps or next((f.total_steps for f in mine if f.total_steps), None)
    newest = job.newest_checkpoint()
    return JobView(
        job_id=job.job_id,
        run_id=job.run_id,
        name=job.name,
        status=job.status,
        reason=job.reason,
        generation=job.generation_number,
        restarts=job.restarts,
        step=step,
        total_steps=total,
        epoch=epoch,
        eta_s=_eta_s(job, step, total, now),
        created_at=timestamp(job.created_at),
        changed_at=timestamp(job.changed_at),
        started_at=_maybe(job.started_at),
        finished_at=_maybe(job.finished_at),
        stop_requested=job.stop_requested,
        workers=_workers(job, facts),
        current_generation=_generation_view(job.generation),
        checkpoints=CheckpointSummary(
            count=len(job.checkpoints), newest_step=newest.step if newest else None
        ),
        incidents=job.failures,
        metrics={**metrics, **(job.result.metrics if job.result else {})},
        result=_result_view(job),
        spec=job.spec,
    )


def step_of(job: Job, facts: Facts) -> int:
    """Steps completed, as ``JobView.step``."""
    return _position(job, _facts_of_job(job, facts))[0]


def incident_view(one: Incident) -> IncidentView:
    """One failure with its recovery so far."""
    return IncidentView(
        number=one.number,
        generation=one.generation,
        next_generation=one.next_generation,
        reason=one.reason,
        cause=one.cause,
        collateral=list(one.collateral),
        observed_at=timestamp(one.observed_at),
        decided_at=timestamp(one.decided_at),
        formed_at=_maybe(one.formed_at),
        recovered_at=_maybe(one.recovered_at),
        first_step_at=_maybe(one.first_step_at),
        highest_step=one.highest_step,
        resume_step=one.resume_step,
        steps_lost=one.steps_lost,
        source=one.source,
        phases_ms=one.phases_ms,
    )


def _facts_of_job(job: Job, facts: Facts) -> list[WorkerFact]:
    generation = job.at_work
    members = generation.members if generation else ()
    return [fact for m in members if (fact := _fact_of(job, m, facts)) is not None]


def _fact_of(job: Job, member: Member, facts: Facts) -> WorkerFact | None:
    """What is known of a rank, in the newest generation that it has come to."""
    for generation in (job.generation, job.outgoing):
        if generation is not None:
            fact = facts.get((job.job_id, generation.number, member.rank, member.node))
            if fact is not None:
                return fact
    return None


def _position(job: Job, mine: list[WorkerFact]) -> tuple[int, int]:
    """(steps completed, epoch)."""
    if job.result is not None:
        return job.result.step, job.result.epoch
    newest = job.origin()
    places = [(fact.step, fact.epoch) for fact in mine]
    if newest is not None and (steps := job.steps_in(newest)):
        places.append((steps, newest.epoch))
    return max(places, default=(0, 0))


def _workers(job: Job, facts: Facts) -> list[WorkerView]:
    generation = job.at_work
    if generation is None or job.terminal:
        return []
    views = []
    for member in generation.members:
        fact = _fact_of(job, member, facts)
        views.append(
            WorkerView(
                rank=member.rank,
                node=member.node,
                pid=fact.pid if fact else None,
                phase=fact.phase.value if fact else PENDING,
                step=fact.step if fact else generation.resume_step,
                worker=fact.worker if fact else None,
                timing=fact.timing if fact else None,
            )
        )
    return views


def _eta_s(job: Job, step: int, total: int | None, now: float) -> float | None:
    generation = job.generation
    if job.status not in ASSIGNED or generation is None or generation.running_at is None:
        return None
    done = step - generation.resume_step
    if total is None or done <= 0:
        return None
    pace_s = max(0.0, now - generation.running_at) / done
    return round(max(0, total - step) * pace_s, 1)


def _generation_view(one: Generation | None) -> GenerationView | None:
    if one is None:
        return None
    return GenerationView(
        number=one.number,
        reason=one.reason,
        formed_at=timestamp(one.formed_at),
        running_at=_maybe(one.running_at),
        resume_step=one.resume_step,
        checkpoint_step=one.checkpoint_step,
        world_size=len(one.members),
        planned=one.planned,
        joining=list(one.joining),
        spares=[spare.node for spare in one.spares],
    )


def _result_view(job: Job) -> ResultView | None:
    one = job.result
    if one is None:
        return None
    return ResultView(
        state_digest=one.state_digest,
        sample_digest=one.sample_digest,
        step=one.step,
        epoch=one.epoch,
        metrics=one.metrics,
        checkpoint_step=one.checkpoint_step,
        duration_s=one.duration_s,
    )


def _maybe(at: float | None) -> str | None:
    return None if at is None else timestamp(at)
