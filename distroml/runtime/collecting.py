"""Deletes the files of checkpoints that nobody needs any more: the hands of ``runtime.garbage``.

Each node looks after its own ``local`` store, the leader after the others. Level-triggered: a run is looked at when
its job has changed since the last look, so what a crash interrupts is done by the next look, on this node or another.

The order of a look is what makes it safe: list the store, then make sure that this node's state is no older than the
listing (``confirm``), then decide, and look at the state again before each deletion. A directory that was listed and
is garbage in a newer state can only be needed again if the newest checkpoint turns out to be corrupt and the run comes
back to this step; then its files are written, and checked at the commit, after the deletion.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.errors import DistroMLError, Unavailable
from distroml.model import Event, Job
from distroml.runtime.checkpoint.manifest import checkpoints_directory
from distroml.runtime.checkpoint.stores.interface import ORPHAN_AGE_S
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.garbage import begun_with, directories_in, garbage, has_orphans, needed

LOOK_S = 2.0
"""Pause between two rounds; a retirement starts one at once."""
JOBS_PER_ROUND = 64
DELETIONS_PER_ROUND = 256
RETRY_S = 30.0
"""How long a run is left alone after its store failed."""
ORPHANS_S = 60.0
"""How long until a run with orphans is looked at again."""
THREADS = 1
"""Deletions take turns: the store is there for training first."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Look(Struct, frozen=True):
    """When a run was looked at last."""

    change_index: int | None
    """Of its job then; None: the store failed, and whether the job changes since makes no difference."""
    again_s: float | None
    """When to look again though nothing changed (monotonic); None: there is no need."""
    sweep_s: float | None = None
    """When what was unfinished at the end of the run is old enough to go (monotonic); None: that was seen to."""


class Collector:
    """Looks after the stores for as long as the node runs.

    Args:
        state: what the log says now.
        leads: whether this node leads; only then it looks after stores that all nodes share.
        confirm: returns once ``state`` has all that was acknowledged before the call; raises where nobody can say.
        grace_s: see ``garbage``.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        state: Callable[[], ClusterState],
        leads: Callable[[], bool],
        confirm: Callable[[], Awaitable[object]],
        grace_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores, self._state, self._leads = stores, state, leads
        self._confirm, self._grace_s, self._monotonic = confirm, grace_s, monotonic
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="garbage")
        self._kicked = asyncio.Event()
        self._looks: dict[str, _Look] = {}
        self._seen_since_s: dict[str, dict[str, float]] = {}
        """First sight of each directory that is not needed, by job."""
        self._landed: set[str] = set()
        """Jobs of which files came from other nodes since they were looked at."""
        self.task: asyncio.Task[None] | None = None
        self.counts = {"deleted": 0, "failed": 0}
        """Directories."""

    def start(self) -> None:
        """Begin the rounds."""
        self.task = asyncio.create_task(self._run(), name="collector")

    async def stop(self) -> None:
        """End them; what is left is found again."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Replica listener: files of what was retired go soon."""
        if any(event.type == "checkpoint_retired" for event in events):
            self._kicked.set()

    def landed(self, path: str) -> None:
        """A file came from another node, perhaps after its directory was deleted here; for any thread."""
        self._landed.add(path.partition("/")[0])

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._kicked.wait()
            self._kicked.clear()
            try:
                await self.round()
            except Unavailable as error:
                _log.debug("no garbage is collected for now: %s", error)
            except Exception:  # one bad look must not end collection
                _log.exception("garbage could not be collected")

    async def round(self) -> None:
        """Look at the runs that are due, as many as fit."""
        state = self._state()
        for known in (self._looks, self._seen_since_s):
            for job_id in [job_id for job_id in known if job_id not in state.jobs]:
                del known[job_id]
        due = [job for job in state.jobs.values() if self._is_due(job)][:JOBS_PER_ROUND]
        found = {job.job_id: await self._list(job) for job in due}
        if not any(listing is not None for listing in found.values()):
            return
        await self._confirm()
        left = DELETIONS_PER_ROUND
        for job_id, listing in found.items():
            job = self._state().jobs.get(job_id)
            if job is not None and listing is not None and left > 0:
                left -= await self._clean(job, listing, left)

    def _is_due(self, job: Job) -> bool:
        if job.spec.checkpointing.store != LOCAL and not self._leads():
            return False
        if not (job.generation or job.removed):
            return False  # it has written nothing here
        look = self._looks.get(job.job_id)
        if job.job_id in self._landed and (look is None or look.change_index is not None):
            return True
        if look is None or (look.again_s is not None and self._monotonic() >= look.again_s):
            return True
        return look.change_index not in (None, job.change_index)

    async def _list(self, job: Job) -> dict[str, int] | None:
        """The run's directories; None where the store cannot tell."""
        try:
            self._landed.discard(job.job_id)
            store = self._stores.of(job.spec.checkpointing.store)
            parent = checkpoints_directory(job.job_id, job.run_id)
            return directories_in(await self._in_thread(partial(store.list, parent)), job)
        except (DistroMLError, OSError) as error:
            self._failed(job.job_id, error)
            return None

    async def _clean(self, job: Job, found: dict[str, int], most: int) -> int:
        """Delete what is garbage of ``found``, at most so many directories; how many were."""
        job_id, now_s = job.job_id, self._monotonic()
        held = needed(job, begun_with(self._state()))
        seen = self._seen_since_s.get(job_id, {})
        seen = {name: seen.get(name, now_s) for name in found if name not in held}
        self._seen_since_s[job_id] = seen
        gone = garbage(job, found, held, seen, now_s, grace_s=self._grace_s)
        deleted = 0
        try:
            store = self._stores.of(job.spec.checkpointing.store)
            for one in gone[:most]:
                if self._is_garbage(job_id, one.directory, found[one.directory]):
                    await self._in_thread(partial(store.delete, one.directory))
                    _log.info("job %s: %s is deleted: %s", job_id, one.directory, one.reason)
                    deleted += 1
            parent = checkpoints_directory(job_id, job.run_id)
            # once a run has ended, nobody writes for it any more in a store that its workers wrote to
            over = job.terminal and not job.imported and job.spec.checkpointing.store != LOCAL
            age = {"min_age_s": 0.0} if over else {}
            await self._in_thread(partial(store.remove_orphans, parent, time.time(), **age))
        except (DistroMLError, OSError) as error:
            self._failed(job_id, error)
        else:
            left = {
                name: step
                for name, step in found.items()
                if name not in {g.directory for g in gone}
            }
            again_s = sweep_s = self._sweep_s(job, now_s, swept=over)
            if len(gone) > most:
                again_s = now_s
            elif has_orphans(job, left, held):
                again_s = now_s + min(ORPHANS_S, max(self._grace_s, LOOK_S))
            self._looks[job_id] = _Look(job.change_index, again_s, sweep_s)
        self.counts["deleted"] += deleted
        return deleted

    def _sweep_s(self, job: Job, now_s: float, *, swept: bool) -> float | None:
        """When what a run had unfinished at its end may be removed; None: it runs, or that was done.

        Args:
            swept: whether this look removed all of it, whatever its age.
        """
        if not job.terminal or swept:
            return None
        look = self._looks.get(job.job_id)
        if look is None or look.change_index != job.change_index:
            return now_s + ORPHAN_AGE_S
        return None if look.sweep_s is None or now_s >= look.sweep_s else look.sweep_s

    def _failed(self, job_id: str, error: Exception) -> None:
        _log.warning("garbage of job %s stays for now: %s", job_id, error)
        self.counts["failed"] += 1
        self._looks[job_id] = _Look(None, self._monotonic() + RETRY_S)

    def _is_garbage(self, job_id: str, directory: str, step: int) -> bool:
        """Whether a directory that was garbage at the last look is so now."""
        state = self._state()
        job = state.jobs.get(job_id)
        if job is None:
            return False
        held, seen = needed(job, begun_with(state)), self._seen_since_s.get(job_id, {})
        now_s = self._monotonic()
        return bool(garbage(job, {directory: step}, held, seen, now_s, grace_s=self._grace_s))

    def _in_thread(self, work: Callable[[], _T]) -> Awaitable[_T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)
