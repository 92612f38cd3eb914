"""Which jobs a node holds history of, on disk: how large each is, when it was last written, which had to make room.

On disk: ``<directory>/<job_id>/``; an empty ``<job_id>.evicted`` remembers a job whose history had to make room, a
``<job_id>.removed`` is on its way out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from distroml.runtime.store import retention
from distroml.runtime.store.records import valid_id

EVICTED, REMOVED = ".evicted", ".removed"


class Holdings:
    """The directory of a store, job by job.

    Args:
        directory: made if missing.
        doom: has files or directories removed in the background.
        clock: Unix seconds.
    """

    def __init__(
        self,
        directory: Path,
        *,
        doom: Callable[[Iterable[Path]], None],
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._doom = doom
        self._clock = clock
        self.touched: dict[str, float] = {}
        """When each job that has history here was last written."""
        self.sizes: dict[str, int] = {}
        """Bytes of each job, as far as they were measured."""
        self.total_bytes = 0
        self.evicted: set[str] = set()
        self._find()

    def _find(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for entry in self._directory.iterdir():
            if entry.name.endswith(REMOVED):
                self._doom([entry])
            elif entry.name.endswith(EVICTED):
                self.evicted.add(entry.name.removesuffix(EVICTED))
            elif valid_id(entry.name):
                self.touched[entry.name] = entry.stat().st_mtime
        for job_id in self.evicted & self.touched.keys():
            self.let_go(job_id)  # died between the mark and the removal

    async def measure(self) -> None:
        """Learn how large each job is; one whose size becomes known meanwhile keeps that."""
        sizes = await asyncio.to_thread(retention.measure, self._directory, list(self.touched))
        for job_id, size in sizes.items():
            if job_id in self.touched and job_id not in self.sizes:
                self.resize(job_id, size)

    def path(self, job_id: str) -> Path:
        """Directory of a job."""
        return self._directory / job_id

    def add(self, job_id: str) -> Path:
        """Make the directory of a new job. Raises OSError."""
        self.path(job_id).mkdir(exist_ok=True)
        self.touch(job_id)
        return self.path(job_id)

    def touch(self, job_id: str) -> None:
        """A job was written just now."""
        self.touched[job_id] = self._clock()

    def resize(self, job_id: str, size_bytes: int) -> None:
        """A job has another size than before."""
        self.total_bytes += size_bytes - self.sizes.get(job_id, 0)
        self.sizes[job_id] = size_bytes

    def mark_evicted(self, job_id: str) -> None:
        """Remember that a job had to make room; ``let_go`` then removes its files."""
        with contextlib.suppress(OSError):  # then it is forgotten at the next start
            (self._directory / f"{job_id}{EVICTED}").mkdir(exist_ok=True)
        self.evicted.add(job_id)

    def forget_eviction(self, job_id: str) -> None:
        """The job itself is gone, so nobody will ask."""
        if job_id in self.evicted:
            self.evicted.discard(job_id)
            self._doom([self._directory / f"{job_id}{EVICTED}"])

    def let_go(self, job_id: str) -> None:
        """Remove a job's files."""
        self.total_bytes -= self.sizes.pop(job_id, 0)
        if self.touched.pop(job_id, None) is None:
            return
        # renamed at once, so that a crash before the removal does not bring it back
        gone = self._directory / f"{job_id}{REMOVED}"
        try:
            self.path(job_id).rename(gone)
        except OSError:  # an earlier one of this name is still being removed
            self._doom([self.path(job_id)])
        self._doom([gone])
