"""What a node has just written of its own streams, on its way to the peers.

Bounded by forgetting: a push that is dropped here or by a link is noticed by the receiver as a hole, and pulled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from distroml.runtime.store import sync
from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.subscriptions import Written
from distroml.runtime.store.sync import Chunk, Records, Span

MAX_OUTGOING_BYTES = 2 * 1024 * 1024

SpanOf = Callable[[StreamKey], tuple[int, int]]


@dataclass(slots=True)
class Outgoing:
    """What was just written here and not yet pushed; the oldest is dropped beyond the limit."""

    queue: deque[Written] = field(default_factory=deque)
    size_bytes: int = 0

    def add(self, written: Written) -> int:
        """Returns how many older batches had to be dropped for it."""
        self.queue.append(written)
        self.size_bytes += sum(map(len, written.records))
        dropped = 0
        while self.size_bytes > MAX_OUTGOING_BYTES and len(self.queue) > 1:
            self.size_bytes -= sum(map(len, self.queue.popleft().records))
            dropped += 1
        return dropped

    def take(self, span: SpanOf) -> Iterator[Records]:
        """All of it as messages of at most ``MAX_BODY_BYTES`` of records each; ``span`` says what is held in all."""
        taken = tuple(self.queue)
        self.queue.clear()
        self.size_bytes = 0
        return _packed(taken, span)


def _packed(written: Iterable[Written], span: SpanOf) -> Iterator[Records]:
    """Pushes of at most ``MAX_BODY_BYTES`` of records each."""
    chunks: list[Chunk] = []
    room = sync.MAX_BODY_BYTES
    for batch in written:
        first, head = span(batch.key)
        seq = start = batch.first_seq
        for record in batch.records:
            if len(record) > room or len(chunks) >= sync.MAX_CHUNKS - 1:
                if seq > start:
                    chunks.append(_chunk(batch, start, seq, first, head))
                yield Records(0, tuple(chunks))
                chunks, room, start = [], sync.MAX_BODY_BYTES, seq
            room -= len(record)
            seq += 1
        chunks.append(_chunk(batch, start, seq, first, head))
    if chunks:
        yield Records(0, tuple(chunks))


def _chunk(batch: Written, start: int, end: int, first: int, head: int) -> Chunk:
    records = batch.records[start - batch.first_seq : end - batch.first_seq]
    return Chunk(Span(batch.key, first, max(head, end)), start, records)
