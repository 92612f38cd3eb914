"""One fault at the moment when it strikes: what was drawn becomes processes, nodes and files that are there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from chaos.cluster import ChaosNode, Cluster
from chaos.network import Network
from chaos.processes import Process, Role
from chaos.schedule import Planned
from distroml.errors import DistroMLError

T = TypeVar("T")
LEADER_TIMEOUT_S = 5.0
FIND_TIMEOUT_S = 5.0
POLL_S = 0.05

TakeBack = Callable[[], Coroutine[None, None, str | None]]
"""Undoes a fault; may return a note."""


class Unfit(Exception):
    """There is nothing now that this fault could hit; says what was looked for."""


class Inflicted(Struct, frozen=True, kw_only=True):
    """What came of a strike."""

    nodes: tuple[str, ...]
    detail: dict[str, Any]
    take_back: TakeBack | None = None
    during: str = ""


class Strike:
    """What an inflicting function gets to see and to use.

    Args:
        fault: number of the fault within the run.
    """

    def __init__(self, cluster: Cluster, planned: Planned, fault: int) -> None:
        self.cluster = cluster
        self.planned = planned
        self.fault = fault
        self.began_s = cluster.clock()
        """When it struck; later than it was planned where it waited for a moment."""
        self._rng = random.Random(planned.pick)

    def choice(self, name: str) -> Any:
        """What was drawn."""
        return self.planned.choices[name]

    def strikes_now(self) -> None:
        """The moment that it waited for has come."""
        self.began_s = self.cluster.clock()

    @property
    def network(self) -> Network:
        """Raises Unfit where there are no namespaces."""
        if self.cluster.network is None:
            raise Unfit(f"there are no network namespaces: {self.cluster.without}")
        return self.cluster.network

    def one_of(self, found: Sequence[T], what: str) -> T:
        """One of these, by the number that was drawn. Raises Unfit where there is none."""
        return self.some_of(found, 1, what)[0]

    def some_of(self, found: Sequence[T], count: int, what: str) -> list[T]:
        """As many as there are, up to a number. Raises Unfit where there is none."""
        if not found:
            raise Unfit(f"there is no {what} now")
        return self._rng.sample(list(found), min(count, len(found)))

    async def node(self, whom: str | None = None) -> ChaosNode:
        """Resolve leader, follower or any, by default as drawn; only nodes that run.

        Raises:
            Unfit: there is no such node.
        """
        whom = whom or self.choice("node")
        nodes = self.cluster.nodes
        up = [node for node in nodes.values() if node.running]
        if whom == "any":
            return self.one_of(up, "node that runs")
        leader = await self._leader()
        if whom == "leader":
            if leader is None or not nodes[leader].running:
                raise Unfit("there is no leader now")
            return nodes[leader]
        return self.one_of([n for n in up if n.name != leader], "node that runs and does not lead")

    async def _leader(self) -> str | None:
        deadline_s = time.monotonic() + LEADER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if leader := await self.cluster.leader():
                return leader
            await asyncio.sleep(POLL_S)
        return None

    async def workers(self, count: int) -> list[Process]:
        """Worker processes anywhere, waited for a moment. Raises Unfit where there are none."""

        async def look() -> list[Process]:
            return [p for n in self.cluster.nodes.values() for p in n.processes(Role.WORKER)]

        found = await self.soon(look)
        return self.some_of(sorted(found, key=lambda p: (p.node, p.pid)), count, "worker")

    async def soon(self, look: Callable[[], Awaitable[list[T]]]) -> list[T]:
        """What is found, waited for a moment; empty where nothing is."""
        deadline_s = time.monotonic() + FIND_TIMEOUT_S
        while True:
            found = await look()
            if found or time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(POLL_S)

    async def active_jobs(self) -> list[dict[str, Any]]:
        """The jobs that are not finished, with their workers; empty where no node tells."""
        try:
            async with self.cluster.client(timeout_s=2.0) as client:
                jobs = (await client.jobs(limit=100))["jobs"]
                active = [job for job in jobs if job["status"] not in _FINAL]
                return [await client.job(job["job_id"]) for job in active]
        except (DistroMLError, OSError):
            return []


Inflict = Callable[[Strike], Coroutine[None, None, Inflicted]]
"""Does it; raises ``Unfit`` where there is nothing to be hit, and then has changed nothing that lasts."""

_FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED"})


def told(processes: Sequence[Process]) -> list[str]:
    """Processes for people: ``worker 123 of b``."""
    return [f"{p.role} {p.pid} of {p.node}" for p in processes]


def nodes_of(processes: Sequence[Process]) -> tuple[str, ...]:
    return tuple(sorted({process.node for process in processes}))
