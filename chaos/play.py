"""Plays a schedule against a cluster: inflicts each fault at its time, takes it back, and writes both into the history.

Everything that was inflicted is taken back before ``play`` returns, also where it is cancelled in the middle.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from msgspec import Struct

from chaos.cluster import Cluster
from chaos.faults import INFLICT
from chaos.faults.strike import Inflicted, Strike, Unfit
from chaos.kinds import BY_NAME
from chaos.network import NetworkUnusable
from chaos.records import FaultBegan, FaultEnded
from chaos.schedule import Planned, Schedule

INFLICT_TIMEOUT_S = 30.0
"""A fault that waits for its moment gives up by itself before this."""
TAKE_BACK_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)


class Missed(Struct, frozen=True):
    """A planned fault that found nothing to hit."""

    planned: Planned
    why: str


class Player:
    """Plays one schedule, once."""

    def __init__(self, cluster: Cluster, schedule: Schedule) -> None:
        self._cluster = cluster
        self._schedule = schedule
        self.inflicted: list[str] = []
        """Kinds of the faults that struck, in order."""
        self.missed: list[Missed] = []

    async def play(self) -> None:
        """To the end of the schedule's duration, and until everything is taken back.

        Raises:
            ExceptionGroup: a fault could not be taken back.
        """
        began_s = self._cluster.clock()
        async with asyncio.TaskGroup() as open_faults:
            for number, planned in enumerate(self._schedule.planned):
                await self._sleep_until(began_s + planned.at_s)
                open_faults.create_task(self._one(number, planned), name=f"fault {number}")
            await self._sleep_until(began_s + self._schedule.duration_s)

    async def _sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self._cluster.clock()))

    async def _one(self, number: int, planned: Planned) -> None:
        kind, strike = BY_NAME[planned.kind], Strike(self._cluster, planned, number)
        inflicting = asyncio.create_task(INFLICT[planned.kind](strike))
        try:
            async with asyncio.timeout(INFLICT_TIMEOUT_S):
                done = await inflicting
        except (Unfit, OSError, NetworkUnusable, TimeoutError) as error:
            why = str(error) or type(error).__name__
            _log.info("%s found nothing to hit: %s", planned.kind, why)
            self.missed.append(Missed(planned, why))
            await self._clear(number)
            return
        except BaseException:
            await self._clear(number)
            raise
        self.inflicted.append(planned.kind)
        self._cluster.history.write(
            FaultBegan(
                at_s=strike.began_s,
                fault=number,
                kind=planned.kind,
                family=kind.family,
                nodes=done.nodes,
                detail=_plain({**planned.choices, **done.detail}),
                during=done.during,
            )
        )
        _log.info("%s %s %s", planned.kind, ",".join(done.nodes), done.detail)
        await self._take_back(number, planned, done)

    async def _take_back(self, number: int, planned: Planned, done: Inflicted) -> None:
        note = ""
        try:
            if done.take_back is not None:
                await asyncio.sleep(planned.lasts_s)
        finally:
            if done.take_back is not None:
                async with asyncio.timeout(TAKE_BACK_TIMEOUT_S):
                    told: str | None = await asyncio.shield(done.take_back())
                    note = told or ""
            self._cluster.history.write(
                FaultEnded(at_s=self._cluster.clock(), fault=number, note=note)
            )

    async def _clear(self, number: int) -> None:
        """A strike that broke off in the middle leaves nothing behind."""
        for node in self._cluster.nodes.values():
            node.heal(number)
            node.let_go(number)
        if self._cluster.network is not None:
            await self._cluster.network.repair(number)
        if self._cluster.objects is not None:
            await self._cluster.objects.heal(number)


def _plain(detail: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in detail.items()
    }
