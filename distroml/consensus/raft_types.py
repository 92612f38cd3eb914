"""Words of the consensus core: settings, status, errors and the state machine's contract.

Everything else under `consensus` speaks in these; they depend on nothing but msgspec.
"""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec

MAX_VOTERS = 7
MAX_NAME_BYTES = 255
MAX_SNAPSHOT_BYTES = 512 * 1024 * 1024
"""A snapshot is held in memory while it is streamed, so its size is a limit, not a hope."""


class ConsensusError(Exception):
    """Root of what the consensus core raises."""


class NotLeader(ConsensusError):
    """This node does not lead; `leader` names the one that probably does, or is None."""

    def __init__(self, leader: str | None) -> None:
        self.leader = leader
        where = f"the leader is {leader!r}" if leader else "no leader is known yet, retry"
        super().__init__(f"this node is not the leader: {where}")


class EntryTooLarge(ConsensusError):
    """An entry exceeds the limit of the log."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"entry of {size_bytes} bytes exceeds the limit of {limit_bytes} bytes; "
            "store the payload elsewhere and replicate a reference to it"
        )


class Overloaded(ConsensusError):
    """A bounded queue of the node is full; nothing was accepted, retry later."""


class StorageCorrupt(ConsensusError):
    """What is on disk cannot be trusted; the message says where and what to do."""


class StorageInUse(ConsensusError):
    """Another process holds the data directory."""


class UnsafeLibrary(ConsensusError):
    """The installed Raft library is not the exact source that the overrides were made for."""


class UnreadableEntry(ConsensusError):
    """A committed entry means nothing to this version, yet something to others; the node stops before it."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(
            f"entry {index} of the log is of a newer version of distroml-node ({why}); upgrade this node"
        )


class SafetyViolation(ConsensusError):
    """An invariant of Raft does not hold; the node stops rather than acknowledge anything more."""


class Role(enum.StrEnum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"
    LEARNER = "learner"
    """Follows the log and never votes."""


class RaftSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Timing and limits of one node; all nodes of a cluster should agree on them."""

    election_min_s: float = 0.3
    """Silence of the leader after which a follower may ask for votes."""
    election_max_s: float = 0.6
    """Upper end of the random election timeout."""
    heartbeat_s: float = 0.06
    """Time between an idle leader's messages. The minimum election timeout must exceed 3 of them."""
    check_quorum_s: float = 1.0
    """A leader that has not heard a majority for this long steps down."""
    pre_vote_retry_s: float = 0.1
    """Mean pause between two rounds of pre-votes while no leader is known."""
    link_loss_election_s: float = 0.1
    """After the leader's connection broke, pre-votes start within this time at random."""
    compaction_entries: int = 10_000
    """Applied entries since the last snapshot that trigger the next one."""
    compaction_bytes: int = 64 * 1024 * 1024
    """Bytes of entries in the log that trigger a snapshot before the count is reached."""
    trailing_entries: int = 1_000
    """Entries kept in the log behind a snapshot, so that a follower a little behind needs no snapshot."""
    entry_max_bytes: int = 32 * 1024
    append_batch_bytes: int = 1024 * 1024
    """Payload of one append message, before framing."""
    inflight_entries: int = 8_192
    """Entries sent to a follower and not yet acknowledged, at most."""
    snapshot_chunk_bytes: int = 64 * 1024
    """A chunk counts as a heartbeat where it arrives, so it must pass the slowest link within the election timeout:
    with the defaults that takes 2 Mbit/s."""
    snapshot_window_chunks: int = 32
    """Snapshot chunks sent to a follower and not yet acknowledged, at most."""

    def __post_init__(self) -> None:
        if self.heartbeat_s <= 0:
            raise ValueError(f"heartbeat_s is {self.heartbeat_s}; it must be above 0")
        if self.election_min_s <= 3 * self.heartbeat_s:
            raise ValueError(
                f"election_min_s is {self.election_min_s}; it must exceed 3 * heartbeat_s "
                f"({3 * self.heartbeat_s:.3f}), or a late heartbeat starts an election"
            )
        if self.election_max_s <= self.election_min_s:
            raise ValueError("election_max_s must exceed election_min_s, or votes split for ever")
        if self.check_quorum_s <= self.heartbeat_s:
            raise ValueError("check_quorum_s must exceed heartbeat_s")
        positive = (
            "pre_vote_retry_s",
            "link_loss_election_s",
            "compaction_entries",
            "compaction_bytes",
            "entry_max_bytes",
            "append_batch_bytes",
            "inflight_entries",
            "snapshot_chunk_bytes",
            "snapshot_window_chunks",
        )
        for field in positive:
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be above 0")
        if self.trailing_entries < 0:
            raise ValueError("trailing_entries must not be negative")


class RaftStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What one node knows of itself at one instant."""

    name: str
    role: Role = Role.FOLLOWER
    term: int = 0
    leader: str | None = None
    voters: tuple[str, ...] = ()
    commit_index: int = 0
    applied_index: int = 0
    last_index: int = 0
    log_entries: int = 0
    log_bytes: int = 0
    snapshot_index: int = 0
    snapshot_error: str = ""
    """Why the last snapshot could not be taken, so that the log grows; empty where it could."""
    last_sync_ms: float = 0.0
    """Duration of the last group write + fdatasync."""
    proven: bool = False
    """False while this voter's new data directory counts for nothing (see `proofs`)."""
    awaits: str = ""
    """What must happen before this voter may take part in elections; empty where it may."""
    healthy: bool
    reason: str
    """Why the node is unhealthy; empty when it is well."""


class StateMachine(Protocol):
    """What the log drives. All three run in the event loop and must not block or await."""

    def apply(self, index: int, entry: bytes) -> None:
        """Applies one committed entry. Total: a bad entry is a result, never an exception.

        Except UnreadableEntry, before changing anything: the node stops there.
        """

    def snapshot(self) -> bytes:
        """The whole state, as bytes that `restore` accepts on any node."""

    def restore(self, index: int, blob: bytes) -> None:
        """Replaces the state by `blob`, taken after entry `index`. Raises before changing anything."""


def check_voters(voters: tuple[str, ...]) -> None:
    """Raises ValueError unless `voters` is a usable, static voter set."""
    if not 1 <= len(voters) <= MAX_VOTERS:
        raise ValueError(f"{len(voters)} voters given; a cluster has 1 to {MAX_VOTERS}")
    if len(set(voters)) != len(voters):
        raise ValueError(f"voter names must differ: {', '.join(voters)}")
    for voter in voters:
        if not voter or len(voter.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"voter name {voter!r} must have 1 to {MAX_NAME_BYTES} bytes")
