"""The nouns of DistroML: jobs, generations, nodes, checkpoints, incidents, and their states.

These frozen records are what the log replicates and the API shows. They hold facts and decisions, no
behaviour beyond small derived properties; ``consensus.machine`` is the only place that makes new
versions of them. They cannot form cycles, so the garbage collector need not look at them (``gc=False``): with
thousands of jobs a full collection would otherwise stand still for longer than an election timeout. Times are Unix seconds, taken where a command was proposed (never read on apply).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from msgspec import Struct

from distroml.spec import JobSpec


class JobStatus(StrEnum):
    """Where a job stands; ``TRANSITIONS`` says what may follow what."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    CHECKPOINTING = "CHECKPOINTING"
    RECOVERING = "RECOVERING"
    STOPPING = "STOPPING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


_S = JobStatus
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.QUEUED: frozenset({_S.STARTING, _S.FAILED, _S.CANCELLED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.RECOVERING, _S.STOPPING, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset(
        {_S.CHECKPOINTING, _S.RECOVERING, _S.STOPPING, _S.COMPLETED, _S.FAILED, _S.CANCELLED}
    ),
    _S.CHECKPOINTING: frozenset(
        {_S.RUNNING, _S.RECOVERING, _S.STOPPING, _S.COMPLETED, _S.FAILED, _S.CANCELLED}
    ),
    _S.RECOVERING: frozenset({_S.STARTING, _S.FAILED, _S.CANCELLED}),
    _S.STOPPING: frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}
"""The protocol of a job as data; the diagram in the docs is drawn from this table."""

TERMINAL = frozenset(status for status, following in TRANSITIONS.items() if not following)
ACTIVE = frozenset(TRANSITIONS) - TERMINAL
ASSIGNED = frozenset({_S.STARTING, _S.RUNNING, _S.CHECKPOINTING, _S.STOPPING})
"""States in which the current generation's members should have workers."""


class NodeStatus(StrEnum):
    """What the cluster has agreed about a node."""

    ALIVE = "ALIVE"
    DRAINING = "DRAINING"
    LOST = "LOST"
    LEFT = "LEFT"


class Node(Struct, frozen=True, gc=False, kw_only=True):
    """One host's ``distroml-node``, as registered through the log."""

    name: str
    incarnation: int
    """Restart counter of the node; a member of a generation is bound to it."""
    http: str
    """Base URL of its API, such as ``http://127.0.0.1:8101``."""
    slots: int
    status: NodeStatus = NodeStatus.ALIVE
    reason: str = ""
    registered_at: float = 0.0
    changed_at: float = 0.0
    drained: bool = False
    """It is to have no ranks, whatever becomes of it: asked for, and not taken back since."""
    workers_since: int = 0
    """The incarnation whose agent spawned the workers that run there; 0: this one."""

    def holds(self, member: Member) -> bool:
        """Whether a worker that was given to the node in ``member.incarnation`` may still run there."""
        return (self.workers_since or self.incarnation) <= member.incarnation <= self.incarnation


class Member(Struct, frozen=True, gc=False, array_like=True):
    """One rank of a generation and the slot that it occupies."""

    rank: int
    local_rank: int
    node: str
    incarnation: int


class CheckpointStatus(StrEnum):
    """Only COMMITTED ones are ever restored."""

    COMMITTED = "COMMITTED"
    CORRUPT = "CORRUPT"


class Checkpoint(Struct, frozen=True, gc=False, kw_only=True):
    """A checkpoint whose commit is in the log."""

    step: int
    epoch: int
    generation: int
    directory: str
    """Path of its directory relative to the store's root."""
    manifest: str
    """File name of the manifest in ``directory``."""
    manifest_sha256: str
    size_bytes: int
    shards: int
    committed_at: float
    status: CheckpointStatus = CheckpointStatus.COMMITTED
    reason: str = ""
    store: str = "local"
    """Which store it is in, as in the spec's ``checkpointing.store``."""
    refers_to: tuple[str, ...] = ()
    """Directories of earlier checkpoints in whose files some of its tensors are (delta)."""
    metric: float | None = None
    """Its value of the spec's ``checkpointing.best_metric``, where that was reported by then."""
    save_request: int = 0
    """The newest request for a checkpoint (``Job.save_request``) that its ranks had agreed on by then."""


class Generation(Struct, frozen=True, gc=False, kw_only=True):
    """One fixed set of ranks of a run. Each failure or resize makes the next one."""

    number: int
    members: tuple[Member, ...]
    formed_at: float
    reason: str
    resume_step: int = 0
    """Steps done when it starts, as far as the coordinator knew; the ranks go on from the furthest among them."""
    checkpoint_step: int | None = None
    """The committed checkpoint that the ranks read where none of them has a state as new; None: from scratch."""
    spares: tuple[Member, ...] = ()
    """Slots with a prepared process that has no rank yet; their ranks follow those of the members."""
    joining: tuple[int, ...] = ()
    """Ranks that had no part in the generation before."""
    planned: bool = False
    """Not because of a failure: the ranks of the generation before change over after a whole step."""
    running_at: float | None = None
    """When all ranks were training, as the coordinator saw it."""
    from_initial: bool = False
    """``checkpoint_step`` is that of the job's ``initial`` one, which is another job's."""
    vacated: bool = False
    """Its ranks are to save a checkpoint at a step boundary and end, since they have to go elsewhere."""

    @property
    def places(self) -> tuple[Member, ...]:
        """All slots that it has, those of spares last."""
        return self.members + self.spares


class FailureKind(StrEnum):
    """Which signal told of a failure."""

    EXIT = "exit"
    ERROR = "error"
    NODE_LOST = "node_lost"
    NODE_LEFT = "node_left"
    """It said goodbye or drains: nobody's fault."""
    NODE_RESTARTED = "node_restarted"
    HANG = "hang"
    START_TIMEOUT = "start_timeout"
    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    CHECKPOINT_AWAY = "checkpoint_away"
    """Nodes that may have its files cannot be reached; the run waits for them."""
    DIVERGED = "diverged"
    STATE_GONE = "state_gone"
    """Who had the state that it was to go on from ended while it was being formed."""


BLAMELESS = frozenset(
    {
        FailureKind.NODE_LEFT,
        FailureKind.CORRUPT_CHECKPOINT,
        FailureKind.CHECKPOINT_AWAY,
        FailureKind.STATE_GONE,
    }
)
"""Ends of a generation that say nothing about the user's code and do not count as restarts; there are finitely
many of them: each is planned, takes a checkpoint out of use, comes in the time that runs wait before they do that, or
follows the end of a process that had trained."""


class Cause(Struct, frozen=True, gc=False, kw_only=True):
    """The first error of a failed generation; everything else was collateral."""

    kind: FailureKind
    rank: int | None = None
    node: str | None = None
    pid: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    error: str | None = None
    traceback: str | None = None
    last_lines: tuple[str, ...] = ()


class Culprit(Struct, frozen=True, gc=False, array_like=True, order=True):
    """A process that is why a generation failed: its name, which no other ever has, since ranks are renumbered."""

    node: str
    worker: int


class Incident(Struct, frozen=True, gc=False, kw_only=True):
    """A failure and the recovery from it."""

    number: int
    generation: int
    """The generation that failed."""
    reason: str
    cause: Cause
    collateral: tuple[int, ...]
    """Ranks that ended because of the failure, not by their own fault."""
    culprits: tuple[Culprit, ...] = ()
    """Processes that no later generation gets."""
    observed_at: float
    """When an agent or the failure detector first saw it."""
    decided_at: float
    highest_step: int
    """Steps completed when it failed."""
    next_generation: int | None = None
    formed_at: float | None = None
    left_at: float | None = None
    """When the last survivor was out of the collectives of the failed generation."""
    met_at: float | None = None
    """When the last rank was connected with all others."""
    restored_at: float | None = None
    """When the last rank had the state to go on with."""
    resume_step: int | None = None
    """Steps done when the next generation began to train; until then as the coordinator expects it."""
    source: str = ""
    """Where its state came from, such as ``rank 2``."""
    recovered_at: float | None = None
    """When all ranks of the next generation were known to train again."""
    first_step_at: float | None = None
    """When the last rank completed its first step."""

    @property
    def steps_lost(self) -> int | None:
        """Completed steps that had to be done again; None until a generation resumed."""
        if self.resume_step is None:
            return None
        return max(0, self.highest_step - self.resume_step)

    @property
    def phases(self) -> dict[str, tuple[float, float]]:
        """Begin and end (Unix seconds) of each phase that is over, in order.

        A phase lasts from the end of the one before to its mark. Marks are from clocks of different nodes, and
        survivors may be out before the next generation is formed: what was over already took no time.
        """
        marks = {
            "detect": self.decided_at,
            "decide": self.formed_at,
            "abort": self.left_at,
            "rendezvous": self.met_at,
            "restore": self.restored_at,
            "first_step": self.first_step_at,
        }
        phases, since = {}, self.observed_at
        for name, mark in marks.items():
            if mark is not None:
                phases[name] = (since, max(since, mark))
                since = max(since, mark)
        return phases

    @property
    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of each phase that is over, in order, and their total."""
        phases = self.phases
        took_s = {name: ended_at - began_at for name, (began_at, ended_at) in phases.items()}
        over = self.first_step_at or self.recovered_at
        if over is not None:
            since = max([self.observed_at, *(ended_at for _, ended_at in phases.values())])
            took_s["total"] = max(since, over) - self.observed_at
        return {name: round(one * 1000, 1) for name, one in took_s.items()}


class Result(Struct, frozen=True, gc=False, kw_only=True):
    """What a finished run left behind."""

    state_digest: str
    """SHA-256 over the final model and optimizer tensors in name order."""
    sample_digest: str = ""
    """Rolling SHA-256 over the sample ids that each step consumed."""
    step: int
    epoch: int
    metrics: dict[str, float]
    checkpoint_step: int | None = None
    duration_s: float = 0.0


class Job(Struct, frozen=True, gc=False, kw_only=True):
    """A submitted job with its run, as every node knows it."""

    job_id: str
    run_id: str
    spec: JobSpec
    status: JobStatus
    reason: str
    created_at: float
    changed_at: float
    submit_index: int
    """Log index of the submission: the order of the queue among equal priorities."""
    change_index: int
    started_at: float | None = None
    finished_at: float | None = None
    generation: Generation | None = None
    """The newest one."""
    outgoing: Generation | None = None
    """The one that trains until the newest one, a planned change, has taken over."""
    restarts: int = 0
    strikes: int = 0
    """Failures since the run last got any further; ``max_restarts`` limits them."""
    first_strike: str = ""
    """What the first of them was."""
    highest_step: int = 0
    """Most steps that were completed when a generation failed."""
    backoff_s: float = 0.0
    """How long to wait, from the failure, before the next generation is formed; 0: not at all."""
    total_steps: int | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    incidents: tuple[Incident, ...] = ()
    result: Result | None = None
    stop_requested: bool = False
    initial: Checkpoint | None = None
    """What the spec's ``init_from`` meant when the job was submitted; it is kept until the job has ended."""
    save_request: int = 0
    """How often a checkpoint was asked for."""
    saved_request: int = 0
    """The newest of these requests that a committed checkpoint has answered."""
    committed_step: int = -1
    """Of the checkpoint that was committed last, whatever became of it; -1: none was."""
    committed_generation: int = 0
    """Its generation. What that or an earlier one left behind that step may have been deleted."""
    removed: tuple[str, ...] = ()
    """Directories of checkpoints that were removed by request; their files go as soon as they can."""
    imported: bool = False
    """Its checkpoints were found in a store; it never ran in this cluster."""
    size_bytes: int = 0
    """What it takes in a snapshot of the state; 0 until it has ended."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def generation_number(self) -> int:
        """0 before the first generation is formed."""
        return self.generation.number if self.generation else 0

    @property
    def generation_numbers(self) -> tuple[int, ...]:
        """The newest generation, and the one that it is to relieve."""
        both = (self.generation, self.outgoing)
        return tuple(one.number for one in both if one is not None)

    @property
    def failures(self) -> int:
        """How many incidents it has had, those included that are not kept any more."""
        return self.incidents[-1].number if self.incidents else 0

    @property
    def at_work(self) -> Generation | None:
        """The generation whose ranks train now, or would."""
        return self.outgoing or self.generation

    @property
    def is_to_save(self) -> bool:
        """Whether a checkpoint was asked for that is not committed yet."""
        return self.save_request > self.saved_request

    def made_progress(self, highest_step: int) -> bool:
        """Whether the present generation got further than any before it, given the steps that it completed."""
        committed = any(one.generation in self.generation_numbers for one in self.checkpoints)
        return committed or highest_step > self.highest_step

    def is_to_blame(self, node: str, worker: int) -> bool:
        """Whether a process is why a generation failed."""
        culprit = Culprit(node, worker)
        return any(culprit in incident.culprits for incident in self.incidents)

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint not known to be corrupt."""
        good = [c for c in self.checkpoints if c.status is CheckpointStatus.COMMITTED]
        return max(good, key=lambda c: c.step, default=None)

    def passed_by(self, generation: int) -> int:
        """The step behind which nothing of ``generation`` is committed any more; -1: there is none.

        What lies behind and is not listed is garbage: its files may be gone. That the newest one turns out to be corrupt, and is
        not even listed any more, does not bring them back.
        """
        newest = self.newest_checkpoint()
        passed = newest.step if newest is not None else -1
        return (
            max(passed, self.committed_step) if generation <= self.committed_generation else passed
        )

    def origin(self) -> Checkpoint | None:
        """What ranks without a state begin with: the newest checkpoint of the run, else the initial one."""
        return self.newest_checkpoint() or self.initial

    def source_of(self, generation: Generation) -> Checkpoint | None:
        """The checkpoint that a generation reads where none of its ranks has a state as new."""
        if generation.from_initial:
            return self.initial
        wanted = generation.checkpoint_step
        return next((one for one in self.checkpoints if one.step == wanted), None)

    def steps_in(self, checkpoint: Checkpoint | None) -> int:
        """Steps of this run that are done in ``checkpoint``; 0 where only its weights are taken."""
        if checkpoint is None or (checkpoint is self.initial and self.takes_weights_only):
            return 0
        return checkpoint.step

    @property
    def takes_weights_only(self) -> bool:
        """Whether the run begins at step 0 with another job's model."""
        return self.spec.init_from is not None and self.spec.init_from.weights_only


class Event(Struct, frozen=True, gc=False, kw_only=True):
    """What leaves ``apply``: one change, for streams, logs and metrics."""

    index: int
    at: float
    type: str
    job_id: str | None = None
    node: str | None = None
    data: dict[str, Any] = {}
