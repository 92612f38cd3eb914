"""What the workers of this node need of copies: shards that are safe, and checkpoints that are here.

A shard that a worker has made durable on this node is taken for durable only once others have it too; until then the
agent keeps the word of it to itself. Training does not wait for that. Before a restore the worker asks for the files.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from distroml.errors import DistroMLError
from distroml.model import Job
from distroml.reports import ShardFact, kind_of
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.checkpoint.stores.opening import LOCAL
from distroml.runtime.control import (
    CheckpointHere,
    FromWorker,
    NeedCheckpoint,
    ShardAbandoned,
    ShardDurable,
)
from distroml.runtime.local_worker import LocalWorker
from distroml.runtime.replicas.bringing import Bringer
from distroml.runtime.replicas.keeping import Keeper
from distroml.runtime.replicas.wire import File

MAX_WAITING = 4
"""Shards of one rank whose copies are not made yet; a further one is given up, lest disks fill with what lags behind."""

_log = logging.getLogger(__name__)


class ForWorkers:
    """The duties towards local workers; all of it in the event loop.

    Args:
        keeper: None, as ``bringer``: there are no other nodes.
    """

    def __init__(self, keeper: Keeper | None, bringer: Bringer | None) -> None:
        self._keeper, self._bringer = keeper, bringer
        self._waiting: dict[tuple[str, int], int] = {}
        """Shards on their way to other nodes, by run and rank."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        """Leave it to the next agent, which hears of all shards again."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def takes(
        self,
        local: LocalWorker,
        job: Job | None,
        message: FromWorker,
        changed: Callable[[], None],
    ) -> bool:
        """Take a message of a worker if it is for this part.

        Args:
            job: the worker's, as the log knows it.
            changed: called when the worker's fact has changed.
        """
        match message:
            case ShardDurable() if job is not None and self.must_secure(job):
                self._take_shard(local, job, message, changed)
            case NeedCheckpoint():
                self.supply(message, partial(_answer, local))
            case _:
                return False
        return True

    def _take_shard(
        self, local: LocalWorker, job: Job, message: ShardDurable, changed: Callable[[], None]
    ) -> None:
        """Keep the word of a shard back until other nodes have it too."""
        step = message.shard.step

        def settled(problem: str) -> None:
            word: ShardDurable | ShardAbandoned = message
            if problem:
                word = ShardAbandoned(generation=message.generation, step=step, reason=problem)
            local.end_copying(step, word)
            changed()

        local.begin_copying(step)
        changed()
        self.secure(job, message.shard, settled)

    def must_secure(self, job: Job) -> bool:
        """Whether shards of a job must be on other nodes before they count."""
        if self._keeper is None or job.spec.checkpointing.store != LOCAL:
            return False
        return self._keeper.copies_for(job.job_id) > 0

    def secure(self, job: Job, shard: ShardFact, then: Callable[[str], None]) -> None:
        """Have other nodes keep a shard, then call ``then``, with why it was given up or ""."""
        owner = (job.run_id, shard.rank)
        if self._waiting.get(owner, 0) >= MAX_WAITING:
            then(f"rank {shard.rank}: {MAX_WAITING} shards are still being copied to other nodes")
            return
        self._waiting[owner] = self._waiting.get(owner, 0) + 1
        self._start(self._secure(job, shard, owner, then))

    def supply(self, need: NeedCheckpoint, answer: Callable[[CheckpointHere], None]) -> None:
        """Have the files here that a worker asks for, then answer."""
        if self._bringer is None:
            answer(CheckpointHere(number=need.number))
        else:
            self._start(self._supply(self._bringer, need, answer))

    async def _secure(
        self, job: Job, shard: ShardFact, owner: tuple[str, int], then: Callable[[str], None]
    ) -> None:
        directory = checkpoint_directory(job.job_id, job.run_id, shard.step)
        file = File(f"{directory}/{shard.file}", shard.sha256, shard.size_bytes)
        assert self._keeper is not None  # or nothing is to be secured
        try:
            await self._keeper.keep(file, job.job_id)
        finally:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner]
        then("")

    async def _supply(
        self, bringer: Bringer, need: NeedCheckpoint, answer: Callable[[CheckpointHere], None]
    ) -> None:
        answered = CheckpointHere(number=need.number)
        try:
            if need.manifest_only:
                await bringer.manifest(need.checkpoint)
            else:
                await bringer.bring(need.checkpoint, mend=need.mend)
        except DistroMLError as error:
            _log.error("a worker's checkpoint is not here: %s", error.detail)
            answered = CheckpointHere(number=need.number, problem=error.detail, kind=kind_of(error))
        answer(answered)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("copies for a worker failed", exc_info=error)


def _answer(local: LocalWorker, here: CheckpointHere) -> None:
    if local.link is not None:
        local.link.send(here)


ALONE = ForWorkers(None, None)
"""For the workers of a node without others: their shards are safe, and what they ask for is here."""
