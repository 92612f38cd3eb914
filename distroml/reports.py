"""All that agents report: level-triggered facts about a node and its workers.

A ``NodeReport`` is the *complete* list of what one agent knows, sent to its peers at every heartbeat and at
once after a change. A lost or repeated report therefore does no harm, and a new leader has all facts as soon as
each agent has spoken once. Nothing here enters the log.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from distroml.model import FailureKind


class WorkerPhase(StrEnum):
    """What a worker process is doing, in the usual order."""

    SPAWNING = "SPAWNING"
    CONNECTING = "CONNECTING"
    RESTORING = "RESTORING"
    TRAINING = "TRAINING"
    FINISHING = "FINISHING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    EXITED = "EXITED"


class DataCursor(Struct, frozen=True, gc=False):
    """Where in the data a step boundary lies: ``batch`` is the next one of ``epoch`` to be consumed."""

    epoch: int
    batch: int


class ShardFact(Struct, frozen=True, gc=False, kw_only=True):
    """One rank's share of a checkpoint is durable in the store."""

    step: int
    cursor: DataCursor
    rank: int
    file: str
    """Name within the checkpoint's directory."""
    size_bytes: int
    sha256: str


class WorkerFailure(Struct, frozen=True, gc=False, kw_only=True):
    """An error that a worker told of before it ended."""

    kind: FailureKind
    error: str
    traceback: str
    at: float
    collateral: bool = False
    """True where it is the echo of another rank's end (a broken collective)."""
    checkpoint_step: int | None = None
    """For CORRUPT_CHECKPOINT: which one."""


class WorkerOutcome(Struct, frozen=True, gc=False, kw_only=True):
    """A worker trained to its last step or stopped at a step boundary as asked."""

    step: int
    epoch: int
    state_digest: str
    metrics: dict[str, float]
    stopped: bool
    checkpoint_step: int | None
    """The final checkpoint that it contributed to, None where checkpoints are off."""


class WorkerFact(Struct, frozen=True, gc=False, kw_only=True):
    """Everything an agent knows of one worker process."""

    job_id: str
    run_id: str
    generation: int
    rank: int
    phase: WorkerPhase
    pid: int | None = None
    step: int = 0
    """Steps completed, those of earlier generations included."""
    epoch: int = 0
    total_steps: int | None = None
    rendezvous: dict[str, bytes] = {}
    """Keys it published for its process group; carried until it trains."""
    shards: tuple[ShardFact, ...] = ()
    abandoned: tuple[tuple[int, str], ...] = ()
    """Checkpoint steps that it could not write, with the reason."""
    failure: WorkerFailure | None = None
    outcome: WorkerOutcome | None = None
    exit_code: int | None = None
    """As of ``subprocess``: negative for a signal."""
    last_lines: tuple[str, ...] = ()
    started_at: float = 0.0
    ended_at: float | None = None


class NodeReport(Struct, frozen=True, gc=False, kw_only=True):
    """The heartbeat of an agent."""

    node: str
    incarnation: int
    sequence: int
    at: float
    slots: int
    workers: tuple[WorkerFact, ...] = ()
    applied_index: int = 0
    draining: bool = False
    ready: bool = True
    """False while the warm forkserver is not up."""
    memory_bytes: int = 0
    cpu_percent: float = 0.0
