"""What a run of chaos leaves behind: one history of typed records, from which everything else follows.

The file ``history.jsonl`` in a run's folder has a record per line, in the order in which they were written. Records are
written by whoever saw the thing, when it was seen; ``at_s`` counts from the beginning of the run on one monotonic clock, so
records of all writers can be compared.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct


class Outcome(StrEnum):
    """What the client knows of an operation."""

    OK = "ok"
    FAILED = "failed"
    """Surely without an effect."""
    UNKNOWN = "unknown"
    """No answer: it may have happened, may happen later, or never."""


class Began(Struct, frozen=True, kw_only=True, tag="began"):
    """The run itself: with this and the program it can be played again."""

    at_s: float
    seed: int
    duration_s: float
    nodes: int
    faults: tuple[str, ...]
    """Kinds that could be drawn."""
    mutant: str | None = None
    versions: dict[str, str] = {}


class FaultBegan(Struct, frozen=True, kw_only=True, tag="fault"):
    """A fault was inflicted."""

    at_s: float
    fault: int
    """Counts from 0 within the run."""
    kind: str
    """A name of ``python -m chaos list-faults``."""
    family: str
    """process, network, disk, store or time."""
    nodes: tuple[str, ...]
    """Whom it hits."""
    detail: dict[str, Any]
    """Its parameters, and what was found in place when it struck (pids, job, leader, file)."""
    during: str = ""
    """What it was aimed at, where it waited for that: recovery, commit, election."""


class FaultEnded(Struct, frozen=True, kw_only=True, tag="fault_ended"):
    """It was taken back, or needs no taking back."""

    at_s: float
    fault: int
    note: str = ""


class Operation(Struct, frozen=True, kw_only=True, tag="operation"):
    """One request of a client, written when it is known how it ended."""

    invoked_s: float
    at_s: float
    """When it returned or was given up."""
    client: str
    node: str
    """Whom it asked."""
    kind: str
    """submit, cancel, stop, read_job, read_jobs, read_checkpoints, checkpoint_now."""
    linearizable: bool = False
    outcome: Outcome
    job_id: str | None = None
    key: str | None = None
    """Idempotency key of a write; a repeated try has the same."""
    log_index: int | None = None
    """Of the state that the answer shows, or of the entry that the write made."""
    status: int | None = None
    """HTTP."""
    result: dict[str, Any] = {}
    """What the checkers need of the answer (state, generation, step, checkpoints …)."""
    error: str = ""


class Streamed(Struct, frozen=True, kw_only=True, tag="streamed"):
    """What one resumable stream has delivered over all its connections, written when it ends."""

    at_s: float
    client: str
    job_id: str
    stream: str
    """metrics, logs or events."""
    items: tuple[str, ...]
    """Each item in the order of arrival: ``generation.rank.step=loss``, ``generation.rank:time line`` (hashed), or
    ``index:what`` of an event."""
    connections: int
    ended: bool
    """With the explicit end event."""
    reference: bool = False
    """Read in one go from one node when all was over: what the others are compared with."""
    error: str = ""
    """Why it could not be followed any further."""


class LeaderSeen(Struct, frozen=True, kw_only=True, tag="leader"):
    """A node said that it leads."""

    at_s: float
    node: str
    term: int


class NodeSeen(Struct, frozen=True, kw_only=True, tag="node"):
    """What a node said of itself: written when something but the indexes changed, and now and then."""

    at_s: float
    node: str
    answers: bool
    """False: it did not, or not in time; the rest is then empty."""
    role: str = ""
    term: int = 0
    leader: str | None = None
    applied_index: int = 0
    incarnation: int = 0
    reason: str = ""
    """Why it is degraded, or did not answer."""


class JobSeen(Struct, frozen=True, kw_only=True, tag="job"):
    """A job as one node showed it: written when something but the step changed, and once a second."""

    at_s: float
    node: str
    job_id: str
    state: str
    generation: int
    step: int
    restarts: int
    log_index: int | None = None
    name: str = ""
    planned: bool = False
    """The generation is a planned change: the one before trains until it takes over."""
    checkpoint: int | None = None
    """Step of the newest committed checkpoint."""


class EventSeen(Struct, frozen=True, kw_only=True, tag="event"):
    """An event of the log, as the API tells it."""

    at_s: float
    node: str
    log_index: int
    job_id: str | None
    name: str
    data: dict[str, Any] = {}


class MemorySeen(Struct, frozen=True, kw_only=True, tag="memory"):
    """Resident memory and open files of an agent."""

    at_s: float
    node: str
    pid: int
    rss_bytes: int
    files: int
    threads: int


class Incident(Struct, frozen=True, kw_only=True, tag="incident"):
    """A recovery, as the API tells it after the run."""

    at_s: float
    job_id: str
    generation: int
    reason: str
    phases_ms: dict[str, float]
    """By the clocks of the nodes; empty where one of these had jumped meanwhile."""
    total_ms: float | None
    """None where it was overtaken by the next failure, or where it cannot be told (as above)."""
    steps_lost: int | None
    next_generation: int | None = None
    resume_step: int | None = None
    """Steps done when the next generation began."""
    highest_step: int = 0
    """Steps done when it failed."""
    culprit: str = ""
    """The process whose end it was: node and pid; empty where it was not one."""
    recovered: bool = True
    """The next generation came to train."""


class JobEnded(Struct, frozen=True, kw_only=True, tag="job_ended"):
    """All that remains of a job, read when the faults were over."""

    at_s: float
    job_id: str
    spec_name: str
    """Jobs of the same name have the same spec and seed; the run ``undisturbed`` of that name is the reference."""
    undisturbed: bool
    state: str
    losses: dict[int, str]
    """Step to the loss, exactly (``float.hex``)."""
    samples: dict[int, str]
    """Step to the rolling digest of the sample ids that were consumed."""
    model_sha256: str | None
    """Of weights and optimizer state; None where it did not complete."""
    checkpoints: dict[int, str] = {}
    """Each committed checkpoint that is listed: "" where it verifies, else what is wrong."""
    error: str = ""
    total_steps: int | None = None
    checkpoint_generations: dict[int, int] = {}
    """Step to the generation that wrote it, in the order of commits."""
    corrupt: dict[int, str] = {}
    """Steps of checkpoints that the cluster itself took out of use, with its reason."""
    save_request: int = 0
    """How often a checkpoint was asked for, as the log counted."""
    reason: str = ""
    log_index: int | None = None


class StateDigest(Struct, frozen=True, kw_only=True, tag="digest"):
    """Of a node's replicated state, after the faults; equal at equal index, or something is badly wrong."""

    at_s: float
    node: str
    log_index: int
    sha256: str


class Settled(Struct, frozen=True, kw_only=True, tag="settled"):
    """How the cluster came back when all faults had been taken back."""

    at_s: float
    leader_s: float | None
    """Until there was one leader that answered a linearizable read; None: not within the limit."""
    progress_s: dict[str, float | None]
    """Until each active job completed a step."""


class Leftover(Struct, frozen=True, kw_only=True, tag="leftover"):
    """Something that outlived the run and should not have."""

    at_s: float
    kind: str
    """process, port, shared_memory, file, descriptor."""
    what: str


class Ended(Struct, frozen=True, kw_only=True, tag="ended"):
    """The run came to its end by itself; a history without this was cut off."""

    at_s: float


Record = (
    Began
    | FaultBegan
    | FaultEnded
    | Operation
    | Streamed
    | LeaderSeen
    | NodeSeen
    | JobSeen
    | EventSeen
    | MemorySeen
    | Incident
    | JobEnded
    | StateDigest
    | Settled
    | Leftover
    | Ended
)


class Violation(Struct, frozen=True, kw_only=True):
    """A promise that was broken."""

    checker: str
    what: str
    """One sentence: what was promised, what happened."""
    at_s: float | None = None
    job_id: str | None = None
    evidence: tuple[str, ...] = ()
    """The records that show it, as lines of the history."""


class HistoryWriter:
    """Appends to a run's history; each record is with the kernel before ``write`` returns.

    Raises:
        FileExistsError: there is a history already.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "history.jsonl").open("xb", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, record: Record) -> None:
        """Add one line."""
        self._file.write(self._encoder.encode(record) + b"\n")

    def close(self) -> None:
        """No more records."""
        self._file.close()


def read_history(folder: Path) -> list[Record]:
    """All records of a run; a last line that was cut off is left out.

    Raises:
        FileNotFoundError: no run was recorded there.
        msgspec.ValidationError: a line is no record of this version.
    """
    content = (folder / "history.jsonl").read_bytes()
    decoder = msgspec.json.Decoder(Record)
    return [decoder.decode(line) for line in content.split(b"\n")[:-1]]
