"""One Raft node without I/O: inputs in, one `Turn` of effects out.

A *turn* is: inputs (`receive`, `set_link`, `submit`, `request_read`, `transfer`) → `finish_turn` →
the caller sends `Turn.early`, performs `Turn.disk` in order, and sends `Turn.messages`. No input may
be given between `finish_turn` and the end of the disk operations. `raft.py` drives this with sockets and a
sync thread; so do the simulator's processes, with a virtual clock, modelled sockets and disks.

Added to the library here: linearizable reads (ReadIndex) and leadership transfer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import msgspec

from distroml.consensus.hardening import HardenedRaft
from distroml.consensus.library_fields import CANDIDATE, FOLLOWER, LEADER
from distroml.consensus.messages import (
    Append,
    AppendReply,
    Message,
    ReadEcho,
    ReadProbe,
    ReadReply,
    ReadRequest,
    TimeoutNow,
    TransferRequest,
)
from distroml.consensus.raft_log import AppendRecords, DiskOp, EntryRecord
from distroml.consensus.raft_types import (
    EntryTooLarge,
    NotLeader,
    RaftSettings,
    Role,
    StateMachine,
)
from distroml.consensus.storage import Recovered

MAX_READS: Final = 4_096
"""Reads that wait for confirmation on one node, its followers' included."""
TRANSFER_LIMIT_S: Final = 2.0
"""A successor that does not take over within this time is given up; nothing is accepted meanwhile."""
_ANSWERED_HERE: Final = (ReadProbe, ReadEcho, ReadRequest, ReadReply, TransferRequest)
"""Messages that the library knows nothing of."""
_ROLES: Final = {FOLLOWER: Role.FOLLOWER, CANDIDATE: Role.CANDIDATE, LEADER: Role.LEADER}


class Turn(msgspec.Struct):
    """The effects of one turn, in the order in which they must happen."""

    disk: list[DiskOp]
    early: list[tuple[str, Message]]
    """(peer, message): may leave before `disk` is durable."""
    messages: list[tuple[str, Message]]
    """(peer, message): may leave only after `disk` is durable."""
    reads: list[tuple[int, int]]
    """(token, index): local reads that are answered once `index` is applied; 0 means refused."""
    again: bool
    """There is more to do without any further input."""
    wake_at: float
    """Clock time of the next turn at the latest."""


class _Read(msgspec.Struct):
    peer: str | None
    """Follower to answer; None for a read of this node."""
    token: int
    index: int
    nonce: int


def only_entries(disk: list[DiskOp]) -> bool:
    """Whether a turn's disk operations append entries and do nothing else, so that a leader may write
    them while its followers do (Raft dissertation, 10.2.1).

    An append promises that its sender leads its term; that is on disk since the vote. It does not
    promise that the leader has the entries: those count for the commit in a later turn only, and no
    turn begins before this one is durable. A leader that crashes in between never leads this term
    again, so nobody else's entry can take their place in it.
    """
    return bool(disk) and all(
        isinstance(op, AppendRecords) and all(isinstance(one, EntryRecord) for one in op.records)
        for op in disk
    )


class RaftCore:
    def __init__(
        self,
        *,
        name: str,
        voters: tuple[str, ...],
        settings: RaftSettings,
        machine: StateMachine,
        recovered: Recovered,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self.raft = HardenedRaft(
            name=name,
            voters=voters,
            settings=settings,
            machine=machine,
            image=recovered.image,
            snapshot=recovered.snapshot,
            rng=rng,
            now=clock(),
        )
        self.name = name
        self._nonce = 0
        self._reads: list[_Read] = []
        self._echoes: dict[str, int] = {}
        self._forwarded: dict[int, str] = {}
        self._answered: list[tuple[int, int]] = []
        self._probe_wanted = False
        self._probe_at = float("-inf")
        self._successor: str | None = None
        self._successor_told = False
        self._successor_until = 0.0

    # ------------------------------------------------------------------ facts

    @property
    def role(self) -> Role:
        return Role.LEARNER if self.raft.learner else _ROLES[self.raft.role]

    @property
    def leader(self) -> str | None:
        node = self.raft.leader_node
        return None if node is None else node.id

    @property
    def handing_over(self) -> bool:
        """A leadership transfer is under way; nothing is accepted meanwhile."""
        return self._successor is not None

    # ------------------------------------------------------------------ inputs

    def begin(self) -> None:
        """Reads the clock; call it before the inputs of each turn."""
        self.raft.begin(self._clock())

    def receive(self, peer: str, message: Message) -> None:
        if not isinstance(message, _ANSWERED_HERE):
            self.raft.receive(peer, message)
            return
        match message:
            case TransferRequest(target=target):
                known = peer in self.raft.nodes
                if known and self.raft.role == LEADER and not self.handing_over:
                    self.transfer(target)
            case _:
                asks = peer in self.raft.learners and isinstance(message, ReadRequest)
                if peer == self.name or not (asks or peer in self.raft.voters):
                    self.raft.refused += 1
                    return
                self._receive_read(peer, message)

    def receive_heartbeat(self, peer: str, message: Message) -> list[Message] | None:
        """Takes a heartbeat or its acknowledgement between two turns, where it brings nothing new.

        Returns the answers, which may leave at once: nothing changes but when the sender was last heard, and all that
        they promise is durable as long as no turn is under way. None: the message needs a turn like any other.
        """
        raft = self.raft
        node = raft.nodes.get(peer)
        if node is None or peer == self.name:
            return None
        self.begin()
        if type(message) is Append:
            answer = raft.answer_to_heartbeat(node, message)
            return None if answer is None else [answer]
        if type(message) is AppendReply and raft.hears_nothing_new(node, message):
            return []
        return None

    def set_link(self, peer: str, up: bool) -> None:
        self.raft.set_link(peer, up)
        if not up:
            self._refuse_forwarded_to(peer)
            # It gives its reads up too, and must not take an answer for one that it asks in its next life.
            self._reads = [read for read in self._reads if read.peer != peer]

    def check_append(self, entry: bytes) -> None:
        """Raises NotLeader or EntryTooLarge where `submit` would be in vain."""
        if len(entry) > self._settings.entry_max_bytes:
            raise EntryTooLarge(len(entry), self._settings.entry_max_bytes)
        if self.raft.role != LEADER:
            raise NotLeader(self.leader)
        if self._successor is not None:
            raise NotLeader(self._successor)

    def submit(self, entry: bytes) -> None:
        """Puts an entry into this turn's batch; it is dropped if this node does not lead by then."""
        if self._successor is None:
            self.raft.submissions.append(entry)

    def request_read(self, token: int) -> None:
        """Asks for a read index; the answer comes in some `Turn.reads`, or never (time it out)."""
        if self.raft.role == LEADER:
            self._accept_read(None, token)
        elif self.leader is not None and len(self._forwarded) < MAX_READS:
            self._forwarded[token] = self.leader
            self.raft.emit(self.raft.leader_node, ReadRequest(token))
        else:
            self._answered.append((token, 0))

    def cancel_read(self, token: int) -> None:
        self._forwarded.pop(token, None)
        self._reads = [r for r in self._reads if r.peer is not None or r.token != token]

    def transfer(self, target: str | None) -> str | None:
        """Begins handing leadership to `target`, or to the most advanced connected voter.

        Returns who was chosen; None where nobody is connected that may lead. Raises NotLeader.
        """
        raft = self.raft
        if raft.role != LEADER:
            raise NotLeader(self.leader)
        connected = [
            node
            for node in raft.others
            if node in raft.connected and not raft.progress[node].unproven
        ]
        if target is not None:
            connected = [node for node in connected if node.id == target]
        if not connected:
            return None
        best = max(connected, key=lambda node: raft.match_index[node])
        self._successor, self._successor_told = best.id, False
        self._successor_until = raft.now + TRANSFER_LIMIT_S
        raft.send_needed = True
        return self._successor

    def cancel_transfer(self) -> None:
        self._successor = None

    # ------------------------------------------------------------------ the turn

    def finish_turn(self) -> Turn:
        """Runs the library's tick and collects everything the turn has caused."""
        raft = self.raft
        raft.turn()
        if raft.role == LEADER:
            self._advance_transfer()
            self._advance_reads()
        else:
            self._successor = None
            self._refuse_reads()
        self._refuse_stale_forwards()
        messages, raft.outbox = raft.outbox, []
        answered, self._answered = self._answered, []
        disk = raft.log.take_ops()
        early: list[tuple[str, Message]] = []
        if raft.role == LEADER and only_entries(disk):
            early = [sent for sent in messages if isinstance(sent[1], Append)]
            messages = [sent for sent in messages if not isinstance(sent[1], Append)]
        return Turn(
            disk=disk,
            early=early,
            messages=messages,
            reads=answered,
            again=self._more_to_do(),
            wake_at=self._wake_at(),
        )

    def _more_to_do(self) -> bool:
        raft = self.raft
        if raft.applied_index < raft.commit_index:
            return True
        if raft.role != LEADER:
            return False
        alone_and_uncommitted = not raft.peers and raft.commit_index < raft.log.last_index
        return raft.send_needed or alone_and_uncommitted

    def _wake_at(self) -> float:
        raft = self.raft
        return raft.heartbeat_at if raft.role == LEADER else raft.election_deadline

    # ------------------------------------------------------------------ linearizable reads

    def _receive_read(
        self, peer: str, message: ReadProbe | ReadEcho | ReadRequest | ReadReply
    ) -> None:
        raft = self.raft
        node = raft.nodes[peer]
        match message:
            case ReadProbe(term=term, nonce=nonce):
                # Only a node that still is in the leader's term vouches for it, and has not forgotten a newer one.
                if term == raft.term and raft.role != LEADER and not raft.unproven:
                    raft.emit(node, ReadEcho(term, nonce))
            case ReadEcho(term=term, nonce=nonce):
                counts = raft.role == LEADER and not raft.progress[node].unproven
                if term == raft.term and counts:
                    raft.last_response_at[node] = raft.now
                    self._echoes[peer] = max(self._echoes.get(peer, 0), nonce)
            case ReadRequest(token=token):
                if raft.role == LEADER:
                    self._accept_read(peer, token)
                else:
                    raft.emit(node, ReadReply(token, 0))
            case ReadReply(token=token, index=index):
                if self._forwarded.get(token) == peer:
                    del self._forwarded[token]
                    self._answered.append((token, index))

    def _accept_read(self, peer: str | None, token: int) -> None:
        if len(self._reads) >= MAX_READS:
            self._answer(_Read(peer, token, 0, 0))
            return
        self._reads.append(_Read(peer, token, index=0, nonce=0))

    def _advance_reads(self) -> None:
        """Raft dissertation, 6.4: note the commit index, prove leadership, answer."""
        raft = self.raft
        if not self._reads:
            return
        if raft.noop_index is None or raft.commit_index < raft.noop_index:
            return  # until an entry of our own term is committed, our commit index may be stale
        fresh = [read for read in self._reads if read.nonce == 0]
        if fresh:
            self._nonce += 1
            for read in fresh:
                read.index, read.nonce = raft.commit_index, self._nonce
        if fresh or raft.now >= self._probe_at:
            self._probe_at = raft.now + self._settings.heartbeat_s
            for node in raft.others:
                raft.emit(node, ReadProbe(raft.term, self._nonce))
        confirmed = self._confirmed_nonce()
        waiting = []
        for read in self._reads:
            if read.nonce <= confirmed:
                self._answer(read)
            else:
                waiting.append(read)
        self._reads = waiting

    def _confirmed_nonce(self) -> int:
        """The highest nonce that a majority, this node included, has echoed."""
        echoes = sorted((self._echoes.get(node.id, 0) for node in self.raft.others), reverse=True)
        needed = len(self.raft.voters) // 2
        return self._nonce if needed == 0 else echoes[needed - 1]

    def _answer(self, read: _Read) -> None:
        if read.peer is None:
            self._answered.append((read.token, read.index))
        elif read.peer in self.raft.nodes:  # a learner may have gone meanwhile
            self.raft.emit(self.raft.nodes[read.peer], ReadReply(read.token, read.index))

    def _refuse_reads(self) -> None:
        """This node leads no more: nothing it noted can be confirmed. Nonces start a new series."""
        reads, self._reads = self._reads, []
        self._echoes.clear()
        for read in reads:
            self._answer(_Read(read.peer, read.token, 0, 0))

    def _refuse_forwarded_to(self, peer: str) -> None:
        for token in [token for token, to in self._forwarded.items() if to == peer]:
            del self._forwarded[token]
            self._answered.append((token, 0))

    def _refuse_stale_forwards(self) -> None:
        if self._forwarded:
            for peer in {to for to in self._forwarded.values() if to != self.leader}:
                self._refuse_forwarded_to(peer)

    # ------------------------------------------------------------------ leadership transfer

    def _advance_transfer(self) -> None:
        """Raft dissertation, 3.10: once the successor has the whole log, it may campaign at once."""
        raft = self.raft
        if self._successor is None:
            return
        if raft.now > self._successor_until:
            self._successor = None
            return
        if self._successor_told:
            return
        node = raft.nodes[self._successor]
        if raft.match_index[node] == raft.log.last_index and node in raft.connected:
            self._successor_told = True
            raft.emit(node, TimeoutNow(raft.term))
