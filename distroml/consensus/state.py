"""``ClusterState``: everything the log has agreed on, as one immutable value.

``consensus.machine.apply`` makes the next value from the last one; readers (API, coordinator, supervisor) hold
whichever value they took and are never surprised. Its encoding here is what a snapshot contains.
"""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from distroml.commands import Outcome
from distroml.errors import UNDECODABLE
from distroml.model import ASSIGNED, TERMINAL, Job, JobStatus, Node

STATE_FORMAT = 1
MAX_NODES = 1024
"""Nodes remembered; the one that left or was lost first makes room."""
MAX_JOBS = 20_000
"""Jobs kept, finished ones included; the oldest finished one makes room for a new one."""
MAX_KEYS = 20_000
"""Idempotency keys remembered; the oldest is forgotten first."""
MAX_OUTSTANDING = 4096
"""Unsettled results remembered per proposer; proposers keep fewer in flight."""
MAX_ENDED_BYTES = 256 * 1024 * 1024
"""Encoded jobs that have ended, so that a snapshot of them and the others can always be taken; the oldest make room."""
MAX_INCIDENTS = 64
MAX_ENDED_INCIDENTS = 16
"""Of these, how many are kept once the job has ended: the first and the last ones."""
MAX_CHECKPOINTS = 1000


class ProposerRecord(Struct, frozen=True, array_like=True):
    """Results a proposer may still ask for again, by sequence."""

    incarnation: int
    settled: int = 0
    outcomes: dict[int, Outcome] = {}


class KeyRecord(Struct, frozen=True, array_like=True):
    """What an ``Idempotency-Key`` stood for and what came of it."""

    request_sha256: str
    outcome: Outcome


class ClusterState(Struct, frozen=True, kw_only=True):
    """The replicated state after applying the log up to ``index``."""

    index: int = 0
    jobs: dict[str, Job] = {}
    nodes: dict[str, Node] = {}
    proposers: dict[str, ProposerRecord] = {}
    keys: dict[str, KeyRecord] = {}
    refused: dict[str, int] = {}
    """Entries that had no effect, counted by reason (stale generation, unknown job, ...)."""

    def active_jobs(self) -> list[Job]:
        """Jobs that have not ended, in the order of submission."""
        active = [job for job in self.jobs.values() if job.status not in TERMINAL]
        return sorted(active, key=lambda job: job.submit_index)

    def slots_used(self, *, but_for: str | None = None) -> dict[str, int]:
        """Slots that ranks of current generations occupy, by node; ``but_for`` leaves one job out.

        Spares and the survivors of a failed generation occupy none: they make room where ranks need it.
        """
        used: dict[str, int] = {}
        for job in self.jobs.values():
            if job.status in ASSIGNED and job.generation and job.job_id != but_for:
                places = {(member.node, member.rank) for member in job.generation.members}
                if job.outgoing is not None:
                    places |= {(member.node, member.rank) for member in job.outgoing.members}
                for node, _ in places:
                    used[node] = used.get(node, 0) + 1
        return used

    def counts(self) -> dict[JobStatus, int]:
        """Number of jobs in each status, zeros included."""
        counts = dict.fromkeys(JobStatus, 0)
        for job in self.jobs.values():
            counts[job.status] += 1
        return counts


class _Image(Struct, frozen=True):
    format: int
    state: ClusterState


def encode_state(state: ClusterState) -> bytes:
    """Deterministic MessagePack of a state: equal states give equal bytes."""
    return msgspec.msgpack.encode(_Image(STATE_FORMAT, state))


def decode_state(data: bytes) -> ClusterState:
    """Read a snapshot's state back.

    Raises:
        ValueError: the bytes are not a state of a format that this version reads.
    """
    try:
        image = msgspec.msgpack.decode(data, type=_Image)
    except UNDECODABLE as error:
        raise ValueError(f"the snapshot does not hold a cluster state: {error}") from None
    if image.format != STATE_FORMAT:
        raise ValueError(
            f"the snapshot has state format {image.format}; this version reads {STATE_FORMAT}: "
            "start the version that wrote it"
        )
    return image.state


def digest_state(state: ClusterState) -> str:
    """SHA-256 of a state, to compare replicas: equal states give equal digests.

    Hashed job by job, so that a thread which does this for thousands of jobs gives the others their turn.
    """
    rest = replace(state, jobs={}, keys={})
    digest = hashlib.sha256(encode_state(rest))
    for part in (*state.jobs.items(), *state.keys.items()):
        digest.update(msgspec.msgpack.encode(part))
    return digest.hexdigest()
