"""What peers have more of than this node, and what it asks of whom: the pulling half of ``replication``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from distroml.runtime.store import sync
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.sync import Chunk, Offer, Pull, Records, Span, Want

PULLS_PER_PEER = 2
PULL_TIMEOUT_S = 5.0
SKIP_AFTER_S = 10.0
"""How long to look for records that a peer has dropped, before going on without them."""
MAX_OFFERS = 2048
"""Remembered per peer; what is beyond comes up again at the next comparison."""


@dataclass(slots=True)
class ReplicationCounts:
    """What happened, for ``/metrics``."""

    pushed: int = 0
    push_dropped: int = 0
    pulled: int = 0
    served: int = 0
    skipped: int = 0
    timeouts: int = 0
    malformed: int = 0


@dataclass(slots=True)
class _InFlight:
    peer: str
    wants: dict[StreamKey, Want]
    deadline: float


class Pulls:
    """Asks for what peers offered, in bounded chunks.

    Args:
        urgent: ids of jobs that somebody waits for.
        known_jobs: ids of the jobs that exist by the replicated state; others are refused.
        reachable: names of the peers that are connected.
        send: sends a pull to a peer; False where it cannot.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: HistoryStore,
        counts: ReplicationCounts,
        *,
        urgent: Callable[[], Collection[str]],
        known_jobs: Callable[[], Collection[str]],
        reachable: Callable[[], list[str]],
        send: Callable[[str, Pull], bool],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._counts = counts
        self._urgent = urgent
        self._known_jobs = known_jobs
        self._reachable = reachable
        self._send = send
        self._clock = clock
        self._offers: dict[str, dict[StreamKey, Offer]] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._next_pull = 1

    def note(self, peer: str, span: Span) -> None:
        """Remember that ``peer`` has more of a stream, or that it has not."""
        offers = self._offers.setdefault(peer, {})
        wanted = self._wanted(span.key)
        if wanted is None or span.next <= wanted:
            offers.pop(span.key, None)
            return
        before = offers.get(span.key)
        if before is None and len(offers) >= MAX_OFFERS and span.key.job_id not in self._urgent():
            return
        since = before.since if before else self._clock()
        offers[span.key] = Offer(span.first, span.next, since)

    def pump(self) -> None:
        """Ask for what is missing, as far as pulls in flight and the disk allow; give up on late answers."""
        now = self._clock()
        for number, pull in list(self._in_flight.items()):
            if pull.deadline <= now:
                self._counts.timeouts += 1
                self._end(number, answered=False)
        if self._store.pending_bytes > self._store.limits.pending_bytes // 2:
            return
        slots = dict.fromkeys(self._reachable(), PULLS_PER_PEER)
        for pull in self._in_flight.values():
            if pull.peer in slots:
                slots[pull.peer] -= 1
        if not any(slots.values()):
            return
        mine: dict[StreamKey, int] = {}
        for offers in self._offers.values():
            for key in offers:
                if (wanted := self._wanted(key)) is not None:
                    mine[key] = wanted
        busy = {key for pull in self._in_flight.values() for key in pull.wants}
        plan = sync.plan_pulls(
            mine, self._offers, busy, slots, now - SKIP_AFTER_S, first=self._urgent()
        )
        for peer, wants in plan:
            number = self._next_pull
            if self._send(peer, Pull(number, wants)):
                self._next_pull += 1
                by_key = {want.key: want for want in wants}
                self._in_flight[number] = _InFlight(peer, by_key, now + PULL_TIMEOUT_S)

    def take(self, peer: str, message: Records) -> None:
        """Records came: those that were asked for, or (number 0) what ``peer`` has just written itself."""
        pull = self._in_flight.get(message.number)
        if pull is not None and pull.peer != peer:
            pull = None
        for chunk in message.chunks:
            key = chunk.span.key
            if chunk.records and self._wanted(key) is not None:
                want = pull.wants.get(key) if pull else None
                self._append(chunk, skip=want is not None and want.skip)
            self.note(peer, chunk.span)
        if pull is not None:
            empty = not any(chunk.records for chunk in message.chunks)
            self._end(message.number, answered=not empty)

    def forget(self, job_id: str) -> None:
        """A job was removed."""
        for offers in self._offers.values():
            for key in [key for key in offers if key.job_id == job_id]:
                del offers[key]

    def link_changed(self, peer: str) -> None:
        """The link with ``peer`` came up or went down: what it said and was asked for is void."""
        self._offers.pop(peer, None)
        for number in [n for n, pull in self._in_flight.items() if pull.peer == peer]:
            self._end(number, answered=False)

    def _wanted(self, key: StreamKey) -> int | None:
        """The next sequence number that this node lacks; None for what it does not keep.

        A job that is not known here yet is asked for by the first comparison after it is.
        """
        return self._store.wanted(key) if key.job_id in self._known_jobs() else None

    def _append(self, chunk: Chunk, skip: bool) -> None:
        key = chunk.span.key
        if (
            skip
            and chunk.span.first == chunk.from_seq
            and chunk.from_seq > self._store.next_seq(key)
        ):
            self._store.skip_to(key, chunk.from_seq)
            self._counts.skipped += 1
        before = self._store.next_seq(key)
        self._store.append(key, chunk.from_seq, chunk.records, local=False)
        self._counts.pulled += self._store.next_seq(key) - before

    def _end(self, number: int, answered: bool) -> None:
        """Without an answer of use the peer's offers count as withdrawn until it makes them again."""
        pull = self._in_flight.pop(number)
        if not answered:
            offers = self._offers.get(pull.peer, {})
            for key in pull.wants:
                offers.pop(key, None)
