"""The wire between an agent and each of its workers: plan, messages, framing.

A worker is forked with a ``WorkerPlan`` and connects to the agent's Unix socket; both sides then exchange
length-prefixed MessagePack frames. Imported by the agent and by the worker; imports neither asyncio nor torch.
"""

from __future__ import annotations

import struct

import msgspec
from msgspec import Struct

from distroml.model import Checkpoint
from distroml.reports import ShardFact, WorkerFailure, WorkerOutcome, WorkerPhase
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


class Failed(Struct, frozen=True, tag=True, kw_only=True):
    """The last frame of a worker that ends with an error."""

    failure: WorkerFailure
    step: int


class Finished(Struct, frozen=True, tag=True, kw_only=True):
    """The last frame of a worker that is done; its final shard is durable."""

    outcome: WorkerOutcome


FromWorker = Hello | Rendezvous | Progress | ShardDurable | ShardAbandoned | Failed | Finished


# --- agent -> worker -------------------------------------------------------------------------------------------


class RendezvousKeys(Struct, frozen=True, tag=True, kw_only=True):
    """Keys that other ranks of the same generation published."""

    keys: dict[str, bytes]


class Stop(Struct, frozen=True, tag=True, kw_only=True):
    """Agree with the other ranks on the next step boundary, save a final checkpoint there, finish."""


ToWorker = RendezvousKeys | Stop

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: FromWorker | ToWorker | WorkerPlan) -> bytes:
    """Length prefix (4 bytes, big-endian) and MessagePack body.

    Raises:
        ValueError: the body is over ``MAX_FRAME_BYTES``.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"control frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body
