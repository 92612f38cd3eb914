"""Everything that may enter the log: a closed, tagged union, and the envelope around it.

A command is a decision already made: times, ids and random numbers were chosen where it was proposed, so
that ``consensus.machine.apply`` is the same pure function on every node. New commands are added at the end
and never change meaning (see CONTRIBUTING, "adding a command").
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from distroml.model import (
    Cause,
    Checkpoint,
    Culprit,
    Generation,
    JobStatus,
    Member,
    NodeStatus,
    Result,
)
from distroml.spec import JobSpec

MAX_ENTRY_BYTES = 32 * 1024
"""Limit of one encoded entry; keeps a Raft batch small (AUDIT P5)."""


class Command(Struct, frozen=True, gc=False, tag=True, kw_only=True):
    """Base of the union; the tag is the class name."""


class RegisterNode(Command, frozen=True, gc=False, kw_only=True):
    """An agent came up. A higher incarnation supersedes the earlier one and ends its duplicates table."""

    name: str
    incarnation: int
    http: str
    slots: int
    workers_since: int = 0
    """The incarnation whose agent spawned the workers that still run there; 0: there are none."""


class SetNodeStatus(Command, frozen=True, gc=False, kw_only=True):
    """The coordinator, the node itself on SIGTERM, or a client that drains it says what becomes of a node."""

    name: str
    incarnation: int
    status: NodeStatus
    reason: str
    drained: bool | None = None
    """What a client asks for. A node that is gone is drained, or no longer, without being there again; None: as before."""


class Write(Command, frozen=True, gc=False, kw_only=True):
    """A client's write: carries the ``Idempotency-Key`` and a digest of the request it came with."""

    key: str | None = None
    request_sha256: str = ""


class SubmitJob(Write, frozen=True, gc=False, kw_only=True):
    """Queue a new job. The ids are chosen by the node that took the request."""

    job_id: str
    run_id: str
    spec: JobSpec


class CancelJob(Write, frozen=True, gc=False, kw_only=True):
    """End an active job now."""

    job_id: str
    reason: str
    if_active: bool = False
    """A job that has ended otherwise is left as it is and that is the outcome, which the key keeps, not a conflict."""


class StopJob(Write, frozen=True, gc=False, kw_only=True):
    """End an active job after a final checkpoint."""

    job_id: str
    reason: str


class RemoveJob(Write, frozen=True, gc=False, kw_only=True):
    """Forget a finished job."""

    job_id: str


class FormGeneration(Command, frozen=True, gc=False, kw_only=True):
    """Give a run its next fixed set of ranks: its first, the one after a failure, or a planned change."""

    job_id: str
    generation: Generation


class MarkRunning(Command, frozen=True, gc=False, kw_only=True):
    """All ranks of a generation are training. The marks are of the last rank, None where no rank has one."""

    job_id: str
    generation: int
    total_steps: int
    left_at: float | None = None
    met_at: float | None = None
    restored_at: float | None = None
    resume_step: int | None = None
    """Steps done when they began to train."""
    source: str = ""


class Failure(Command, frozen=True, gc=False, kw_only=True):
    """The part of a command that becomes an incident; ``cause`` None: nothing failed."""

    cause: Cause | None = None
    collateral: tuple[int, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    observed_at: float = 0.0
    highest_step: int = 0


class FailGeneration(Failure, frozen=True, gc=False, kw_only=True):
    """A generation is over because of ``cause``; the run recovers after ``backoff_s``."""

    job_id: str
    generation: int
    cause: Cause
    reason: str
    backoff_s: float


class BeginCheckpoint(Command, frozen=True, gc=False, kw_only=True):
    """A shard of ``step`` is durable: the job shows CHECKPOINTING until commit or abandonment."""

    job_id: str
    generation: int
    step: int


class CommitCheckpoint(Command, frozen=True, gc=False, kw_only=True):
    """All shards and the manifest are durable. This entry is the commit."""

    job_id: str
    generation: int
    checkpoint: Checkpoint


class AbandonCheckpoint(Command, frozen=True, gc=False, kw_only=True):
    """The checkpoint of ``step`` will not be completed; training goes on."""

    job_id: str
    generation: int
    step: int
    reason: str


class MarkCheckpointCorrupt(Command, frozen=True, gc=False, kw_only=True):
    """A reader found bytes that do not match; it is never restored again."""

    job_id: str
    step: int
    manifest_sha256: str
    reason: str


class FinishRun(Failure, frozen=True, gc=False, kw_only=True):
    """The run ended as ``status``: COMPLETED, FAILED (with the last failure) or CANCELLED."""

    job_id: str
    generation: int
    status: JobStatus
    reason: str
    result: Result | None = None


class MarkStepped(Command, frozen=True, gc=False, kw_only=True):
    """All ranks of a generation that recovers from an incident have completed a step."""

    job_id: str
    generation: int
    stepped_at: float
    """When the last one had."""


class PlaceSpares(Command, frozen=True, gc=False, kw_only=True):
    """The spares of a generation are now these; its ranks stay as they are."""

    job_id: str
    generation: int
    spares: tuple[Member, ...]
    reason: str


class RequestCheckpoint(Write, frozen=True, gc=False, kw_only=True):
    """The ranks of a running job are to save a checkpoint at the next step boundary that suits them all."""

    job_id: str


class RetireCheckpoints(Command, frozen=True, gc=False, kw_only=True):
    """Checkpoints that the retention of the spec does not keep. What must not go stays, whatever is said here."""

    job_id: str
    steps: tuple[int, ...]
    reason: str


class RemoveCheckpoint(Write, frozen=True, gc=False, kw_only=True):
    """A client removes one checkpoint with its files."""

    job_id: str
    step: int


class ImportCheckpoints(Write, frozen=True, gc=False, kw_only=True):
    """Checkpoints of a job that this cluster does not know were found in a store: some of them, oldest first."""

    job_id: str
    run_id: str
    spec: JobSpec
    checkpoints: tuple[Checkpoint, ...]


class VacateGeneration(Command, frozen=True, gc=False, kw_only=True):
    """The ranks of a generation have to leave their nodes and nobody else could take over their state.

    They save a checkpoint at a step boundary and end; the next generation begins with it.
    """

    job_id: str
    generation: int
    reason: str


AnyCommand = (
    RegisterNode
    | SetNodeStatus
    | SubmitJob
    | CancelJob
    | StopJob
    | RemoveJob
    | FormGeneration
    | MarkRunning
    | FailGeneration
    | BeginCheckpoint
    | CommitCheckpoint
    | AbandonCheckpoint
    | MarkCheckpointCorrupt
    | FinishRun
    | MarkStepped
    | PlaceSpares
    | RequestCheckpoint
    | RetireCheckpoints
    | RemoveCheckpoint
    | ImportCheckpoints
    | VacateGeneration
)


class Entry(Struct, frozen=True, gc=False, array_like=True):
    """One log entry: a command and who proposed it, so that a retry is applied once.

    ``(proposer, incarnation, sequence)`` names the proposal. Results of sequences below ``settled`` have been
    seen by the proposer and may be forgotten (RIFL, Lee et al., SOSP 2015).
    """

    proposer: str
    incarnation: int
    sequence: int
    settled: int
    at: float
    """Unix seconds at the proposer."""
    command: AnyCommand


class Outcome(Struct, frozen=True, gc=False):
    """What ``apply`` answers the proposer; ``error`` is a slug of ``distroml.errors`` or empty."""

    index: int
    error: str = ""
    detail: str = ""
    job_id: str | None = None
    replayed: bool = False
    """True where an earlier request with the same Idempotency-Key had this effect."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def encode_entry(entry: Entry) -> bytes:
    """MessagePack bytes of an entry."""
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """Read an entry back.

    Raises:
        errors.UNDECODABLE: the bytes are not an entry of a version this one knows.
    """
    return _decoder.decode(data)
