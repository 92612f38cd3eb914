"""Commits of small checkpoints through a whole cluster: four ranks, three nodes, shards, copies, manifest, log.

All that a checkpoint costs beside its bytes. Whoever watches is a client of each node, as a user's would be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

from msgspec.structs import replace

from bench import live_job
from bench.live_job import ENDLESS_EPOCHS, WORKERS, LiveJob
from bench.processes import until
from bench.workloads import SMALL
from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.spec import JobSpec

KEPT = 1000
"""Files must be there when they are looked at."""
COMMIT_TIMEOUT_S = 30.0

Seen = dict[int, float]
"""When a node told of the commit of a step, by ``time.time()``."""


def small(every_n_steps: int | None, store: str = "local") -> JobSpec:
    """A job of four ranks whose state has 0.3 MB, which saves so often; None: never."""
    spec = SMALL.spec(WORKERS, epochs=ENDLESS_EPOCHS, checkpoint_every=every_n_steps)
    checkpointing = replace(spec.checkpointing, store=store, keep_last=KEPT)
    return replace(spec, checkpointing=checkpointing)


async def latencies_s(cluster: LocalCluster, spec: JobSpec, commits: int) -> list[float]:
    """From the last shard's file (and its copy) in place until the last node's client read of the commit.

    A file is in place when it was renamed, by the kernel's clock, which is up to a tick (4 ms) behind: never too little.
    """
    async with live_job.training(cluster, spec) as job:
        run_id = (await job.view())["run_id"]
        async with _watched(cluster, job) as seen:
            everywhere = await _told_by_all(seen, commits)
        found = []
        for step, told_s in everywhere.items():
            path = checkpoint_directory(job.job_id, run_id, step)
            shared = Path(spec.checkpointing.store.removeprefix("file://"), path)
            found.append(told_s - _in_place_s(cluster.copies(path) or [shared]))
    return found


async def rates(cluster: LocalCluster, spec: JobSpec, duration_s: float) -> tuple[float, float]:
    """Commits and steps per second of a job that trains steadily."""
    async with live_job.training(cluster, spec) as job, _watched(cluster, job) as seen:
        first, began_s = (await job.view())["step"], time.time()
        await asyncio.sleep(duration_s)
        last, ended_s = (await job.view())["step"], time.time()
        committed = sum(began_s <= at <= ended_s for at in min(seen, key=len).values())
    took_s = ended_s - began_s
    return committed / took_s, (last - first) / took_s


@asynccontextmanager
async def _watched(cluster: LocalCluster, job: LiveJob) -> AsyncIterator[list[Seen]]:
    """What each node's client reads of commits from now on."""
    seen: list[Seen] = [{} for _ in cluster.nodes]
    async with AsyncExitStack() as stack:
        tasks = []
        for name, own in zip(cluster.nodes, seen, strict=True):
            client = await stack.enter_async_context(cluster.client(name))
            tasks.append(asyncio.create_task(_watch(client, job.job_id, own)))
        try:
            yield seen
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(client: AsyncClient, job_id: str, seen: Seen) -> None:
    async with aclosing(client.stream(job_id, "now", types=["checkpoint"])) as messages:
        async for message in messages:
            if message.get("event") == "committed":
                seen[message["step"]] = time.time()


async def _told_by_all(seen: list[Seen], commits: int) -> Seen:
    """So many steps that all nodes told of, with the time at which the last one did."""

    def everywhere() -> list[int]:
        return sorted(set.intersection(*(set(one) for one in seen)))

    await until(
        lambda: len(everywhere()) >= commits, f"{commits} commits", COMMIT_TIMEOUT_S + commits
    )
    return {step: max(one[step] for one in seen) for step in everywhere()[:commits]}


def _in_place_s(places: Iterable[Path]) -> float:
    shards = [file for place in places for file in place.glob("*.safetensors")]
    return max(file.stat().st_ctime_ns for file in shards) / 1e9
