"""What the workers of this node need of copies: shards that are safe, and checkpoints that are here.

A shard that a worker has made durable on this node is taken for durable only once others have it too, and what was recorded of
the steps up to it; until then the agent keeps the word of it to itself. Training does not wait for that. Before a
restore the worker asks for the files.

An agent that comes back hears of all shards of its workers at once, at a time when its replica may know neither job nor
other nodes yet. It keeps them until it does: who takes itself for alone makes no copies.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

from distroml.consensus.state import ClusterState
from distroml.errors import DistroMLError
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

MAX_UNDER_WAY = 4
"""Shards of one rank whose copies are made at a time."""
MAX_WAITING = 4
"""Further ones of it, the newest; older ones are given up, lest disks fill with what lags behind."""
MAX_KEPT = 64
"""In place of that where nothing is copied, or the log is not known: what an agent that comes back is told of one rank,
and a little."""
SHARE_PATIENCE_S = 2.0
"""For how long a shard waits for the records: they are worth less than it is."""

_log = logging.getLogger(__name__)


class _Shard(NamedTuple):
    """It is durable here."""

    job_id: str
    step: int
    file: File
    then: Callable[[str], None]
    """Called once it counts, with "", or why it was given up."""


class _Line:
    """The shards of one rank, the oldest first."""

    def __init__(self) -> None:
        self.waiting: deque[_Shard] = deque()
        self.under_way = 0


class ForWorkers:
    """The duties towards local workers; all of it in the event loop.

    Args:
        keeper: None, as ``bringer``: there are no other nodes.
        state: what the log says, as far as this node knows it.
        current: whether that is all that was acknowledged before this node began; once true, it stays true.
        shared: returns once other nodes have what this one has recorded of a job by now.
    """

    def __init__(
        self,
        keeper: Keeper | None,
        bringer: Bringer | None,
        state: Callable[[], ClusterState] = ClusterState,
        current: Callable[[], bool] = lambda: True,
        shared: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._keeper, self._bringer = keeper, bringer
        self._state, self._current, self._shared = state, current, shared
        self._lines: dict[tuple[str, int], _Line] = {}
        """By run and rank."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def stop(self) -> None:
        """Leave it to the next agent, which hears of all shards again."""
        self._stopped = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def takes(self, local: LocalWorker, message: FromWorker, changed: Callable[[], None]) -> bool:
        """Take a message of a worker if it is for this part.

        Args:
            changed: called when the worker's fact has changed.
        """
        match message:
            case ShardDurable() if self.must_secure(local.fact.job_id):
                self._take_shard(local, message, changed)
            case NeedCheckpoint():
                self.supply(message, partial(_answer, local))
            case _:
                return False
        return True

    def _take_shard(
        self, local: LocalWorker, message: ShardDurable, changed: Callable[[], None]
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
        self.secure(local.fact.job_id, local.fact.run_id, message.shard, settled)

    def must_secure(self, job_id: str) -> bool:
        """Whether something must be on other nodes before a shard of a job counts, or may have to be."""
        if self._keeper is None:
            return False
        if not self._current():
            return True
        return job_id in self._state().jobs and self._keeper.has_others

    def secure(
        self, job_id: str, run_id: str, shard: ShardFact, then: Callable[[str], None]
    ) -> None:
        """Have other nodes keep a shard, then call ``then``, with why it was given up or ""."""
        directory = checkpoint_directory(job_id, run_id, shard.step)
        file = File(f"{directory}/{shard.file}", shard.sha256, shard.size_bytes)
        owner = (run_id, shard.rank)
        line = self._lines.setdefault(owner, _Line())
        line.waiting.append(_Shard(job_id, shard.step, file, then))
        self._go_on(owner, line)

    def on_applied(self) -> None:
        """The log says something else than before: what waited to know it may go on."""
        if self._current():
            for owner, line in list(self._lines.items()):
                self._go_on(owner, line)

    def _go_on(self, owner: tuple[str, int], line: _Line) -> None:
        """Begin with what waits, as far as that may be."""
        if self._stopped:
            return
        if self._current():
            self._settle_needless(line)
            while line.waiting and line.under_way < MAX_UNDER_WAY:
                line.under_way += 1
                self._start(self._secure(owner, line, line.waiting.popleft()))
        while line.waiting and len(line.waiting) > self._most(line.waiting[0].job_id):
            line.waiting.popleft().then(
                f"rank {owner[1]}: too many newer shards are still to be copied to other nodes"
            )
        if not line.waiting and not line.under_way:
            self._lines.pop(owner, None)

    def _most(self, job_id: str) -> int:
        """How many shards of a rank may wait."""
        return MAX_WAITING if self._current() and self._is_copied(job_id) else MAX_KEPT

    def _is_copied(self, job_id: str) -> bool:
        job = self._state().jobs.get(job_id)
        return job is not None and job.spec.checkpointing.store == LOCAL

    def _settle_needless(self, line: _Line) -> None:
        """Those of steps that are committed or passed, whose files may be gone: most of what is said once more."""
        settled = [one for one in line.waiting if self._is_needless(one)]
        line.waiting = deque(one for one in line.waiting if one not in settled)
        for one in settled:
            one.then("")

    def _is_needless(self, shard: _Shard) -> bool:
        if not self.must_secure(shard.job_id):
            return True
        newest = self._state().jobs[shard.job_id].newest_checkpoint()
        return newest is not None and shard.step <= newest.step

    def supply(self, need: NeedCheckpoint, answer: Callable[[CheckpointHere], None]) -> None:
        """Have the files here that a worker asks for, then answer."""
        if self._bringer is None:
            answer(CheckpointHere(number=need.number))
        else:
            self._start(self._supply(self._bringer, need, answer))

    async def _secure(self, owner: tuple[str, int], line: _Line, shard: _Shard) -> None:
        assert self._keeper is not None  # or nothing is to be secured
        duties: list[Awaitable[object]] = [self._records_shared(shard.job_id)]
        if self._is_copied(shard.job_id):
            duties.append(self._keeper.keep(shard.file, shard.job_id))
        problem = ""
        try:
            await asyncio.gather(*duties)
        except Exception as error:  # a defect; the shard must not count, nor wait for ever
            problem = f"rank {owner[1]}: {type(error).__name__}: {error}"
            raise
        finally:
            line.under_way -= 1
            self._go_on(owner, line)
            if not self._stopped:
                shard.then(problem)

    async def _records_shared(self, job_id: str) -> None:
        if self._shared is None:
            return
        try:
            async with asyncio.timeout(SHARE_PATIENCE_S):
                await self._shared(job_id)
        except TimeoutError:
            _log.warning(
                "job %s: no other node has had its newest records within %g s",
                job_id,
                SHARE_PATIENCE_S,
            )

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
