"""The state machine: ``apply(state, index, entry) -> Applied``, pure and total.

Runs on every node for every committed entry, in order. It never raises for a command: what cannot be done is an
``Outcome`` with an error, the same on every node, and leaves the jobs as they were. One function per command,
found in the ``_HANDLERS`` table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from distroml import commands as c
from distroml.commands import Entry, Outcome
from distroml.consensus.state import (
    MAX_CHECKPOINTS,
    MAX_INCIDENTS,
    MAX_JOBS,
    MAX_KEYS,
    MAX_NODES,
    MAX_OUTSTANDING,
    ClusterState,
    KeyRecord,
    ProposerRecord,
)
from distroml.errors import UNDECODABLE
from distroml.model import (
    ASSIGNED,
    BLAMELESS,
    TERMINAL,
    TRANSITIONS,
    CheckpointStatus,
    Event,
    Incident,
    Job,
    JobStatus,
    Node,
    NodeStatus,
)

S = JobStatus


class Applied(Struct, frozen=True):
    """What one entry led to."""

    state: ClusterState
    outcome: Outcome
    events: tuple[Event, ...] = ()


class _Refused(Exception):
    """A command that may not take effect; becomes an ``Outcome``, never leaves this module."""

    def __init__(self, slug: str, detail: str) -> None:
        super().__init__(detail)
        self.slug = slug
        self.detail = detail


class _Context(Struct, frozen=True):
    """Where and when: everything of the entry that handlers may read besides the command."""

    index: int
    at: float


class _Change(Struct, frozen=True):
    state: ClusterState
    events: tuple[Event, ...] = ()
    job_id: str | None = None


def apply(state: ClusterState, index: int, data: bytes) -> Applied:
    """Apply one committed log entry given as bytes (see ``commands.encode_entry``)."""
    try:
        entry = c.decode_entry(data)
    except UNDECODABLE as error:
        outcome = Outcome(index, "invalid-entry", f"entry {index} cannot be read: {error}")
        return Applied(_count(replace(state, index=index), outcome.error), outcome)
    return apply_entry(state, index, entry)


def apply_entry(state: ClusterState, index: int, entry: Entry) -> Applied:
    """Apply one decoded entry: at most once per (proposer, incarnation, sequence)."""
    state = replace(state, index=index)
    record = state.proposers.get(entry.proposer, ProposerRecord(entry.incarnation))
    if entry.incarnation < record.incarnation:
        outcome = Outcome(
            index,
            "stale-proposer",
            f"{entry.proposer} restarted (incarnation {record.incarnation}); a proposal of "
            f"incarnation {entry.incarnation} has no effect any more",
        )
        return Applied(_count(state, outcome.error), outcome)
    if entry.incarnation > record.incarnation:
        record = ProposerRecord(entry.incarnation)
    known = record.outcomes.get(entry.sequence)
    if known is not None:
        return Applied(state, known)
    if entry.sequence < record.settled:
        return Applied(state, Outcome(index, "stale-proposer", "this proposal was settled before"))
    applied = _once(state, index, entry)
    return replace(applied, state=_remember(applied.state, entry, record, applied.outcome))


def _once(state: ClusterState, index: int, entry: Entry) -> Applied:
    command = entry.command
    context = _Context(index, entry.at)
    try:
        replayed = _replayed(state, command)
        if replayed is not None:
            return Applied(state, replayed)
        change = _HANDLERS[type(command)](state, context, command)
    except _Refused as refusal:
        return Applied(_count(state, refusal.slug), Outcome(index, refusal.slug, refusal.detail))
    outcome = Outcome(index, job_id=change.job_id)
    return Applied(_keep_key(change.state, command, outcome), outcome, change.events)


# --- remembering what was done ---------------------------------------------------------------------------------


def _remember(
    state: ClusterState, entry: Entry, record: ProposerRecord, outcome: Outcome
) -> ClusterState:
    settled = max(record.settled, entry.settled)
    outcomes = {seq: kept for seq, kept in record.outcomes.items() if seq >= settled}
    outcomes[entry.sequence] = outcome
    while len(outcomes) > MAX_OUTSTANDING:
        oldest = min(outcomes)
        del outcomes[oldest]
        settled = oldest + 1
    updated = ProposerRecord(entry.incarnation, settled, outcomes)
    return replace(state, proposers={**state.proposers, entry.proposer: updated})


def _replayed(state: ClusterState, command: c.AnyCommand) -> Outcome | None:
    if not isinstance(command, c.Write) or command.key is None:
        return None
    record = state.keys.get(command.key)
    if record is None:
        return None
    if record.request_sha256 != command.request_sha256:
        raise _Refused(
            "idempotency-key-reused",
            f"Idempotency-Key '{command.key}' was used before with a different request; "
            "use a new key for a new request.",
        )
    return replace(record.outcome, replayed=True)


def _keep_key(state: ClusterState, command: c.AnyCommand, outcome: Outcome) -> ClusterState:
    if not isinstance(command, c.Write) or command.key is None:
        return state
    keys = {**state.keys, command.key: KeyRecord(command.request_sha256, outcome)}
    while len(keys) > MAX_KEYS:
        del keys[next(iter(keys))]
    return replace(state, keys=keys)


def _count(state: ClusterState, slug: str) -> ClusterState:
    return replace(state, refused={**state.refused, slug: state.refused.get(slug, 0) + 1})


# --- small steps that handlers share ---------------------------------------------------------------------------


def _job(state: ClusterState, job_id: str) -> Job:
    job = state.jobs.get(job_id)
    if job is None:
        raise _Refused("not-found", f"There is no job '{job_id}'.")
    return job


def _current(state: ClusterState, job_id: str, generation: int, *statuses: JobStatus) -> Job:
    """The job, if ``generation`` is its newest and it stands in one of ``statuses``."""
    job = _job(state, job_id)
    if job.generation_number != generation:
        raise _Refused(
            "stale-generation",
            f"job '{job_id}' is at generation {job.generation_number}, not {generation}",
        )
    if job.status not in statuses:
        raise _Refused("wrong-status", f"job '{job_id}' is {job.status}")
    return job


def _with_job(state: ClusterState, job: Job) -> ClusterState:
    return replace(state, jobs={**state.jobs, job.job_id: job})


def _updated(state: ClusterState, job: Job, context: _Context, **changes: Any) -> ClusterState:
    stamped = replace(job, changed_at=context.at, change_index=context.index, **changes)
    return _with_job(state, stamped)


def _moved(
    state: ClusterState, job: Job, context: _Context, status: JobStatus, reason: str, **changes: Any
) -> _Change:
    """The job in its next status, with the event that tells of it."""
    if status not in TRANSITIONS[job.status]:
        raise _Refused("wrong-status", f"job '{job.job_id}' is {job.status}, cannot be {status}")
    if status in TERMINAL:
        changes.setdefault("finished_at", context.at)
    generation = changes.get("generation", job.generation)
    event = _event(
        context,
        "state",
        job_id=job.job_id,
        status=status.value,
        reason=reason,
        generation=generation.number if generation else 0,
    )
    moved = _updated(state, job, context, status=status, reason=reason, **changes)
    return _Change(moved, (event,), job.job_id)


def _event(
    context: _Context,
    type_: str,
    *,
    job_id: str | None = None,
    node: str | None = None,
    **data: Any,
) -> Event:
    return Event(
        index=context.index, at=context.at, type=type_, job_id=job_id, node=node, data=data
    )


# --- nodes -----------------------------------------------------------------------------------------------------


def _register_node(state: ClusterState, context: _Context, command: c.RegisterNode) -> _Change:
    known = state.nodes.get(command.name)
    if known is not None and known.incarnation > command.incarnation:
        raise _Refused("stale-proposer", f"{command.name} has a newer incarnation")
    nodes, proposers = state.nodes, state.proposers
    if known is None and len(nodes) >= MAX_NODES:
        gone = _longest_gone(state)
        nodes = {name: node for name, node in nodes.items() if name != gone}
        proposers = {name: record for name, record in proposers.items() if name != gone}
    node = Node(
        name=command.name,
        incarnation=command.incarnation,
        http=command.http,
        slots=command.slots,
        reason=f"incarnation {command.incarnation} registered",
        registered_at=context.at,
        changed_at=context.at,
    )
    event = _event(context, "node", node=node.name, status=node.status.value, reason=node.reason)
    changed = replace(state, nodes={**nodes, node.name: node}, proposers=proposers)
    return _Change(changed, (event,))


def _longest_gone(state: ClusterState) -> str:
    """The node to forget: it is not alive, has no rank, and has been so for longest."""
    members = {
        member.node
        for job in state.active_jobs()
        if job.generation is not None
        for member in job.generation.members
    }
    gone = [
        node
        for node in state.nodes.values()
        if node.status is not NodeStatus.ALIVE and node.name not in members
    ]
    if not gone:
        raise _Refused(
            "too-many-requests",
            f"the cluster has {MAX_NODES} nodes, and none that is gone can be forgotten.",
        )
    return min(gone, key=lambda node: (node.changed_at, node.name)).name


def _set_node_status(state: ClusterState, context: _Context, command: c.SetNodeStatus) -> _Change:
    node = state.nodes.get(command.name)
    if node is None:
        raise _Refused("not-found", f"There is no node '{command.name}'.")
    if node.incarnation != command.incarnation:
        raise _Refused("stale-proposer", f"{command.name} is at incarnation {node.incarnation}")
    if node.status is command.status:
        return _Change(state)
    if node.status is NodeStatus.LEFT:
        # It said goodbye; what others thought of it before does not bring it back, only its next life does.
        raise _Refused("wrong-status", f"node '{command.name}' has left")
    changed = replace(node, status=command.status, reason=command.reason, changed_at=context.at)
    event = _event(
        context, "node", node=node.name, status=command.status.value, reason=command.reason
    )
    return _Change(replace(state, nodes={**state.nodes, node.name: changed}), (event,))


# --- what clients ask for --------------------------------------------------------------------------------------


def _submit_job(state: ClusterState, context: _Context, command: c.SubmitJob) -> _Change:
    if command.job_id in state.jobs:
        raise _Refused("conflict", f"job '{command.job_id}' exists already")
    removed = _oldest_finished_if_full(state.jobs)
    jobs = dict(state.jobs)  # with thousands of jobs much faster than a comprehension
    if removed is not None:
        del jobs[removed]
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
    )
    event = _event(
        context,
        "state",
        job_id=job.job_id,
        status=job.status.value,
        reason=job.reason,
        generation=0,
    )
    jobs[job.job_id] = job
    events = (_event(context, "removed", job_id=removed), event) if removed else (event,)
    return _Change(replace(state, jobs=jobs), events, job.job_id)


def _oldest_finished_if_full(jobs: dict[str, Job]) -> str | None:
    """Which job makes room for a new one; None while there is room."""
    if len(jobs) < MAX_JOBS:
        return None
    finished = [job for job in jobs.values() if job.status in TERMINAL]
    if not finished:
        raise _Refused(
            "too-many-requests", f"{MAX_JOBS} jobs are waiting or running; submit again later."
        )
    return min(finished, key=lambda job: job.change_index).job_id


def _cancel_job(state: ClusterState, context: _Context, command: c.CancelJob) -> _Change:
    job = _job(state, command.job_id)
    if job.status is S.CANCELLED:
        return _Change(state, job_id=job.job_id)
    if job.terminal:
        raise _Refused("conflict", f"Job '{job.job_id}' is {job.status}; it cannot be cancelled.")
    return _moved(state, job, context, S.CANCELLED, command.reason)


def _stop_job(state: ClusterState, context: _Context, command: c.StopJob) -> _Change:
    job = _job(state, command.job_id)
    if job.terminal:
        raise _Refused("conflict", f"Job '{job.job_id}' is {job.status}; it cannot be stopped.")
    if job.status is S.STOPPING:
        return _Change(state, job_id=job.job_id)
    if job.status is S.QUEUED:
        reason = "stopped before it started"
        return _moved(state, job, context, S.CANCELLED, reason, stop_requested=True)
    if job.status is S.RECOVERING:
        newest = job.newest_checkpoint()
        left = f"newest checkpoint is step {newest.step}" if newest else "it has no checkpoint"
        reason = f"stopped while recovering; {left}"
        return _moved(state, job, context, S.CANCELLED, reason, stop_requested=True)
    return _moved(state, job, context, S.STOPPING, command.reason, stop_requested=True)


def _remove_job(state: ClusterState, context: _Context, command: c.RemoveJob) -> _Change:
    job = _job(state, command.job_id)
    if not job.terminal:
        raise _Refused("conflict", f"Job '{job.job_id}' is {job.status}; cancel it first.")
    jobs = {job_id: kept for job_id, kept in state.jobs.items() if job_id != job.job_id}
    event = _event(context, "removed", job_id=job.job_id)
    return _Change(replace(state, jobs=jobs), (event,), job.job_id)


# --- generations -----------------------------------------------------------------------------------------------


def _form_generation(state: ClusterState, context: _Context, command: c.FormGeneration) -> _Change:
    generation = command.generation
    job = _current(state, command.job_id, generation.number - 1, S.QUEUED, S.RECOVERING)
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
    return _moved(
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
            raise _Refused("stale-node", f"node '{member.node}' has changed since it was chosen")
        if node.status is not NodeStatus.ALIVE:
            raise _Refused("stale-node", f"node '{member.node}' is {node.status}")
        used[member.node] = used.get(member.node, 0) + 1
        if used[member.node] > node.slots:
            raise _Refused("no-slot", f"node '{member.node}' has no free slot left")


def _mark_running(state: ClusterState, context: _Context, command: c.MarkRunning) -> _Change:
    job = _current(state, command.job_id, command.generation, S.STARTING, S.STOPPING)
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
        return _Change(_updated(state, job, context, **changes), job_id=job.job_id)
    workers = len(job.generation.members)
    reason = f"generation {command.generation}: {workers} worker{'s'[: workers != 1]} training"
    return _moved(state, job, context, S.RUNNING, reason, **changes)


def _fail_generation(state: ClusterState, context: _Context, command: c.FailGeneration) -> _Change:
    job = _current(
        state, command.job_id, command.generation, S.STARTING, S.RUNNING, S.CHECKPOINTING
    )
    counted = command.cause.kind not in BLAMELESS
    return _moved(
        state,
        job,
        context,
        S.RECOVERING,
        command.reason,
        restarts=job.restarts + counted,
        backoff_s=command.backoff_s,
        incidents=_with_incident(job, context, command, command.reason),
    )


def _with_incident(
    job: Job, context: _Context, failure: c.Failure, reason: str
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


# --- checkpoints -----------------------------------------------------------------------------------------------


def _begin_checkpoint(
    state: ClusterState, context: _Context, command: c.BeginCheckpoint
) -> _Change:
    job = _current(state, command.job_id, command.generation, S.RUNNING)
    return _moved(state, job, context, S.CHECKPOINTING, f"saving checkpoint of step {command.step}")


def _commit_checkpoint(
    state: ClusterState, context: _Context, command: c.CommitCheckpoint
) -> _Change:
    # A RECOVERING job's last generation may still commit what was whole before it failed.
    job = _current(state, command.job_id, command.generation, *ASSIGNED, S.RECOVERING)
    new = replace(command.checkpoint, committed_at=context.at)
    known = next((one for one in job.checkpoints if one.step == new.step), None)
    if known is not None and known.status is CheckpointStatus.COMMITTED:
        if known.manifest_sha256 == new.manifest_sha256:
            return _Change(state, job_id=job.job_id)
        raise _Refused("conflict", f"step {new.step} is committed already, with other bytes")
    kept = [one for one in job.checkpoints if one.step != new.step]
    checkpoints = tuple(sorted([*kept, new], key=lambda one: one.step))[-MAX_CHECKPOINTS:]
    event = _event(
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
    state: ClusterState, context: _Context, command: c.AbandonCheckpoint
) -> _Change:
    job = _current(state, command.job_id, command.generation, *ASSIGNED, S.RECOVERING)
    event = _event(
        context, "checkpoint_abandoned", job_id=job.job_id, step=command.step, reason=command.reason
    )
    reason = f"checkpoint of step {command.step} abandoned: {command.reason}"
    return _back_to_running(state, job, context, reason, event)


def _back_to_running(
    state: ClusterState, job: Job, context: _Context, reason: str, event: Event, **changes: Any
) -> _Change:
    if job.status is not S.CHECKPOINTING:
        return _Change(_updated(state, job, context, **changes), (event,), job.job_id)
    change = _moved(state, job, context, S.RUNNING, reason, **changes)
    return replace(change, events=(event, *change.events))


def _mark_checkpoint_corrupt(
    state: ClusterState, context: _Context, command: c.MarkCheckpointCorrupt
) -> _Change:
    job = _job(state, command.job_id)
    marked = tuple(
        replace(one, status=CheckpointStatus.CORRUPT, reason=command.reason)
        if one.step == command.step and one.manifest_sha256 == command.manifest_sha256
        else one
        for one in job.checkpoints
    )
    if marked == job.checkpoints:
        raise _Refused("not-found", f"job '{job.job_id}' has no such checkpoint")
    event = _event(
        context, "checkpoint_corrupt", job_id=job.job_id, step=command.step, reason=command.reason
    )
    return _Change(_updated(state, job, context, checkpoints=marked), (event,), job.job_id)


def _finish_run(state: ClusterState, context: _Context, command: c.FinishRun) -> _Change:
    job = _current(
        state, command.job_id, command.generation, *(ASSIGNED | {S.QUEUED, S.RECOVERING})
    )
    if command.status not in TERMINAL:
        raise _Refused("wrong-status", f"{command.status} does not end a run")
    result = command.result
    if result is not None and job.started_at is not None:
        result = replace(result, duration_s=round(context.at - job.started_at, 3))
    return _moved(
        state,
        job,
        context,
        command.status,
        command.reason,
        result=result,
        incidents=_with_incident(job, context, command, command.reason),
    )


_HANDLERS: Final[dict[type, Callable[[ClusterState, _Context, Any], _Change]]] = {
    c.RegisterNode: _register_node,
    c.SetNodeStatus: _set_node_status,
    c.SubmitJob: _submit_job,
    c.CancelJob: _cancel_job,
    c.StopJob: _stop_job,
    c.RemoveJob: _remove_job,
    c.FormGeneration: _form_generation,
    c.MarkRunning: _mark_running,
    c.FailGeneration: _fail_generation,
    c.BeginCheckpoint: _begin_checkpoint,
    c.CommitCheckpoint: _commit_checkpoint,
    c.AbandonCheckpoint: _abandon_checkpoint,
    c.MarkCheckpointCorrupt: _mark_checkpoint_corrupt,
    c.FinishRun: _finish_run,
}
