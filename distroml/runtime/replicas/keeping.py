"""Before anything written on this node counts as durable: has other nodes keep copies of it.

Whoever has no room, dies or does not answer is passed over for the next in the file's order. Where there are fewer
nodes than copies wanted, it is as many as there are; ``upkeep`` makes up for the rest later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from msgspec import Struct

from distroml.runtime.replicas import placement
from distroml.runtime.replicas.exchange import Exchange, NotAnswered
from distroml.runtime.replicas.wire import File

PATIENCE_S = 10.0
"""How long a node that should be there, or refuses, is tried again, before the copies that there are must do."""
RETRY_S = 0.5
"""Pause before a node that did not take a copy is asked for it again."""
LOOK_S = 0.1

_log = logging.getLogger(__name__)


class Neighbours(Struct, frozen=True):
    """The other nodes, as the log knows them now."""

    others: frozenset[str]
    """Those that may hold copies and that this node can have links with."""
    complete: bool = True
    """Whether those are all: a node that comes back knows few before it has applied its log again."""
    must_share: bool = False
    """Whether another one must have what this one writes: it is to go, or some nodes have no link with it."""
    may_have: frozenset[str] = frozenset()
    """Those that may have something, whether or not they can be asked now."""


class Keeper:
    """Has copies made.

    Args:
        replicas: ``checkpointing.replicas`` of the job with this id; None: it does not say.
    """

    def __init__(
        self,
        node: str,
        exchange: Exchange,
        neighbours: Callable[[], Neighbours],
        replicas: Callable[[str], int | None],
    ) -> None:
        self._node, self._exchange = node, exchange
        self._neighbours, self._replicas = neighbours, replicas
        self.counts = {"kept": 0, "refused": 0, "lacking": 0}
        """Copies that others took, that they did not, and that could not be made in time."""

    @property
    def has_others(self) -> bool:
        """Whether there is any other node that could have something."""
        return bool(self._neighbours().others)

    def copies_for(self, job_id: str) -> int:
        """How many other nodes are to have what this one writes for a job."""
        near = self._neighbours()
        copies = placement.wanted(self._replicas(job_id), 1 + len(near.others))
        return max(copies - 1, min(1, len(near.others)) if near.must_share else 0)

    async def keep(self, file: File, job_id: str) -> list[str]:
        """Returns once enough nodes have a durable copy of a file that is durable here, or no more can be had: which.

        Never raises for what others do: one copy is better than no checkpoint, and is told.
        """
        held: list[str] = []
        asking = _Asking(asyncio.get_running_loop().time)
        while (lack := self.copies_for(job_id) - len(held)) > 0:
            there = self._neighbours().others - set(held)
            ready = asking.ready(there & set(self._exchange.connected()))
            if not ready:
                if not asking.worth_waiting(there):
                    break
                await asyncio.sleep(LOOK_S)
                continue
            asked = placement.order(file.path, ready)[:lack]
            outcomes = await asyncio.gather(*(self._ask(node, file) for node in asked))
            for node, problem in zip(asked, outcomes, strict=True):
                if problem:
                    asking.refused(node, problem)
                else:
                    held.append(node)
        self.counts["kept"] += len(held)
        if lack > 0:
            self.counts["lacking"] += lack
            why = "; ".join(asking.problems.values()) or "no other node can be reached"
            _log.warning(
                "job %s: %s is on %d node%s, %d fewer than wanted: %s",
                job_id, file.path, 1 + len(held), "s" if held else "", lack, why,
            )  # fmt: skip
        return held

    async def _ask(self, node: str, file: File) -> str:
        try:
            await self._exchange.keep(node, file, (self._node,))
        except NotAnswered as error:
            self.counts["refused"] += 1
            _log.info("copies: %s", error)
            return error.detail
        return ""


class _Asking:
    """Whom to ask for a copy of one file, and for how long."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._begun_s = monotonic()
        self._first_s: dict[str, float] = {}
        """When a node refused first."""
        self._last_s: dict[str, float] = {}
        self.problems: dict[str, str] = {}
        """Why nodes refused, when they last did."""

    def ready(self, nodes: Iterable[str]) -> list[str]:
        """Those to ask now."""
        now_s = self._monotonic()
        return [
            node
            for node in nodes
            if now_s - self._first_s.get(node, now_s) < PATIENCE_S
            and now_s - self._last_s.get(node, -RETRY_S) >= RETRY_S
        ]

    def worth_waiting(self, nodes: Iterable[str]) -> bool:
        """Whether one of ``nodes`` may yet take it."""
        now_s = self._monotonic()
        return any(now_s - self._first_s.get(one, self._begun_s) < PATIENCE_S for one in nodes)

    def refused(self, node: str, problem: str) -> None:
        """It did not take it."""
        self._last_s[node] = now_s = self._monotonic()
        self._first_s.setdefault(node, now_s)
        self.problems[node] = problem
