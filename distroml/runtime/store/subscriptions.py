"""Live ends of a job's history: what was just written, for those who follow it.

The store pushes and never waits; a follower that falls behind its bounded queue is cut off with ``slow`` set and
can go on from the disk (``cursors.Follower`` does so).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from msgspec import Struct

from distroml.runtime.store.records import StreamKey

MAX_QUEUED_BYTES = 1024 * 1024
MAX_QUEUED_BATCHES = 4096
RECORD_OVERHEAD_BYTES = 64
"""What a queued record is charged on top of its length."""


class Written(Struct, frozen=True):
    """Records of one stream that have just become readable, in order."""

    key: StreamKey
    first_seq: int
    records: list[bytes]

    @property
    def next_seq(self) -> int:
        return self.first_seq + len(self.records)


class Subscription:
    """A bounded queue of ``Written`` of one job; ends when closed, when the job goes, or when too slow.

    Args:
        max_bytes: content (with overhead) after which this subscriber counts as slow.
    """

    def __init__(self, job_id: str, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.job_id = job_id
        self.slow = False
        self.closed = False
        self._max_bytes = max_bytes
        self._queue: deque[Written] = deque()
        self._queued_bytes = 0
        self._changed = asyncio.Event()

    def push(self, written: Written) -> None:
        """Called by the store; drops everything and ends the subscription when it is over its limit."""
        if self.closed:
            return
        self._queued_bytes += _cost(written)
        self._queue.append(written)
        if self._queued_bytes > self._max_bytes or len(self._queue) > MAX_QUEUED_BATCHES:
            self.slow = True
            self._queue.clear()
            self.close()
        self._changed.set()

    def close(self) -> None:
        """End it; what is queued can still be taken."""
        self.closed = True
        self._changed.set()

    def take(self) -> Written | None:
        """The next batch if there is one now."""
        if not self._queue:
            self._changed.clear()
            if self.closed:
                self._changed.set()
            return None
        written = self._queue.popleft()
        self._queued_bytes -= _cost(written)
        return written

    async def get(self) -> Written | None:
        """The next batch; None when the subscription has ended (look at ``slow``)."""
        while (written := self.take()) is None:
            if self.closed:
                return None
            await self._changed.wait()
        return written

    def __aiter__(self) -> AsyncIterator[Written]:
        return self

    async def __anext__(self) -> Written:
        if (written := await self.get()) is None:
            raise StopAsyncIteration
        return written


def _cost(written: Written) -> int:
    return sum(map(len, written.records)) + RECORD_OVERHEAD_BYTES * len(written.records)
