"""The leader's writes to checkpoint stores: the manifest before each commit, ``LATEST`` after it.

``runtime.coordinator`` says when a checkpoint is whole; this carries it out, in threads per store, so that one that
hangs holds up nothing else. What a leader leaves unfinished its successor does again: the same shards give the
same manifest, and only the log entry is the commit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from msgspec import Struct

from distroml.commands import AnyCommand, CommitCheckpoint, Outcome
from distroml.consensus.state import ClusterState
from distroml.errors import DistroMLError, StoreError, TooManyRequests, Unavailable
from distroml.runtime.checkpoint.commit import UnfitShards, publish_latest, write_manifest
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.checkpoint.stores.threads import StoreThreads
from distroml.runtime.decisions import WriteManifest
from distroml.runtime.facts import CheckpointKey

PROPOSE_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.5
"""After the first attempt that failed; doubles with each that follows."""
RETRY_LIMIT_S = 5.0
PATIENCE_S = 60.0
"""For how long a store may fail until a checkpoint is given up; the next one has its own chance."""
LAST_PATIENCE_S = 150.0
"""The same for the state that a generation ends with; shorter than ``final_commit_wait_s``, so that a run that has to
do without can say why."""
MAX_WRITE_FAILURES = 256
STORE_THREADS = 4
"""Per store."""
WRITE_LIMIT_S = 120.0
"""How long one attempt may take, waiting for others at the same store included."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Trouble(Struct, frozen=True):
    """Attempts at one checkpoint that failed."""

    since_s: float
    """When the first one did (monotonic)."""
    attempts: int


class Committer:
    """Writes manifests and proposes the commits.

    A store that fails may be back in a moment, and what it holds may be the end of a run: the same is tried again, with
    growing pauses, for as long as the leader decides it again and patience lasts.

    Args:
        state: what the log says now.
        is_deleting: whether a directory is being deleted by this node, which judged it when another checkpoint was good.
        done: called after each attempt, and the pause behind one that failed: there is something to decide.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        state: Callable[[], ClusterState],
        propose: Callable[[AnyCommand, float], Awaitable[Outcome]],
        done: Callable[[], None],
        is_deleting: Callable[[str], bool] = lambda directory: False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores, self._state = stores, state
        self._propose, self._done, self._monotonic = propose, done, monotonic
        self._is_deleting = is_deleting
        self._threads = StoreThreads("commit", STORE_THREADS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing: set[CheckpointKey] = set()
        self._failures: dict[CheckpointKey, str] = {}
        self._troubles: dict[CheckpointKey, _Trouble] = {}
        self._times_led = 0
        self._latest_due: set[str] = set()
        self._publishing: set[str] = set()

    @property
    def writing(self) -> frozenset[CheckpointKey]:
        """Checkpoints whose manifest or commit is under way."""
        return frozenset(self._writing)

    @property
    def failures(self) -> dict[CheckpointKey, str]:
        """Checkpoints that could not be committed, with the reason."""
        return self._failures

    def forget_failures(self) -> None:
        """This node leads no more; its successor tries for itself."""
        self._failures.clear()
        self._troubles.clear()
        self._times_led += 1

    async def stop(self) -> None:
        """Leave what is under way to the next leader."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.close()

    def commit(self, effect: WriteManifest) -> None:
        """Write the manifest of a whole checkpoint, then propose its commit, unless that is under way."""
        key = (effect.job_id, effect.generation, effect.step)
        if key not in self._writing:
            self._writing.add(key)
            _log.info("job %s: checkpoint of step %d is whole", effect.job_id, effect.step)
            self._start(self._commit(key, effect))

    def committed(self, job_id: str) -> None:
        """The log has a new checkpoint of this job: it becomes the ``LATEST`` of its run."""
        self._latest_due.add(job_id)
        if job_id not in self._publishing:
            self._publishing.add(job_id)
            self._start(self._publish_latest(job_id))

    async def _commit(self, key: CheckpointKey, effect: WriteManifest) -> None:
        times_led = self._times_led
        try:
            outcome = await self._write(effect)
            self._troubles.pop(key, None)
            if outcome.error:
                self._give_up(key, f"the commit was refused: {outcome.detail}")
        except (Unavailable, TooManyRequests) as error:
            _log.warning("commit of %s is tried again: %s", key, error)
            await asyncio.sleep(RETRY_PAUSE_S)
        except UnfitShards as error:
            self._give_up(key, str(error))
        except (DistroMLError, OSError) as error:
            if times_led == self._times_led:
                await self._try_again(key, error, LAST_PATIENCE_S if effect.last else PATIENCE_S)
        except Exception as error:
            _log.exception("the manifest of %s could not be written", key)
            self._give_up(key, f"{type(error).__name__}: {error}")
        finally:
            self._writing.discard(key)
            self._done()

    async def _write(self, effect: WriteManifest) -> Outcome:
        """One attempt: the manifest, then the proposal."""
        directory = checkpoint_directory(effect.job_id, effect.run_id, effect.step)
        if self._is_deleting(directory):  # a shard that was found there may be about to go
            raise StoreError(f"What lay in {directory} before is still being deleted.")
        checkpoint = await self._threads.run(
            effect.store,
            partial(
                write_manifest,
                self._stores.of(effect.store),
                job_id=effect.job_id,
                run_id=effect.run_id,
                generation=effect.generation,
                shards=effect.shards,
                committed_at=time.time(),
                best_metric=effect.best_metric,
                store_name=effect.store,
                scattered=effect.store == LOCAL,
            ),
            WRITE_LIMIT_S,
        )
        command = CommitCheckpoint(
            job_id=effect.job_id, generation=effect.generation, checkpoint=checkpoint
        )
        return await self._propose(command, PROPOSE_TIMEOUT_S)

    async def _try_again(self, key: CheckpointKey, error: Exception, patience_s: float) -> None:
        """Pause, so that the next turn decides the same again; give up where that has gone on for too long."""
        now_s = self._monotonic()
        before = self._troubles.pop(key, _Trouble(now_s, 0))
        if now_s - before.since_s >= patience_s:
            self._give_up(key, str(error))
            return
        trouble = _Trouble(before.since_s, before.attempts + 1)
        _remember(self._troubles, key, trouble)
        _log.warning("the manifest of %s is written again soon: %s", key, error)
        await asyncio.sleep(pause_s(trouble.attempts))

    def _give_up(self, key: CheckpointKey, reason: str) -> None:
        _log.error("checkpoint %s could not be committed: %s", key, reason)
        self._troubles.pop(key, None)
        _remember(self._failures, key, reason)

    async def _publish_latest(self, job_id: str) -> None:
        """Until ``LATEST`` of the job names the newest; commits meanwhile are one more round, not one each."""
        try:
            while job_id in self._latest_due:
                self._latest_due.discard(job_id)
                job = self._state().jobs.get(job_id)
                newest = job.newest_checkpoint() if job else None
                if newest is not None:
                    write = partial(publish_latest, self._stores.of(newest.store), newest)
                    await self._threads.run(newest.store, write, WRITE_LIMIT_S)
        except Exception as error:
            # LATEST is a convenience for people; the log is what recovery reads.
            _log.warning("LATEST of %s could not be updated: %s", job_id, error)
        finally:
            self._publishing.discard(job_id)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def pause_s(failures: int) -> float:
    """Before the next attempt, after so many that failed."""
    return min(RETRY_LIMIT_S, RETRY_PAUSE_S * 2.0 ** min(failures - 1, 16))


def _remember(known: dict[CheckpointKey, _T], key: CheckpointKey, value: _T) -> None:
    """The oldest make room."""
    while len(known) >= MAX_WRITE_FAILURES:
        del known[next(iter(known))]
    known[key] = value
