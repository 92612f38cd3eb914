"""Who waits for news of which job: a wake-up per reader, who pulls what there is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Wakes:
    """The wake-ups of those who watch jobs."""

    def __init__(self) -> None:
        self._by_job: dict[str, set[asyncio.Event]] = {}

    @property
    def jobs(self) -> set[str]:
        """Those that somebody watches."""
        return set(self._by_job)

    def wake(self, job_id: str) -> None:
        """There is something new of a job."""
        for wake in self._by_job.get(job_id, ()):
            wake.set()

    @contextmanager
    def watch(self, job_id: str, wake: asyncio.Event) -> Iterator[None]:
        """Set ``wake`` whenever there is something new of the job; the reader clears it."""
        self._by_job.setdefault(job_id, set()).add(wake)
        try:
            yield
        finally:
            watchers = self._by_job[job_id]
            watchers.discard(wake)
            if not watchers:
                del self._by_job[job_id]
