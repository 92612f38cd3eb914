"""A chaos target over a plain ``LocalCluster``, and one small run with everything that judges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from chaos.aftermath import settle
from chaos.observers import Observers
from chaos.records import Began, Ended, HistoryWriter, Record, read_history
from chaos.target import Node
from chaos.workload import Workload
from distroml.local_cluster import LocalCluster


class LocalTarget:
    """The nodes of a cluster that is up, and a history in ``folder``."""

    stores: Mapping[str, str] = {}

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.nodes: dict[str, Node] = dict(cluster.nodes)
        self.history = HistoryWriter(folder)
        self._began = time.monotonic()

    def clock(self) -> float:
        return time.monotonic() - self._began


async def play(
    cluster: LocalCluster,
    folder: Path,
    *,
    seed: int,
    duration_s: float,
    specs: tuple[str, ...],
    jobs: int = 2,
    disturb: Callable[[LocalTarget, Workload], Awaitable[None]] | None = None,
    faults: tuple[str, ...] = (),
) -> list[Record]:
    """Reference runs, ``duration_s`` of workload with ``disturb`` beside it, and the aftermath; the history."""
    target = LocalTarget(cluster, folder)
    target.history.write(
        Began(at_s=0.0, seed=seed, duration_s=duration_s, nodes=len(target.nodes), faults=faults)
    )
    workload = Workload(target, seed, jobs=jobs, specs=specs)
    await workload.prepare()
    working, watching = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(Observers(target).run_until(watching))
        work = group.create_task(workload.run_until(working))
        deadline = target.clock() + duration_s
        if disturb is not None:
            await disturb(target, workload)
        await asyncio.sleep(max(0.0, deadline - target.clock()))
        working.set()
        await work
        await settle(target, workload)
        watching.set()
    target.history.write(Ended(at_s=target.clock()))
    target.history.close()
    return read_history(folder)
