"""Our side of a training run: a job over the API of a local cluster, observed as any client would."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Any

from bench.processes import Broken, within
from bench.workloads import TrainedRun
from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

FIRST_STEP_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0


async def time_to_first_step(cluster: LocalCluster, client: AsyncClient, spec: JobSpec) -> float:
    """Seconds from POST until the client has seen a completed step; the job is cancelled then."""
    began = time.monotonic()
    job_id = (await client.submit(spec))["job_id"]
    try:
        async with (
            within(FIRST_STEP_TIMEOUT_S, f"the first step of job {job_id}"),
            aclosing(steps(client, job_id)) as events,
        ):
            await anext(events)
            return time.monotonic() - began
    finally:
        await cancel(cluster, client, job_id)


async def train(client: AsyncClient, spec: JobSpec) -> TrainedRun:
    """Train to the end undisturbed (nobody watches), then read the steps' times from the job's history.

    Raises:
        Broken: the job did not complete in its first generation.
    """
    job_id = (await client.submit(spec))["job_id"]
    job = await client.wait(job_id, RUN_TIMEOUT_S)
    if job["status"] != "COMPLETED" or job["restarts"]:
        raise Broken(f"job {job_id} is {job['status']}: {job['reason']}")
    stamps: list[float] = []
    loss = 0.0
    async with (
        within(END_TIMEOUT_S, f"the recorded steps of job {job_id}"),
        aclosing(steps(client, job_id)) as events,
    ):
        async for event in events:
            stamps.append(seconds_of(event["at"]))
            loss = event["loss"]
    if len(stamps) != job["total_steps"]:
        raise Broken(f"job {job_id} reported {len(stamps)} of {job['total_steps']} steps")
    return TrainedRun(stamps, loss)


def seconds_of(at: str) -> float:
    """Unix seconds of a time in an answer."""
    return datetime.fromisoformat(at).timestamp()


async def steps(
    client: AsyncClient, job_id: str, cursor: str | None = None
) -> AsyncGenerator[dict[str, Any]]:
    """Metric events of completed steps, without those of evaluations."""
    async with aclosing(client.stream(job_id, cursor, types=["metric"])) as events:
        async for event in events:
            if "step_time" in event:
                yield event


async def cancel(cluster: LocalCluster, client: AsyncClient, job_id: str) -> None:
    """End the job and wait until its workers are gone, so that they do not burden what comes next."""
    await client.cancel(job_id)
    await client.wait(job_id, END_TIMEOUT_S)
    await cluster.until(
        client.workers,
        lambda answer: not answer["workers"],
        f"the workers of job {job_id} to end",
        timeout_s=END_TIMEOUT_S,
    )
