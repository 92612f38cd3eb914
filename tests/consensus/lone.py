"""One core whose peers are played by the test: messages in, messages out, our own clock."""

from __future__ import annotations

import random
from typing import Any

from distroml.consensus.messages import (
    AppendReply,
    Message,
    VoteGranted,
    VoteReply,
    decode,
    encode,
)
from distroml.consensus.raft_core import RaftCore, Turn
from distroml.consensus.raft_log import LogImage, blank_image
from distroml.consensus.raft_types import (
    RaftSettings,
    Role,
)
from distroml.consensus.snapshot import Snapshot
from distroml.consensus.storage import Recovered
from tests.consensus.ledger import Ledger

THREE = ("a", "b", "c")
FIVE = ("a", "b", "c", "d", "e")
NONCE = 77
"""Of the blank directories of a's peers."""


def sent_in(turn: Turn) -> list[tuple[str, Message]]:
    """All messages of a turn, in the order in which they leave."""
    return [*turn.early, *turn.messages]


class Lone:
    """One core, node a, whose peers are played by the test."""

    def __init__(
        self,
        voters: tuple[str, ...] = THREE,
        *,
        image: LogImage | None = None,
        snapshot: Snapshot | None = None,
        settings: RaftSettings | None = None,
    ) -> None:
        self.now = 100.0
        self.ledger = Ledger()
        self.settings = settings or RaftSettings()
        self.core = RaftCore(
            name="a",
            voters=voters,
            settings=self.settings,
            machine=self.ledger,
            recovered=Recovered(image or blank_image(), snapshot, []),
            clock=lambda: self.now,
            rng=random.Random(7),
        )
        self.first = self.turn(lambda: [self.core.set_link(p, True) for p in voters if p != "a"])
        self.last: Turn = self.first

    @property
    def raft(self) -> Any:
        return self.core.raft

    @property
    def indexes(self) -> list[tuple[int, int]]:
        return [(index, term) for _, index, term in self.raft.log.entries]

    def turn(self, action: Any = None) -> Turn:
        self.core.begin()
        if action is not None:
            action()
        self.last = self.core.finish_turn()
        return self.last

    def wait(self, seconds: float) -> list[Message]:
        """Turns at the times the core asks for, until `seconds` have passed."""
        sent: list[Message] = []
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, max(self.now + 1e-4, self.last.wake_at))
            sent += [message for _, message in sent_in(self.turn())]
        return sent

    def feed(self, peer: str, *messages: Message) -> list[Message]:
        """Delivers messages in one turn; returns what is sent back to that peer."""

        def deliver() -> None:
            for message in messages:
                self.core.receive(peer, decode(encode(message)))

        return [message for to, message in sent_in(self.turn(deliver)) if to == peer]

    def lead(self) -> int:
        """Wins an election with b's vote (all votes, where nothing is known yet) and commits the no-op; returns the term."""
        self.wait(self.settings.election_max_s)
        for _ in range(50):
            if self.raft.pre_vote_term == self.raft.term + 1:
                break
            self.wait(0.05)
        supporters = self.raft.voters[1 : len(self.raft.voters) // 2 + 1]
        founding = not self.raft.log.proven
        asked = self.raft.voters[1:] if founding else supporters
        nonce = NONCE if founding else 0
        for peer in asked:
            self.feed(peer, VoteReply(self.raft.term + 1, True, self.raft.term, nonce))
        for peer in asked:
            self.feed(peer, VoteGranted(self.raft.term, nonce))
        assert self.core.role is Role.LEADER
        for peer in supporters:
            self.ack(peer)
        self.turn()
        assert self.raft.commit_index == self.raft.log.last_index
        return int(self.raft.term)

    def ack(self, peer: str) -> None:
        self.feed(peer, AppendReply(self.raft.term, True, self.raft.log.last_index + 1))

    def submit(self, *entries: bytes) -> Turn:
        return self.turn(lambda: [self.core.submit(entry) for entry in entries])


def entries(first: int, last: int, term: int, text: bytes = b"x") -> list[tuple[bytes, int, int]]:
    return [(b"\x00%s%d" % (text, index), index, term) for index in range(first, last + 1)]


def image(last: int, term: int, *, proven: bool = True) -> LogImage:
    """A log of entries 2..last, all of `term`."""
    return LogImage([(b"\x01", 1, 0), *entries(2, last, term)], term, None, proven)
