"""The library's private state and methods under typed names: the only place that spells them.

PySyncObj keeps its state in name-mangled attributes. Our overrides read and write them through
these; the hash check in `library.py` guarantees that they exist and mean what we think.
"""

from __future__ import annotations

import operator
import random
from typing import Any, cast

from distroml.consensus.messages import Message, VoteGranted
from distroml.consensus.proofs import nonces_in
from distroml.consensus.raft_log import FIRST_INDEX, RaftLog
from distroml.consensus.raft_types import RaftSettings, StateMachine
from distroml.consensus.snapshot import Snapshot

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
"""The library's role numbers (`_RAFT_STATE`)."""


def _field(name: str) -> Any:
    mangled = f"_SyncObj__{name}"

    def write(self: Any, value: Any) -> None:
        setattr(self, mangled, value)

    # Read some fifty times a turn, so without a frame of Python each.
    return property(operator.attrgetter(mangled), write)


class LibraryFields:
    """State that the library's code and our overrides share. Peers are the library's Node objects."""

    log: RaftLog = _field("raftLog")
    role: int = _field("raftState")
    term: int = _field("raftCurrentTerm")
    voted_for: str | None = _field("votedForNodeId")
    votes: int = _field("votesCount")
    leader_node: Any = _field("raftLeader")
    election_deadline: float = _field("raftElectionDeadline")
    commit_index: int = _field("raftCommitIndex")
    applied_index: int = _field("raftLastApplied")
    next_index: dict[Any, int] = _field("raftNextIndex")
    match_index: dict[Any, int] = _field("raftMatchIndex")
    last_response_at: dict[Any, float] = _field("lastResponseTime")
    heartbeat_at: float = _field("newAppendEntriesTime")
    noop_index: int | None = _field("noopIDx")
    peers: set[Any] = _field("otherNodes")
    connected: set[Any] = _field("connectedNodes")

    # Ours, shared by the parts that `hardening.HardenedRaft` is made of.
    name: str
    voters: tuple[str, ...]
    settings: RaftSettings
    machine: StateMachine
    rng: random.Random
    now: float
    """Monotonic seconds, read once per turn."""
    snapshot: Snapshot | None
    """The newest snapshot, durable or about to be in this very turn."""
    learner: bool
    """This node follows and never votes."""
    others: list[Any]
    """The other voters in name order, so that a run can be repeated exactly."""
    learners: dict[str, Any]
    """Connected learners, on a voter. They are in none of the library's sets that elect or commit."""
    outbox: list[tuple[str, Message]]
    refused: int
    """Messages that no correct peer sends, or that came from a stranger."""

    def grant(self, node: Any, term: int) -> None:
        self.emit(node, VoteGranted(term, self.unproven))

    def emit(self, node: Any, message: Message) -> None:
        """Puts a message into the turn's outbox; it leaves once the turn is on disk."""
        self.outbox.append((node.id, message))

    @property
    def unproven(self) -> int:
        """What this node adds to its answers: the nonce of its directory, 0 where that is proven or never votes."""
        return 0 if self.learner or self.log.proven else self.log.nonce

    def founder_nonce(self, name: str) -> int:
        """The voter's nonce in the entry that founded the cluster; 0 where this log does not hold that entry.

        It is the first entry of all: its leader had none. All other proofs follow a leader's own no-op."""
        entries = self.log.entries
        if len(entries) == 1 or entries[0][1] != FIRST_INDEX:
            return 0
        return nonces_in(entries[1][0]).get(name, 0)

    def followers_in_order(self) -> list[Any]:
        """Everyone that the leader replicates to: voters in name order, then learners."""
        return [*self.others, *self.learners.values()] if self.learners else self.others

    def adopt_term(self, term: int, vote: str | None) -> None:
        """Durable before anything of this turn leaves: it is a record of the log."""
        cast(Any, self)._SyncObj__setCurrentTerm(term, vote)

    def set_role(self, role: int) -> None:
        cast(Any, self)._SyncObj__setState(role)

    def become_leader(self) -> None:
        cast(Any, self)._SyncObj__onBecomeLeader()

    def election_timeout_s(self) -> float:
        return float(cast(Any, self)._SyncObj__generateRaftTimeout())

    def receive_in_library(self, node: Any, message: dict[str, Any]) -> None:
        """Hands a message, in the library's own shape, to the library's own handler."""
        cast(Any, self)._SyncObj__onMessageReceived(node, message)

    def step_down(self, term: int) -> None:
        """Adopts a higher term without a vote in it (Raft, section 5.1)."""
        raise NotImplementedError
