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

from distroml.model import Checkpoint
from distroml.reports import ShardFact, WorkerFailure, WorkerOutcome, WorkerPhase
from distroml.runtime.barrier import BarrierName, BarrierValue
from distroml.spec import JobSpec

MAX_FRAME_BYTES = 4 * 1024 * 1024
HEADER = struct.Struct(">I")


class WorkerPlan(Struct, frozen=True, kw_only=True):
    """All that a worker needs to start."""

    job_id: str
    run_id: str
    generation: int
    rank: int
    local_rank: int
    world_size: int
    node: str
    host: str
    """Address of this node that the other ranks' nodes can reach."""
    spec: JobSpec
    store_dir: str
    checkpoint: Checkpoint | None
    """Where the state comes from; None: from scratch."""
    control_path: str
    """Unix socket of the agent."""
    log_path: str
    """stdout and stderr of the worker are appended here."""
    threads: int = 1


class MetricRecord(Struct, frozen=True, array_like=True):
    """Values of one step, 1-based: ``step`` completed steps gave ``values``."""

    step: int
    epoch: int
    at: float
    values: dict[str, float]


# --- worker -> agent -------------------------------------------------------------------------------------------


class Hello(Struct, frozen=True, tag=True, kw_only=True):
    """First frame of a worker."""

    run_id: str
    generation: int
    rank: int
    pid: int


class Rendezvous(Struct, frozen=True, tag=True, kw_only=True):
    """A key of the process group's store that the other ranks wait for."""

    key: str
    value: bytes


class Progress(Struct, frozen=True, tag=True, kw_only=True):
    """Phase and position, with the metrics since the last one; at most every 100 ms."""

    phase: WorkerPhase
    step: int
    epoch: int
    total_steps: int | None = None
    metrics: tuple[MetricRecord, ...] = ()


class ShardDurable(Struct, frozen=True, tag=True, kw_only=True):
    """This rank's shard of a checkpoint is fsynced under its final name."""

    shard: ShardFact


class ShardAbandoned(Struct, frozen=True, tag=True, kw_only=True):
    """This rank could not write its shard after retries; training goes on."""

    step: int
    reason: str


class Arrive(Struct, frozen=True, tag=True, kw_only=True):
    """This rank stands at a barrier of its generation; see ``runtime.barrier``."""

    name: BarrierName
    value: BarrierValue = 0


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """The last frame of a worker that ends with an error."""

    failure: WorkerFailure
    step: int


class Finished(Struct, frozen=True, tag=True, kw_only=True):
    """The last frame of a worker that is done; its final shard is durable."""

    outcome: WorkerOutcome


FromWorker = (
    Hello | Rendezvous | Progress | ShardDurable | ShardAbandoned | Arrive | Failed | Finished
)


# --- agent -> worker -------------------------------------------------------------------------------------------


class RendezvousKeys(Struct, frozen=True, tag=True, kw_only=True):
    """Keys that other ranks of the same generation published."""

    keys: dict[str, bytes]


class Stop(Struct, frozen=True, tag=True, kw_only=True):
    """Agree with the other ranks on the next step boundary, save a final checkpoint there, finish."""


class Released(Struct, frozen=True, tag=True, kw_only=True):
    """All ranks of its generation have arrived at a barrier; ``value`` is the largest that they came with."""

    name: str
    value: int


ToWorker = RendezvousKeys | Stop | Released


# --- agent <-> forkserver --------------------------------------------------------------------------------------
# The forkserver inherits one end of a Unix socket pair. End of file from the agent means that the agent is gone:
# the forkserver then kills every worker with its process group and exits.


class Spawn(Struct, frozen=True, tag=True, kw_only=True):
    """agent -> forkserver: fork a worker with this plan; ``env`` is added to its environment."""

    plan: WorkerPlan
    env: dict[str, str] = {}


class Ready(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: everything is imported; spawns sent earlier were queued, not lost."""

    pid: int


class Spawned(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: the worker runs; it leads the process group ``pid``."""

    run_id: str
    generation: int
    rank: int
    pid: int


class SpawnFailed(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: no process was made for this plan."""

    run_id: str
    generation: int
    rank: int
    reason: str


class Exited(Struct, frozen=True, tag=True, kw_only=True):
    """forkserver -> agent: a worker ended and was reaped; always after its ``Spawned``."""

    pid: int
    status: int
    """As of ``subprocess``: negative for a signal."""


FromForkserver = Ready | Spawned | SpawnFailed | Exited


# --- framing ---------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_Message = TypeVar("_Message")


class FrameReader(Generic[_Message]):
    """Cuts a byte stream into messages of ``kind`` (a Struct or a union of them); does no I/O."""

    def __init__(self, kind: type[_Message] | UnionType) -> None:
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[_Message]:
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


def encode_frame(message: FromWorker | ToWorker | Spawn | FromForkserver) -> bytes:
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
