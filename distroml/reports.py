"""All that agents report: level-triggered facts about a node and its workers.

A ``NodeReport`` is the *complete* list of what one agent knows, sent to its peers at every heartbeat and at
once after a change. A lost or repeated report therefore does no harm, and a new leader has all facts as soon as
each agent has spoken once. Nothing here enters the log.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from distroml.errors import CheckpointAway, CorruptCheckpoint, StoreError
from distroml.model import FailureKind


class WorkerPhase(StrEnum):
    """What a worker process is doing, in the usual order."""

    SPAWNING = "SPAWNING"
    SPARE = "SPARE"
    """Prepared, without a rank."""
    CONNECTING = "CONNECTING"
    RESTORING = "RESTORING"
    TRAINING = "TRAINING"
    PARKED = "PARKED"
    """It left a generation that is over, and holds its state, if it has one, for the next one."""
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
    """Of its header, which has the hashes of all that follows (``checkpoint.shard_file``)."""
    save_request: int = 0
    """The newest request for a checkpoint that the ranks had agreed on by then."""


class WorkerFailure(Struct, frozen=True, gc=False, kw_only=True):
    """An error that a worker told of before it ended."""

    kind: FailureKind
    error: str
    traceback: str
    at: float
    collateral: bool = False
    """True where it is the echo of another rank's end (a broken collective)."""
    checkpoint_step: int | None = None
    """For the kinds of ``CHECKPOINT_ERRORS``: which one."""


CHECKPOINT_ERRORS: dict[FailureKind, type[StoreError]] = {
    FailureKind.CORRUPT_CHECKPOINT: CorruptCheckpoint,
    FailureKind.CHECKPOINT_AWAY: CheckpointAway,
}
"""Errors that say of a checkpoint that this rank cannot begin with it."""


def kind_of(error: BaseException) -> FailureKind:
    """Which signal an error of a worker, or of its agent on its behalf, is."""
    kinds = (kind for kind, raised in CHECKPOINT_ERRORS.items() if isinstance(error, raised))
    return next(kinds, FailureKind.ERROR)


class Marks(Struct, frozen=True, gc=False, kw_only=True):
    """When (Unix seconds) a worker passed the stages of a recovery, in the generation that it reports."""

    left_at: float | None = None
    """Out of the collectives of the generation before; None for a new process."""
    met_at: float | None = None
    """Connected with all ranks."""
    restored_at: float | None = None
    """Its state is that of the resume step."""
    stepped_at: float | None = None
    """Completed the first step."""
    resume_step: int | None = None
    """Steps that were done when it began to train; known once restored."""
    source: str = ""
    """Where the state came from: ``rank 2``, ``checkpoint of step 40`` or ``scratch``."""


class StepTiming(Struct, frozen=True, gc=False, kw_only=True):
    """Where a rank's time goes, in seconds per step: moving means over its last steps."""

    step_s: float
    data_s: float
    """Getting samples."""
    compute_s: float
    """Forward, backward, optimizer."""
    communication_s: float
    """In collectives, less what others were late."""
    idle_s: float
    """Waiting for slower ranks, checkpoints' copies and evaluation aside."""
    slowest_s: float = 0.0
    """The longest of its last steps; what a hang is measured by."""


class WorkerOutcome(Struct, frozen=True, gc=False, kw_only=True):
    """A worker trained to its last step or stopped at a step boundary as asked."""

    step: int
    epoch: int
    state_digest: str
    sample_digest: str
    """Rolling digest of the sample ids that each step consumed; equal for runs that saw the same data."""
    metrics: dict[str, float]
    stopped: bool
    checkpoint_step: int | None
    """The final checkpoint that it contributed to, None where checkpoints are off."""


class Former(Struct, frozen=True, gc=False, kw_only=True):
    """What a rank saved in the generation that it left by a planned change; its shards may become durable later."""

    generation: int
    rank: int
    """Its rank there."""
    shards: tuple[ShardFact, ...] = ()
    abandoned: tuple[tuple[int, str], ...] = ()


class WorkerFact(Struct, frozen=True, gc=False, kw_only=True):
    """Everything an agent knows of one worker process."""

    job_id: str
    run_id: str
    generation: int
    """The one that it joined last; 0 for a spare."""
    rank: int
    phase: WorkerPhase
    worker: int = 0
    """Names the process on its node."""
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
    copying: tuple[int, ...] = ()
    """Checkpoint steps of which its shard is durable on its node, and not yet on as many others as it should be."""
    former: Former | None = None
    failure: WorkerFailure | None = None
    outcome: WorkerOutcome | None = None
    exit_code: int | None = None
    """As of ``subprocess``: negative for a signal."""
    last_lines: tuple[str, ...] = ()
    started_at: float = 0.0
    marks: Marks = Marks()
    timing: StepTiming | None = None
    parked_at: float | None = None
    parked_reason: str = ""
    bereft: bool = False
    """It parked since no rank had the state that the generation was to go on from."""
    has_state: bool = False
    """Whether it said, when it parked, that it holds a state of the run."""
    step_at: float = 0.0
    """When its last step was heard of (Unix seconds of its agent), or it began to train."""
    waiting_s: float = 0.0
    """For how long it has been in its present collective, as it said last."""
    evaluating: bool = False
    """It evaluates between two steps, which may take far longer than a step."""
    silent_s: float = 0.0
    """Since when its control thread has said nothing."""
    stopped_s: float = 0.0
    """For how long its process has been stopped (SIGSTOP, a debugger), as its agent sees it."""
    ended_at: float | None = None

    def former_of(self, generation: int | None) -> Former | None:
        """What is still to be known of what it saved in ``generation``, once it has left that by a planned change."""
        if self.generation != generation:
            known = self.former
            return known if known is not None and known.generation == generation else None
        return Former(
            generation=self.generation,
            rank=self.rank,
            shards=self.shards,
            abandoned=self.abandoned,
        )


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
    workers_since: int = 0
    """The incarnation whose agent spawned workers that still run; 0: they are its own, or none."""
    memory_bytes: int = 0
    cpu_percent: float = 0.0
