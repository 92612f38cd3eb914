"""Deletes the files of checkpoints that nobody needs any more: the hands of ``runtime.garbage``.

Each node looks after its own ``local`` store, the leader after the others. Level-triggered: a run is looked at when
its job has changed since the last look, so what a crash interrupts is done by the next look, on this node or another.
Stores are looked after side by side, each by a task of its own: one that hangs or is gone keeps no other waiting.

The order of a look is what makes it safe: list the store, then make sure that this node's state is no older than the
listing (``confirm``), then decide, and look at the state again before each deletion, confirmed anew where deletions
take long: whoever was cut off from the others, but not from the store, must not go on by a state that stands still. A
directory that was listed and is garbage in a newer state can only be needed again if the newest checkpoint turns out to
be corrupt and the run comes back to this step; then its files are written, and checked at the commit, after the deletion:
the committer waits for the end of one that takes so long (``is_deleting``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from distroml.consensus.state import ClusterState
from distroml.errors import DistroMLError, StoreError, Unavailable
from distroml.model import Event, Job
from distroml.runtime.checkpoint.manifest import checkpoints_directory
from distroml.runtime.checkpoint.stores.interface import ORPHAN_AGE_S, CheckpointStore
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.checkpoint.stores.threads import StoreThreads
from distroml.runtime.garbage import begun_with, directories_in, garbage, has_orphans, needed

LOOK_S = 2.0
"""Pause between two rounds; a retirement starts one at once."""
SHARED_STORES_AT_ONCE = 8
JOBS_PER_ROUND = 64
"""Of one store."""
DELETIONS_PER_ROUND = 256
"""In one store."""
RETRY_S = 30.0
"""How long a store is left alone after it failed; doubles with each failure until something succeeds."""
RETRY_LIMIT_S = 600.0
CONFIRMED_S = 2.0
"""How old a confirmation may be by which something is deleted."""
CALL_LIMIT_S = 300.0
"""How long a store may take to list or to delete a directory."""
ORPHANS_S = 60.0
"""How long until a run with orphans is looked at again."""
THREADS = 1
"""Per store. Deletions take turns: the store is there for training first."""

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
    at_s: float = 0.0
    """When it was (monotonic)."""


class _Trouble(Struct, frozen=True):
    """A store that failed since the last success."""

    failures: int
    until_s: float
    """How long it is left alone (monotonic)."""


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
        self._confirmed_s = float("-inf")
        self._threads = StoreThreads("garbage", THREADS)
        self._kicked = asyncio.Event()
        self._at_work: dict[str, asyncio.Task[None]] = {}
        """By store."""
        self._looks: dict[str, _Look] = {}
        self._troubles: dict[str, _Trouble] = {}
        """By store."""
        self._deleting: set[str] = set()
        """Directories; those of calls that hang too."""
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
        tasks = [task for task in (self.task, *self._at_work.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.close()

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Replica listener: files of what was retired go soon."""
        if any(event.type == "checkpoint_retired" for event in events):
            self._kicked.set()

    def landed(self, path: str) -> None:
        """A file came from another node, perhaps after its directory was deleted here; for any thread."""
        self._landed.add(path.partition("/")[0])

    def is_deleting(self, directory: str) -> bool:
        """Whether this node has begun to delete it and has not ended, in whichever store."""
        return directory in self._deleting

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._kicked.wait()
            self._kicked.clear()
            try:
                self._begin()
            except Exception:  # one bad look must not end collection
                _log.exception("garbage could not be collected")

    async def round(self) -> None:
        """Look at the runs that are due, as many as fit."""
        await asyncio.gather(*self._begin())

    def _begin(self) -> list[asyncio.Task[None]]:
        """Look after each store that has runs which are due, unless that is under way; the tasks that began."""
        state = self._state()
        self._forget_others(state)
        due: dict[str, list[Job]] = {}
        for job in sorted(filter(self._is_due, state.jobs.values()), key=self._looked_at_s):
            due.setdefault(job.spec.checkpointing.store, []).append(job)
        begun = []
        for name, jobs in due.items():  # whichever waits longest first
            shared = len(self._at_work.keys() - {LOCAL})
            if name not in self._at_work and (name == LOCAL or shared < SHARED_STORES_AT_ONCE):
                task = asyncio.create_task(self._look_after(name, jobs[:JOBS_PER_ROUND]))
                self._at_work[name] = task
                begun.append(task)
        return begun

    def _forget_others(self, state: ClusterState) -> None:
        """What is remembered of jobs and stores that the state does not know any more."""
        for known in (self._looks, self._seen_since_s):
            for job_id in known.keys() - state.jobs.keys():
                del known[job_id]
        self._landed.difference_update(self._landed - state.jobs.keys())
        if self._troubles:
            used = {job.spec.checkpointing.store for job in state.jobs.values()}
            for name in self._troubles.keys() - used:
                del self._troubles[name]

    async def _look_after(self, name: str, jobs: list[Job]) -> None:
        """One round in one store; never raises."""
        try:
            await self._look_at(jobs)
        except Unavailable as error:
            _log.debug("no garbage of %s is collected for now: %s", name, error)
        except Exception:
            _log.exception("garbage of %s could not be collected", name)
        finally:
            del self._at_work[name]

    async def _look_at(self, jobs: list[Job]) -> None:
        """List and clean runs of one store, up to the first failure in either."""
        found: dict[str, dict[str, int]] = {}
        for job in jobs:
            listing = await self._list(job)
            if listing is None:
                break
            found[job.job_id] = listing
        if not found:
            return
        await self._confirm_now()
        left = DELETIONS_PER_ROUND
        for job_id, listing in found.items():
            known = self._state().jobs.get(job_id)
            if known is None:
                continue
            deleted = await self._clean(known, listing, left)
            if deleted is None or deleted >= left:
                break
            left -= deleted

    def _is_due(self, job: Job) -> bool:
        name = job.spec.checkpointing.store
        if name != LOCAL and not self._leads():
            return False
        if not (job.generation or job.removed):
            return False  # it has written nothing here
        trouble = self._troubles.get(name)
        if trouble is not None and self._monotonic() < trouble.until_s:
            return False
        if self._threads.busy(name):
            return False  # nobody waits any more for a call that hangs there
        look = self._looks.get(job.job_id)
        if job.job_id in self._landed and (look is None or look.change_index is not None):
            return True
        if look is None or (look.again_s is not None and self._monotonic() >= look.again_s):
            return True
        return look.change_index not in (None, job.change_index)

    def _looked_at_s(self, job: Job) -> float:
        look = self._looks.get(job.job_id)
        return float("-inf") if look is None else look.at_s

    def _note_landed(self, job_id: str) -> None:
        """What came before this look is owed one that succeeds, what comes from now on another one."""
        if job_id in self._landed:
            self._landed.discard(job_id)
            if (look := self._looks.get(job_id)) is not None:
                self._looks[job_id] = replace(look, again_s=self._monotonic())

    async def _list(self, job: Job) -> dict[str, int] | None:
        """The run's directories; None where the store cannot tell."""
        self._note_landed(job.job_id)
        try:
            store = self._stores.of(job.spec.checkpointing.store)
            parent = checkpoints_directory(job.job_id, job.run_id)
            return directories_in(await self._call(job, partial(store.list, parent)), job)
        except (DistroMLError, OSError) as error:
            self._failed(job, error)
            return None

    async def _clean(self, job: Job, found: dict[str, int], most: int) -> int | None:
        """Delete what is garbage of ``found``, at most so many directories; how many were, None if the store failed."""
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
                await self._make_sure(job)
                if self._is_garbage(job_id, one.directory, found[one.directory]):
                    await self._call(job, partial(self._delete, store, one.directory))
                    _log.info("job %s: %s is deleted: %s", job_id, one.directory, one.reason)
                    deleted += 1
                    self.counts["deleted"] += 1
            parent = checkpoints_directory(job_id, job.run_id)
            # once a run has ended, nobody writes for it any more in a store that its workers wrote to
            over = job.terminal and not job.imported and job.spec.checkpointing.store != LOCAL
            age = {"min_age_s": 0.0} if over else {}
            await self._call(job, partial(store.remove_orphans, parent, time.time(), **age))
        except Unavailable:
            raise
        except (DistroMLError, OSError) as error:
            self._failed(job, error)
            return None
        left = {
            name: step for name, step in found.items() if name not in {g.directory for g in gone}
        }
        again_s = sweep_s = self._sweep_s(job, now_s, swept=over)
        if len(gone) > most:
            again_s = now_s
        elif has_orphans(job, left, held):
            again_s = now_s + min(ORPHANS_S, max(self._grace_s, LOOK_S))
        self._looks[job_id] = _Look(job.change_index, again_s, sweep_s, now_s)
        self._troubles.pop(job.spec.checkpointing.store, None)
        return deleted

    async def _make_sure(self, job: Job) -> None:
        """Return if this node may delete files of the job by its state as it is then.

        Raises:
            Unavailable: nobody can say, or another node leads.
        """
        if self._monotonic() - self._confirmed_s >= CONFIRMED_S:
            await self._confirm_now()
        if job.spec.checkpointing.store != LOCAL and not self._leads():
            raise Unavailable("this node leads no more")

    async def _confirm_now(self) -> None:
        asked_s = self._monotonic()
        await self._confirm()
        self._confirmed_s = max(self._confirmed_s, asked_s)

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

    def _failed(self, job: Job, error: Exception) -> None:
        _log.warning("garbage of job %s stays for now: %s", job.job_id, error)
        self.counts["failed"] += 1
        name, now_s = job.spec.checkpointing.store, self._monotonic()
        before = self._troubles.get(name)
        failures = 1 if before is None else before.failures + 1
        pause_s = min(RETRY_LIMIT_S, RETRY_S * 2.0 ** min(failures - 1, 16))
        self._troubles[name] = _Trouble(failures, now_s + pause_s)
        self._looks[job.job_id] = _Look(None, now_s + RETRY_S, at_s=now_s)

    def _is_garbage(self, job_id: str, directory: str, step: int) -> bool:
        """Whether a directory that was garbage at the last look is so now."""
        state = self._state()
        job = state.jobs.get(job_id)
        if job is None:
            return False
        held, seen = needed(job, begun_with(state)), self._seen_since_s.get(job_id, {})
        now_s = self._monotonic()
        return bool(garbage(job, {directory: step}, held, seen, now_s, grace_s=self._grace_s))

    def _delete(self, store: CheckpointStore, directory: str) -> None:
        """In a thread, which knows when it is over though nobody waits any more."""
        self._deleting.add(directory)
        try:
            store.delete(directory)
        finally:
            self._deleting.discard(directory)

    async def _call(self, job: Job, work: Callable[[], _T]) -> _T:
        name = job.spec.checkpointing.store
        if self._threads.busy(name):  # what is decided now must not be done later
            raise StoreError(f"The checkpoint store {name} has not answered the call before.")
        return await self._threads.run(name, work, CALL_LIMIT_S)
