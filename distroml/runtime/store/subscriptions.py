"""Live ends of a job's history: what was just written, for those who follow it.

The store pushes and never waits; a follower that falls behind its bounded queue is cut off with ``slow`` set and
can go on from the disk (``cursors.Follower`` does so).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from msgspec import Struct

from distroml.errors import TooManyRequests
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


class Subscriptions:
    """All subscriptions of a store, by job.

    Args:
        limit: how many there may be at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_job: dict[str, set[Subscription]] = {}
        self._count = 0
        self._closed = False

    def open(self, job_id: str) -> Subscription:
        """Raises TooManyRequests at the limit."""
        if self._count >= self._limit:
            raise TooManyRequests(
                f"This node already serves {self._limit} streams; use another node or try later."
            )
        subscription = Subscription(job_id)
        if self._closed:
            subscription.close()
            return subscription
        self._by_job.setdefault(job_id, set()).add(subscription)
        self._count += 1
        return subscription

    def end(self, subscription: Subscription) -> None:
        """Harmless if it has ended."""
        subscription.close()
        of_job = self._by_job.get(subscription.job_id, set())
        if subscription in of_job:
            of_job.remove(subscription)
            self._count -= 1
            if not of_job:
                del self._by_job[subscription.job_id]

    def publish(self, written: Written) -> None:
        """Push to all who follow the job; those that are too slow end."""
        for subscription in tuple(self._by_job.get(written.key.job_id, ())):
            subscription.push(written)
            if subscription.slow:
                self.end(subscription)

    def end_job(self, job_id: str) -> None:
        """End all of a job that was removed."""
        for subscription in tuple(self._by_job.get(job_id, ())):
            self.end(subscription)

    def close(self) -> None:
        """End all; later ones are born ended."""
        self._closed = True
        for job_id in tuple(self._by_job):
            self.end_job(job_id)


def _cost(written: Written) -> int:
    return sum(map(len, written.records)) + RECORD_OVERHEAD_BYTES * len(written.records)
