"""Gets a command into the log exactly once, from any node.

``propose`` wraps the command in an ``Entry`` named by (node, incarnation, sequence) and offers it to the leader,
again after a while or when the leader changes, until this node's own replica applies it. Repeats do no harm: the
state machine applies a name once. So the answer is known as soon as the entry is applied here, which also gives
the caller read-your-writes on this node.

Names are only unique once the cluster knows this incarnation, so nothing else is proposed before ``RegisterNode``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from distroml.commands import (
    MAX_ENTRY_BYTES,
    AnyCommand,
    Entry,
    Outcome,
    RegisterNode,
    Write,
    decode_entry,
    encode_entry,
)
from distroml.consensus.peers import Channel
from distroml.errors import (
    UNDECODABLE,
    InvalidSpec,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
)
from distroml.model import Event

MAX_IN_FLIGHT = 1024
"""Clients' writes of this node that wait for their outcome; far under ``state.MAX_OUTSTANDING``."""
MAX_OWN_IN_FLIGHT = 512
"""The same for what the node itself proposes: a flood of clients must not keep it from forming generations."""
MAX_DECISION_BYTES = 128 * 1024
"""Limit of an encoded entry that no client wrote: a generation of ``spec.MAX_WORKERS`` ranks takes up to 85 KiB."""
RETRY_FIRST_S = 0.5
"""Until an entry that was sent to the leader is sent again: it may have been lost on the way."""
RETRY_MOST_S = 2.0
"""Longest time between two offers, and the time where this node's own log took the entry: such a one is lost only
with leadership, which is told, or where a hand-over of leadership was begun and given up."""


_log = logging.getLogger(__name__)


class _Raft(Protocol):
    @property
    def leader(self) -> str | None: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def term(self) -> int: ...
    def append(self, entry: bytes) -> None: ...


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class _Proposal:
    """An entry that waits for its outcome, and the timer that offers it again."""

    __slots__ = (
        "data", "deadline", "offered", "outcome", "pause_s", "sequence", "term", "timeout_s", "timer",
    )  # fmt: skip

    def __init__(
        self, *, sequence: int, data: bytes, term: int | None, timeout_s: float, deadline: float
    ) -> None:
        self.sequence, self.data, self.term = sequence, data, term
        self.timeout_s, self.deadline = timeout_s, deadline
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.offered = False
        self.pause_s = RETRY_FIRST_S
        self.timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Stops the timer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Proposer:
    """One node's way into the log.

    Args:
        refusal: exception class(es) that ``raft.append`` raises when it cannot take an entry now.
    """

    def __init__(
        self,
        *,
        name: str,
        incarnation: int,
        raft: _Raft,
        links: _Links,
        refusal: tuple[type[Exception], ...],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._incarnation = incarnation
        self._raft = raft
        self._links = links
        self._refusal = refusal
        self._clock = clock
        self._sequence = 0
        self._waiting: dict[int, _Proposal] = {}
        """By sequence, in the order in which they were made."""
        self._writes_waiting = 0
        self.registered = False
        """Set by the node once the cluster knows its incarnation."""
        self.forwarded_dropped = 0
        self.forwarded_unreadable = 0

    async def propose(
        self, command: AnyCommand, timeout_s: float = 10.0, *, term: int | None = None
    ) -> Outcome:
        """Get ``command`` applied and return what the state machine answered.

        Args:
            term: offer it only while this node leads in this term. For decisions of a leader: what one saw
                that was then cut off must not be handed to its successor.

        Raises:
            Unavailable: no leader took it in time; nothing was done.
            OutcomeUnknown: a leader was offered it, but its outcome did not come in time.
            TooManyRequests: as many proposals of this node are waiting as may.
            InvalidSpec: the encoded command is over ``MAX_ENTRY_BYTES`` (``MAX_DECISION_BYTES`` if no client
                wrote it).
        """
        if not self.registered and not isinstance(command, RegisterNode):
            raise Unavailable(f"Node '{self._name}' is not registered yet; nothing was changed.")
        is_write = isinstance(command, Write)
        waiting = self._writes_waiting if is_write else len(self._waiting) - self._writes_waiting
        limit = MAX_IN_FLIGHT if is_write else MAX_OWN_IN_FLIGHT
        if waiting >= limit:
            raise TooManyRequests(f"{limit} writes of this node wait for the log; try again.")
        self._sequence += 1
        proposal = _Proposal(
            sequence=self._sequence,
            data=self._encode(self._sequence, command),
            term=term,
            timeout_s=timeout_s,
            deadline=asyncio.get_running_loop().time() + timeout_s,
        )
        self._waiting[proposal.sequence] = proposal
        self._writes_waiting += is_write
        try:
            self._offer_again(proposal)
            return await proposal.outcome
        finally:
            proposal.end()
            del self._waiting[proposal.sequence]
            self._writes_waiting -= is_write

    def on_applied(self, entry: Entry | None, outcome: Outcome, events: tuple[Event, ...]) -> None:
        """Replica listener: resolves the proposal that this entry was."""
        if entry is None or entry.proposer != self._name or entry.incarnation != self._incarnation:
            return
        proposal = self._waiting.get(entry.sequence)
        if proposal is not None and not proposal.outcome.done():
            proposal.outcome.set_result(outcome)

    def on_leader_change(self) -> None:
        """Offer everything that waits to the new leader at once."""
        for proposal in list(self._waiting.values()):
            self._offer_again(proposal)

    def on_forwarded(self, peer: str, body: bytes) -> None:
        """A follower's entry; taken if this node leads, else its proposer offers it again elsewhere.

        Only what this node reads gets into the log, and in its own words: others may stumble over what it skips.
        """
        if not self._raft.is_leader:
            self.forwarded_dropped += 1
            return
        try:
            entry = decode_entry(body)
        except UNDECODABLE as error:
            self.forwarded_unreadable = total = self.forwarded_unreadable + 1
            level = logging.WARNING if total & (total - 1) == 0 else logging.DEBUG
            _log.log(level, "refused entry %d of %s that cannot be read: %s", total, peer, error)
            return
        if not self._append(encode_entry(entry)):
            self.forwarded_dropped += 1

    def _encode(self, sequence: int, command: AnyCommand) -> bytes:
        settled = next(iter(self._waiting), sequence)  # the lowest: sequences only grow
        entry = Entry(self._name, self._incarnation, sequence, settled, self._clock(), command)
        data = encode_entry(entry)
        limit = MAX_ENTRY_BYTES if isinstance(command, Write) else MAX_DECISION_BYTES
        if len(data) > limit:
            raise InvalidSpec(
                f"the request takes {len(data)} bytes in the log; the limit is {limit}: "
                "shorten its names and options."
            )
        return data

    def _offer_again(self, proposal: _Proposal) -> None:
        """Offers an entry, for the first time or once more, or gives it up; sees to the next time."""
        proposal.end()
        if proposal.outcome.done():
            return
        loop = asyncio.get_running_loop()
        left_s = proposal.deadline - loop.time()
        if left_s <= 0 or not self._may_offer(proposal.term):
            proposal.outcome.set_exception(self._given_up(proposal))
            return
        taken = self._offer(proposal.data)
        proposal.offered = proposal.offered or taken
        here = taken and self._raft.is_leader
        wait_s = RETRY_MOST_S if here else proposal.pause_s
        proposal.timer = loop.call_later(min(wait_s, left_s), self._offer_again, proposal)
        proposal.pause_s = min(proposal.pause_s * 2, RETRY_MOST_S)

    def _given_up(self, proposal: _Proposal) -> Unavailable:
        if proposal.offered:
            return OutcomeUnknown(
                f"The write was handed to the leader but not confirmed within {proposal.timeout_s:g} s; "
                "repeat it with the same Idempotency-Key."
            )
        if not self._may_offer(proposal.term):
            return Unavailable(f"Node '{self._name}' does not lead any more; nothing was changed.")
        return Unavailable(
            f"No leader was reachable within {proposal.timeout_s:g} s; nothing was changed."
        )

    def _may_offer(self, term: int | None) -> bool:
        return term is None or (self._raft.is_leader and self._raft.term == term)

    def _offer(self, data: bytes) -> bool:
        if self._raft.is_leader:
            return self._append(data)
        leader = self._raft.leader
        if leader is None or leader == self._name:
            return False
        return self._links.send(leader, Channel.PROPOSE, data)

    def _append(self, data: bytes) -> bool:
        if not self._raft.is_leader:
            return False
        try:
            self._raft.append(data)
        except self._refusal:
            return False
        return True
