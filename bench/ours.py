"""Our side of a training run: a job over the API of a local cluster, observed as any client would."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Any

from bench.processes import Broken, within
from bench.workloads import STEPS_BEFORE_KILL, VICTIM_RANK, TrainedRun
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


async def time_to_recover(cluster: LocalCluster, client: AsyncClient, spec: JobSpec) -> float:
    """Seconds from SIGKILL of one worker until the client has seen a completed step of a later generation."""
    job_id = (await client.submit(spec))["job_id"]
    try:
        await until_saved(cluster, client, job_id)
        killed_at: float | None = None
        async with (
            within(FIRST_STEP_TIMEOUT_S, f"a step of job {job_id} after the kill"),
            aclosing(steps(client, job_id, cursor="now")) as events,
        ):
            async for event in events:
                if killed_at is None:
                    killed_at = await _kill_worker(client, job_id)
                elif event["generation"] > 1:
                    return time.monotonic() - killed_at
        raise Broken(f"job {job_id} ended before a worker was killed")
    finally:
        await cancel(cluster, client, job_id)


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


async def until_saved(cluster: LocalCluster, client: AsyncClient, job_id: str) -> None:
    """Wait until the job trains steadily and has a committed checkpoint."""
    await cluster.until(
        lambda: client.job(job_id),
        lambda job: job["step"] >= STEPS_BEFORE_KILL,
        f"job {job_id} to complete {STEPS_BEFORE_KILL} steps",
        timeout_s=FIRST_STEP_TIMEOUT_S,
    )
    await cluster.until(
        lambda: client.checkpoints(job_id),
        lambda answer: bool(answer["checkpoints"]),
        f"job {job_id} to commit a checkpoint",
        timeout_s=FIRST_STEP_TIMEOUT_S,
    )


async def _kill_worker(client: AsyncClient, job_id: str) -> float:
    worker = (await client.job(job_id))["workers"][VICTIM_RANK]
    killed_at = time.monotonic()
    os.kill(worker["pid"], signal.SIGKILL)
    return killed_at


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
