"""A job that trains on a cluster of real nodes while its ranks, nodes or leader are disturbed, again and again.

One disturbance after another within the same job: each starts from steady training, and is over when the incident
that it left has all its phases. The client is given all nodes and moves on from those that do not answer, as a
user's would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench import ours
from bench.processes import Broken, within
from bench.workloads import STEPS_BEFORE_KILL
from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

NODES = 3
SLOTS = 2
"""Of each node: the four ranks fit on any two of them."""
WORKERS = 4
ENDLESS_EPOCHS = 1_000_000
NEXT_STEP_TIMEOUT_S = 60.0
INCIDENT_TIMEOUT_S = 30.0
STEPS_BETWEEN = 20
"""Steps between two disturbances: with progress in between, none counts as a repeated failure."""
PHASES = ("detect", "decide", "abort", "rendezvous", "restore", "first_step", "total")

Disturb = Callable[[dict[str, Any]], float]
"""Does harm to what the job's view (``GET /api/jobs/ID``) shows; when it did, in seconds of ``time.time()``."""


class Recovery(Struct, frozen=True, kw_only=True):
    """One disturbance and what came of it."""

    seen_s: float
    """From the harm until a client had read of a completed step of a later generation."""
    first_step_s: float
    """From the harm until the last rank had completed a step of that generation, by the rank's clock."""
    phases_ms: dict[str, float]
    """Of the incident; they begin when the failure was first observed."""
    steps_lost: int
    reason: str
    source: str


class LiveJob:
    """The job, and what was done to it so far."""

    def __init__(self, cluster: LocalCluster, client: AsyncClient, job_id: str) -> None:
        self.cluster, self.client, self.job_id = cluster, client, job_id

    async def view(self) -> dict[str, Any]:
        """``GET /api/jobs/ID``."""
        view: dict[str, Any] = await self.client.job(self.job_id)
        return view

    async def until_steady(self, steps: int = STEPS_BETWEEN) -> dict[str, Any]:
        """Wait until its newest generation has done some steps since now, and show each rank's process."""
        reached = (await self.view())["step"] + steps
        view: dict[str, Any] = await self.cluster.until(
            self.view,
            lambda job: job["step"] >= reached and all(w["pid"] for w in job["workers"]),
            f"job {self.job_id} to reach step {reached}",
            timeout_s=NEXT_STEP_TIMEOUT_S,
        )
        return view

    async def recover_from(self, disturb: Disturb) -> Recovery:
        """Do harm right after a completed step, and wait for what follows.

        Raises:
            Broken: no step or no whole incident followed in time.
        """
        view = await self.until_steady()
        generation, harmed_at = view["generation"], 0.0
        seen: dict[int, float] = {}
        watching: asyncio.Task[dict[str, Any]] | None = None
        async with (
            within(NEXT_STEP_TIMEOUT_S, f"a step of job {self.job_id} in a later generation"),
            aclosing(ours.steps(self.client, self.job_id, cursor="now")) as events,
        ):
            await anext(events)
            harmed_at = disturb(view)
            async for event in events:
                # Told again are also steps from before that nobody may have heard of.
                if event["generation"] > generation:
                    seen.setdefault(event["step"], time.time())
                    if watching is None:
                        watching = asyncio.create_task(self._incident(generation))
                    if watching.done() and max(seen) > watching.result()["resume_step"]:
                        break
            else:
                raise Broken(f"job {self.job_id} ended: {(await self.view())['reason']}")
        incident = watching.result()
        return Recovery(
            seen_s=min(at for step, at in seen.items() if step > incident["resume_step"])
            - harmed_at,
            first_step_s=ours.seconds_of(incident["first_step_at"]) - harmed_at,
            phases_ms=incident["phases_ms"],
            steps_lost=incident["steps_lost"],
            reason=incident["reason"],
            source=incident["source"],
        )

    async def _incident(self, generation: int) -> dict[str, Any]:
        """The newest incident, once it is over, of a generation that is at least this one."""

        def is_whole(answer: dict[str, Any]) -> bool:
            newest = answer["incidents"][-1:]
            return any(i["generation"] >= generation and i["first_step_at"] for i in newest)

        answer = await self.cluster.until(
            lambda: self.client.incidents(self.job_id),
            is_whole,
            f"the incident of generation {generation} of job {self.job_id}",
            timeout_s=INCIDENT_TIMEOUT_S,
        )
        incident: dict[str, Any] = answer["incidents"][-1]
        return incident


@asynccontextmanager
async def cluster_at(directory: Path) -> AsyncIterator[LocalCluster]:
    """Three nodes, ready to fork workers."""
    async with LocalCluster(directory / "ours", nodes=NODES, slots=SLOTS) as cluster:
        await until_warm(cluster)
        yield cluster


@asynccontextmanager
async def training(cluster: LocalCluster, spec: JobSpec) -> AsyncIterator[LiveJob]:
    """A job that trains steadily, on an idle cluster whose forkservers are warm; cancelled at the end."""
    async with cluster.client() as client:
        await until_warm(cluster)
        job_id = (await client.submit(spec))["job_id"]
        try:
            await cluster.until(
                lambda: client.job(job_id),
                lambda job: job["step"] >= STEPS_BEFORE_KILL,
                f"job {job_id} to complete {STEPS_BEFORE_KILL} steps",
                timeout_s=ours.FIRST_STEP_TIMEOUT_S,
            )
            yield LiveJob(cluster, client, job_id)
        finally:
            await ours.cancel(cluster, client, job_id)


async def until_warm(cluster: LocalCluster, *names: str) -> None:
    """Wait until the named nodes (default: all) can fork a worker at once."""
    for name in names or cluster.nodes:
        async with cluster.client(name) as client:
            await _warm(cluster, client, name)


def _warm(cluster: LocalCluster, client: AsyncClient, name: str) -> Awaitable[Any]:
    return cluster.until(
        client.health,
        lambda answer: bool(answer["details"]["warm"]),
        f"the forkserver of node {name} to be warm",
        timeout_s=ours.FIRST_STEP_TIMEOUT_S,
    )
