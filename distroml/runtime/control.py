"""The wires between an agent, its forkserver and each of its workers: plan, messages, framing.

A worker is forked with a ``WorkerPlan`` and connects to the agent's Unix socket; both sides then exchange
length-prefixed MessagePack frames. Imported by the agent and by the worker; imports neither asyncio nor torch.
"""

from __future__ import annotations

import struct
from types import UnionType
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from distroml.model import Checkpoint, FailureKind
from distroml.reports import Marks, ShardFact, StepTiming, WorkerFailure, WorkerOutcome, WorkerPhase
from distroml.runtime.barrier import BarrierName, BarrierValue
from distroml.spec import JobSpec
from distroml.store_urls import StoreSettings

MAX_FRAME_BYTES = 4 * 1024 * 1024
HEADER = struct.Struct(">I")
AGENT_GRACE_S = 10.0
"""How long workers and their forkserver live on without an agent: one that crashed may come back to them."""
PULSE_S = 0.5
"""A worker whose control thread lives says so at least this often."""
MAX_METRIC_NAMES = 64
"""Of one metric record; with more, the first in name order are kept."""
MAX_METRIC_NAME_CHARS = 128


class Join(Struct, frozen=True, tag=True, kw_only=True):
    """agent -> worker: be this rank of this generation, with the state that you have.

    The ranks find out among themselves who has gone furthest; ``checkpoint`` is what they read if none of them has
    a state, or only an older one.
    """

    generation: int
    rank: int
    local_rank: int
    world_size: int
    checkpoint: Checkpoint | None
    """The newest committed one; None: from scratch. The same for all ranks of a generation."""
    weights_only: bool = False
    """Of the checkpoint only the model is taken: the run begins at step 0 with it."""
    resume_step: int = 0
    """Steps that a rank or the checkpoint has, as the coordinator believed: what it then commits late lies no further. If the
    last one that had them is gone, the generation is over before it begins."""
    at_boundary: bool = False
    """A planned change: the ranks leave the present generation together after a whole step. Otherwise at once."""

    @property
    def steps_done(self) -> int:
        """Steps of this run that are done in the checkpoint."""
        return 0 if self.checkpoint is None or self.weights_only else self.checkpoint.step


class WorkerPlan(Struct, frozen=True, kw_only=True):
    """All that a worker process needs to start. It outlives generations: ``Join`` moves it to the next one."""

    job_id: str
    run_id: str
    worker: int
    """Names the process on its node, for good; never used twice in a run."""
    node: str
    host: str
    """Address of this node that the other ranks' nodes can reach."""
    spec: JobSpec
    store_dir: str
    control_path: str
    """Unix socket of the agent."""
    log_path: str
    """stdout and stderr of the worker are appended here."""
    stores: StoreSettings = StoreSettings()
    """What the node says of stores that all nodes share."""
    threads: int = 1
    join: Join | None = None
    """Its first generation; None: a hot spare, which prepares everything and waits."""


class MetricRecord(Struct, frozen=True, array_like=True):
    """Values of one step, 1-based: ``step`` completed steps gave ``values``."""

    step: int
    epoch: int
    at: float
    values: dict[str, float]


# --- worker -> agent -------------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, tag=True, kw_only=True):
    """First frame of a worker, and of each of its connections: where it stands, so that an agent that restarted
    can go on with it."""

    run_id: str
    worker: int
    pid: int
    generation: int
    """0 before the first one."""
    rank: int
    step: int = 0


class Rendezvous(Struct, frozen=True, tag=True, kw_only=True):
    """A key of the process group's store that the other ranks wait for."""

    key: str
    value: bytes


class Progress(Struct, frozen=True, tag=True, kw_only=True):
    """Phase and position in ``generation``, with the metrics since the last one; every 100 ms at most, and every
    ``PULSE_S`` at least."""

    generation: int
    phase: WorkerPhase
    step: int
    epoch: int
    total_steps: int | None = None
    metrics: tuple[MetricRecord, ...] = ()
    marks: Marks | None = None
    """Only with changes of phase."""
    timing: StepTiming | None = None
    waiting_s: float = 0.0
    """For how long it has been in its present collective; 0 outside of one."""
    evaluating: bool = False
    """Between two steps, in the adapter's ``evaluate``."""


class Parked(Struct, frozen=True, tag=True, kw_only=True):
    """It has left the collectives of ``generation`` and waits, with its state, for the next ``Join``."""

    generation: int
    step: int
    at: float
    reason: str
    """What broke, or that the agent asked."""
    has_state: bool = True
    """False where it never got one; ``step`` is what it was to begin with then."""
    bereft: bool = False
    """It left since no rank had the state that the generation was to go on from."""


class ShardDurable(Struct, frozen=True, tag=True, kw_only=True):
    """This rank's shard of a checkpoint is fsynced under its final name."""

    generation: int
    shard: ShardFact


class ShardAbandoned(Struct, frozen=True, tag=True, kw_only=True):
    """This rank could not write its shard after retries; training goes on."""

    generation: int
    step: int
    reason: str


class Arrive(Struct, frozen=True, tag=True, kw_only=True):
    """This rank stands at a barrier of its generation; see ``runtime.barrier``."""

    generation: int
    name: BarrierName
    value: BarrierValue = 0


class NeedCheckpoint(Struct, frozen=True, tag=True, kw_only=True):
    """This rank is about to read a checkpoint of the store ``local``: its files are to be on this node."""

    number: int
    """Comes back with the answer."""
    checkpoint: Checkpoint
    manifest_only: bool = False
    mend: bool = False
    """It has read broken bytes: what is here is to be compared, and replaced from other nodes."""


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """The last frame of a worker that ends with an error."""

    failure: WorkerFailure
    step: int


class Finished(Struct, frozen=True, tag=True, kw_only=True):
    """The last frame of a worker that is done; its final shard is durable."""

    generation: int
    outcome: WorkerOutcome


FromWorker = (
    Hello
    | Rendezvous
    | Progress
    | Parked
    | ShardDurable
    | ShardAbandoned
    | Arrive
    | NeedCheckpoint
    | Failed
    | Finished
)


# --- agent -> worker -------------------------------------------------------------------------------------------


class RendezvousKeys(Struct, frozen=True, tag=True, kw_only=True):
    """Keys that other ranks of the same generation published."""

    keys: dict[str, bytes]


class Stop(Struct, frozen=True, tag=True, kw_only=True):
    """Agree with the other ranks on the next step boundary, save a final checkpoint there, finish."""


class Save(Struct, frozen=True, tag=True, kw_only=True):
    """While it is in ``generation``: save a checkpoint at the first step boundary at which all ranks can."""

    generation: int
    request: int
    """Counts the requests of the run; an answered one asks for nothing."""


class Vacate(Struct, frozen=True, tag=True, kw_only=True):
    """If in ``generation``: agree with the others on the next step boundary, save a checkpoint there, even where
    checkpoints are off, and finish. The run goes on elsewhere."""

    generation: int


class Committed(Struct, frozen=True, tag=True, kw_only=True):
    """The log's newest checkpoint of the run that is good is another one now; later ones may refer to its tensors."""

    checkpoint: Checkpoint | None


class Abort(Struct, frozen=True, tag=True, kw_only=True):
    """``generation`` is over: leave its collectives at once, keep the state, wait for a ``Join``."""

    generation: int


class Released(Struct, frozen=True, tag=True, kw_only=True):
    """All ranks of ``generation`` have arrived at a barrier; ``value`` is the largest that they came with."""

    generation: int
    name: str
    value: int


class Awaited(Struct, frozen=True, tag=True, kw_only=True):
    """A barrier still waits for these ranks, or for more where they are many; told where the wait is long."""

    generation: int
    name: str
    missing: tuple[int, ...]


class CheckpointHere(Struct, frozen=True, tag=True, kw_only=True):
    """What this rank asked for by ``NeedCheckpoint`` is on this node, or cannot be."""

    number: int
    problem: str = ""
    kind: FailureKind = FailureKind.ERROR
    """Of the problem."""


ToWorker = (
    RendezvousKeys
    | Stop
    | Vacate
    | Join
    | Abort
    | Released
    | Awaited
    | Save
    | Committed
    | CheckpointHere
)


# --- agent <-> forkserver --------------------------------------------------------------------------------------
# The forkserver inherits one end of a Unix socket pair. End of file without ``Close`` means that the agent died: the
# forkserver then waits a while at its own Unix socket for the next one, tells it of the workers that there are and of
# those that ended meanwhile, and then ``Ready``. If none comes it kills every worker with its process group and exits.


class Spawn(Struct, frozen=True, tag=True, kw_only=True):
    """agent -> forkserver: fork a worker with this plan; ``env`` is added to its environment."""

    plan: WorkerPlan
    env: dict[str, str] = {}


class Close(Struct, frozen=True, tag=True, kw_only=True):
    """agent -> forkserver: kill all workers and exit."""


class Ready(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: everything is imported; spawns sent earlier were queued, not lost."""

    pid: int


class Spawned(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: the worker runs; it leads the process group ``pid``."""

    run_id: str
    worker: int
    pid: int


class Running(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> an agent that came back: a worker that an earlier one spawned."""

    job_id: str
    run_id: str
    worker: int
    pid: int
    log_path: str


class SpawnFailed(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: no process was made for this plan."""

    run_id: str
    worker: int
    reason: str


class Exited(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: a worker ended and was reaped; always after its ``Spawned`` or ``Running``."""

    pid: int
    status: int
    """As of ``subprocess``: negative for a signal."""


FromForkserver = Ready | Spawned | Running | SpawnFailed | Exited


# --- framing ---------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_Message = TypeVar("_Message")


class FrameReader(Generic[_Message]):
    """Cuts a byte stream into messages of ``kind`` (a Struct or a union of them); does no I/O."""

    def __init__(self, kind: type[_Message] | UnionType) -> None:
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[_Message]:
        """Take what arrived, return the messages that are now complete.

        Raises:
            ValueError: a frame announces more than ``MAX_FRAME_BYTES``.
            msgspec.DecodeError: a body is not one of the expected messages.
        """
        self._buffer += data
        messages, at = [], 0
        while len(self._buffer) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, at)
            if length > MAX_FRAME_BYTES:
                raise ValueError(
                    f"control frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}"
                )
            end = at + HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(bytes(self._buffer[at + HEADER.size : end])))
            at = end
        del self._buffer[:at]
        return messages


def encode_frame(message: FromWorker | ToWorker | Spawn | Close | FromForkserver) -> bytes:
    """Length prefix (4 bytes, big-endian) and MessagePack body.

    Raises:
        ValueError: the body is over ``MAX_FRAME_BYTES``.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(
            f"control frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}"
        )
    return HEADER.pack(len(body)) + body
