"""Whether this node has what others recorded of a job while it was away, for whoever is about to read that.

A node that comes back, or was cut off, lacks what was recorded meanwhile, and a series with a hole in it looks like a whole one.
So who reads a job for the first time since a link came up asks the peer how much that one has of it, and waits until this node
has it too. From then on the peer's news come by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable

from msgspec import Struct

from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.sync import Heads

COMPARISON_S = 3.0
"""How long a reader waits; the next one again only if more has come meanwhile."""
ASK_AGAIN_S = 0.5
LOOK_S = 0.05


class _Comparison(Struct):
    """What a peer told of a job."""

    number: int
    """Comes back with the answer: that to an earlier question may have been half read before this one was asked."""
    asked_s: float | None = None
    """When the question was sent."""
    due: dict[StreamKey, int] = {}
    """By stream: the sequence number after its newest record there."""
    told: bool = False
    """Whether that was all."""
    lacked: float = math.inf
    """Records that were missing when a reader had waited for too long."""


class CatchingUp:
    """Compares jobs with peers, each once for each link.

    Args:
        peers: those that are connected.
        ask: asks a peer how much it has of a job, with the number of the question; False where it cannot.
        lacks: how many records of a stream cannot be read here yet, up to a sequence number.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        peers: Callable[[], Iterable[str]],
        ask: Callable[[str, str, int], bool],
        lacks: Callable[[StreamKey, int], int],
        clock: Callable[[], float],
    ) -> None:
        self._peers, self._ask, self._lacks, self._clock = peers, ask, lacks, clock
        self._over: dict[str, set[str]] = {}
        """By peer: the jobs that were compared since its link came up."""
        self._open: dict[tuple[str, str], _Comparison] = {}
        """By peer and job."""
        self._numbers = itertools.count(1)
        self._news = asyncio.Event()

    @property
    def jobs(self) -> set[str]:
        """Those of which somebody wants to read."""
        return {job_id for _, job_id in self._open}

    async def caught_up(self, job_id: str) -> None:
        """Return once this node has what its peers had of the job, or after ``COMPARISON_S``."""
        due_s = self._clock() + COMPARISON_S
        while waiting := self._waiting(job_id):
            if self._clock() >= due_s:
                self._let_go(waiting, job_id)
                return
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._news.wait()

    def _waiting(self, job_id: str) -> list[str]:
        """The connected peers whose comparison is not over; those that have not told yet are asked."""
        waiting = []
        for peer in self._peers():
            if job_id in self._over.get(peer, ()):
                continue
            comparison = self._open.get((peer, job_id))
            if comparison is None:
                comparison = self._open[peer, job_id] = _Comparison(next(self._numbers))
            if not comparison.told:
                self._ask_for(comparison, peer, job_id)
            if comparison.told and self._lacking(comparison) == 0:
                self._end(peer, job_id)
            else:
                waiting.append(peer)
        return waiting

    def _ask_for(self, comparison: _Comparison, peer: str, job_id: str) -> None:
        now_s = self._clock()
        asked = comparison.asked_s is not None and now_s - comparison.asked_s < ASK_AGAIN_S
        if not asked and self._ask(peer, job_id, comparison.number):
            comparison.asked_s = now_s

    def _lacking(self, comparison: _Comparison) -> int:
        return sum(self._lacks(*due) for due in comparison.due.items())

    def _let_go(self, waiting: Iterable[str], job_id: str) -> None:
        """A reader has waited for long enough: later ones wait too where that is of use."""
        for peer in waiting:
            comparison = self._open[peer, job_id]
            lacking = self._lacking(comparison)
            if comparison.told and lacking < comparison.lacked:
                comparison.lacked = lacking
            else:
                self._end(peer, job_id)

    def _end(self, peer: str, job_id: str) -> None:
        del self._open[peer, job_id]
        self._over.setdefault(peer, set()).add(job_id)

    def take(self, peer: str, heads: Heads) -> None:
        """A peer told how much it has of some streams, and of some jobs maybe that this is all."""
        for span in heads.spans:
            comparison = self._open.get((peer, span.key.job_id))
            if comparison is not None:
                comparison.due[span.key] = span.next
        for job_id in heads.complete:
            comparison = self._open.get((peer, job_id))
            if comparison is not None and comparison.number == heads.number:
                comparison.told = True
        self._news.set()

    def written(self) -> None:
        """Records can be read now that could not before."""
        self._news.set()

    def link_changed(self, peer: str) -> None:
        """The link with a peer came up or went down: what it said before says nothing of what follows."""
        self._over.pop(peer, None)
        for key in [key for key in self._open if key[0] == peer]:
            del self._open[key]
        self._news.set()

    def forget(self, job_id: str) -> None:
        """A job was removed."""
        for jobs in self._over.values():
            jobs.discard(job_id)
        for key in [key for key in self._open if key[1] == job_id]:
            del self._open[key]
