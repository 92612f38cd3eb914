"""Following a job's history: what is on disk from a position on, then what comes in, without loss or repetition.

A follower pulls; it owns a bounded buffer and nothing ever waits for it. Replay goes generation by generation,
merged by time within one, at a bounded rate. When it has reached the end it subscribes; when the subscription
drops it for being slow (or shows a hole), it goes back to reading from disk.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from typing import NamedTuple

from distroml.runtime.store.cursors import Position, parse_token
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import KINDS, Kind, StreamKey, record_time
from distroml.runtime.store.subscriptions import Subscription, Written

REPLAY_BYTES_PER_S = 16 * 1024 * 1024
"""Bound on what one follower reads from disk, so that many cannot starve the node."""
FIRST_ROUND_BYTES = 16 * 1024
"""Read from disk in one go, all streams of a generation together: little at first, for those who want a page."""
ROUND_BYTES = 256 * 1024
"""Bound of later rounds; each is twice the one before."""
MIN_CHUNK_BYTES = 2 * 1024
STREAMS_PER_TURN = 64
"""Read from disk before others get their turn: a few ms."""


class Entry(NamedTuple):
    """One record as delivered."""

    key: StreamKey
    seq: int
    record: bytes


class _Buffered(NamedTuple):
    """A record read ahead; ``at`` never decreases within a stream, so that sorting keeps its order."""

    at: float
    key: StreamKey
    seq: int
    record: bytes


def merge_ready(
    buffers: Mapping[StreamKey, deque[_Buffered]], more: Collection[StreamKey]
) -> list[Entry]:
    """Take from ``buffers`` what can be delivered in order of time.

    Args:
        more: streams of which later records are still unread; nothing after the last one buffered of each of
            these may be delivered yet.
    """
    until = min(
        (buffer[-1].at for key, buffer in buffers.items() if key in more and buffer),
        default=math.inf,
    )
    ready: list[_Buffered] = []
    for buffer in buffers.values():
        while buffer and buffer[0].at <= until:
            ready.append(buffer.popleft())
    ready.sort(key=lambda item: item[:3])
    return [Entry(item.key, item.seq, item.record) for item in ready]


class Follower:
    """One reader of one job, made by ``follow``; iterate over it or take batches.

    ``ended`` turns true when the store closes or the job is removed. End it with ``close``.
    """

    def __init__(
        self,
        store: HistoryStore,
        position: Position,
        *,
        kinds: tuple[Kind, ...] = KINDS,
        max_bytes_per_s: float = REPLAY_BYTES_PER_S,
    ) -> None:
        self.ended = False
        self._store = store
        self._position = position
        self._kinds = frozenset(kinds)
        self._max_bytes_per_s = max_bytes_per_s
        self._ready: deque[Entry] = deque()
        self._reach: dict[StreamKey, int] = {}
        """Next sequence number to fetch, where that is beyond the position."""
        self._buffers: dict[StreamKey, deque[_Buffered]] = {}
        self._live: Subscription | None = None
        self._round_bytes = FIRST_ROUND_BYTES

    def caught_up(self) -> bool:
        """Whether all that the store has was taken."""
        return not self._ready and not self._unread()

    def cursor(self) -> str:
        """A token to go on from behind the last entry taken, at any node."""
        if self._position.foldable():
            self._position.fold(self._store.heads(self._position.job_id), self._kinds)
        return self._position.token()

    async def batch(self, timeout_s: float | None = None) -> list[Entry]:
        """All entries that can be had at once, waiting up to ``timeout_s`` for the first; [] after that or at the end."""
        await self._fill(timeout_s)
        return [self._take() for _ in range(len(self._ready))]

    def __aiter__(self) -> AsyncIterator[Entry]:
        return self

    async def __anext__(self) -> Entry:
        await self._fill(None)
        if not self._ready:
            raise StopAsyncIteration
        return self._take()

    async def stored(self) -> Entry | None:
        """The next entry that is in the store by now; None when all was taken."""
        while not self._ready:
            if not self._unread():
                return None
            await self._replay()
        return self._take()

    def _take(self) -> Entry:
        entry = self._ready.popleft()
        self._position.advance(entry.key, entry.seq + 1)
        return entry

    def close(self) -> None:
        """End it; harmless if it has ended."""
        self.ended = True
        if self._live is not None:
            self._store.unsubscribe(self._live)
            self._live = None

    async def _fill(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not self._ready and not self.ended:
                    if self._live is None:
                        await self._replay()
                    else:
                        await self._take_live(self._live)
        except TimeoutError:
            return

    # --- live --------------------------------------------------------------------------------------------------

    async def _take_live(self, live: Subscription) -> None:
        written = await live.get()
        if written is None and not live.slow:
            self.close()
            return
        taken = 0
        while written is not None and self._accept(written):
            taken += sum(map(len, written.records))
            if taken >= ROUND_BYTES:
                return
            written = live.take()
            if written is None and not live.slow:
                return
        # cut off for being slow, or records are missing: read on from disk
        self._store.unsubscribe(live)
        self._live = None

    def _accept(self, written: Written) -> bool:
        """Queue what is new of a batch; False where records before it are missing."""
        reach = self._reached(written.key)
        if reach is None or written.next_seq <= reach:
            return True
        if written.first_seq > reach:
            return False
        for seq in range(reach, written.next_seq):
            self._ready.append(Entry(written.key, seq, written.records[seq - written.first_seq]))
        self._reach[written.key] = written.next_seq
        return True

    # --- replay ------------------------------------------------------------------------------------------------

    def _reached(self, key: StreamKey) -> int | None:
        if key.kind not in self._kinds:
            return None
        wanted = self._position.wanted(key)
        return None if wanted is None else max(wanted, self._reach.get(key, 0))

    def _ahead(self, key: StreamKey) -> bool:
        wanted = self._position.wanted(key)
        return wanted is not None and self._reach[key] > wanted

    def _unread(self) -> list[StreamKey]:
        """Streams of which the store has more than was fetched or buffered."""
        found: list[StreamKey] = []
        for key, head in self._store.heads(self._position.job_id).items():
            reach = self._reached(key)
            if reach is not None and (reach < head or self._buffers.get(key)):
                found.append(key)
        return found

    async def _replay(self) -> None:
        unread = self._unread()
        if not unread:
            # nothing can be written between the look at the heads and this line, so nothing is lost
            self._reach = {key: reach for key, reach in self._reach.items() if self._ahead(key)}
            self._live = self._store.subscribe(self._position.job_id)
            return
        oldest = min(key.generation for key in unread)
        group = [key for key in unread if key.generation == oldest]
        chunk = max(MIN_CHUNK_BYTES, self._round_bytes // len(group))
        self._round_bytes = min(2 * self._round_bytes, ROUND_BYTES)
        size = 0
        for number, key in enumerate(group, 1):
            size += self._read_ahead(key, chunk)
            if number % STREAMS_PER_TURN == 0:
                await asyncio.sleep(0)
        heads = self._store.heads(self._position.job_id)
        more = {key for key in group if (self._reached(key) or 0) < heads.get(key, 0)}
        self._ready += merge_ready({key: self._buffers[key] for key in group}, more)
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if buffer}
        await asyncio.sleep(size / self._max_bytes_per_s)

    def _read_ahead(self, key: StreamKey, max_bytes: int) -> int:
        """Refill the buffer of a stream if it is empty; returns the bytes read."""
        buffer = self._buffers.setdefault(key, deque())
        if buffer:
            return 0
        first, head = self._store.span(key)
        reach = max(self._reached(key) or 0, first)
        records = self._store.read(key, reach, max_bytes)
        at = -math.inf
        for seq, record in enumerate(records, reach):
            at = max(at, record_time(key.kind, record))
            buffer.append(_Buffered(at, key, seq, record))
        if records or self._store.first_seq(key) > reach:
            self._reach[key] = reach + len(records)
        else:  # the file cannot be read now: better to go on without than to spin
            self._reach[key] = max(reach, head)
        return sum(map(len, records))


def follow(
    store: HistoryStore,
    job_id: str,
    cursor: str | None = None,
    *,
    kinds: tuple[Kind, ...] = KINDS,
    from_now: bool = False,
) -> Follower:
    """Follow a job from a cursor, from its beginning, or from now on.

    Raises:
        InvalidRequest: the cursor is none, or one of another job.
        TooManyRequests: later, from the first wait, if this node serves too many streams.
    """
    if cursor is not None:
        position = parse_token(cursor, job_id)
    else:
        position = Position.at(job_id, store.heads(job_id) if from_now else {})
    return Follower(store, position, kinds=kinds)
