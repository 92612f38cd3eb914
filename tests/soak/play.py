"""Plays a schedule of faults against a job on a cluster of real nodes, and compares what it came to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from msgspec import Struct

from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster
from tests.soak.schedules import WORKERS, Fault, Harm

END_TIMEOUT_S = 240.0
READY_TIMEOUT_S = 60.0
MAX_POINTS = 10_000


def digits_job(*, steps: int, **resources: Any) -> dict[str, Any]:
    """A small network on real data that is long enough to be disturbed."""
    return {
        "name": "same-bits",
        "model": "mlp",
        "model_options": {"hidden": 384, "layers": 3},
        "dataset": "digits",
        "resources": {"workers": WORKERS, **resources},
        "hyperparameters": {"batch_size": 64, "epochs": 1},
        "checkpointing": {"every_n_steps": 25},
        "steps": steps,
        "seed": 11,
        "max_restarts": 20,
    }


class Bits(Struct, frozen=True):
    """All of a finished job that no fault may change."""

    state_digest: str
    sample_digest: str
    losses: dict[int, float]
    """By step, as the API tells them."""

    def differences(self, other: Bits) -> list[str]:
        """What is not the same; empty where all is."""
        found = [
            f"{name} {getattr(self, name)[:12]} is {getattr(other, name)[:12]}"
            for name in ("state_digest", "sample_digest")
            if getattr(self, name) != getattr(other, name)
        ]
        if missing := sorted(self.losses.keys() ^ other.losses.keys()):
            found.append(f"one side has no loss for {len(missing)} steps from {missing[0]} on")
        both = sorted(self.losses.keys() & other.losses.keys())
        if wrong := [step for step in both if self.losses[step] != other.losses[step]]:
            found.append(f"{len(wrong)} losses differ, first that of step {wrong[0]}")
        return found


class Played(Struct, frozen=True):
    """What came of a job and its faults."""

    bits: Bits
    job: dict[str, Any]
    incidents: list[dict[str, Any]]


async def play(cluster: LocalCluster, spec: dict[str, Any], faults: Sequence[Fault] = ()) -> Played:
    """Train with these faults to the end; afterwards all nodes are up, and idle.

    A fault whose job has ended before its time does nothing.
    """
    lost: list[str] = []
    async with cluster.client() as client:
        job_id = (await client.submit(spec))["job_id"]
        for fault in faults:
            view = await reached(client, job_id, fault.step)
            if view is None:
                break
            await _harm(cluster, view, fault, lost)
            if lost:
                await _bring_back(cluster, lost)
        job = await client.wait(job_id, END_TIMEOUT_S)
        return await outcome(client, job)


async def outcome(client: AsyncClient, job: dict[str, Any]) -> Played:
    """Of a job that has ended."""
    assert job["status"] == "COMPLETED", job["reason"]
    job_id = job["job_id"]
    (loss,) = (await client.metrics(job_id, name="loss", max_points=MAX_POINTS))["series"]
    bits = Bits(
        state_digest=job["result"]["state_digest"],
        sample_digest=job["result"]["sample_digest"],
        losses=dict(zip(loss["steps"], loss["values"], strict=True)),
    )
    return Played(bits, job, (await client.incidents(job_id))["incidents"])


async def reached(client: AsyncClient, job_id: str, step: int) -> dict[str, Any] | None:
    """The job's view right after it was seen to complete this step; None where it has ended before."""
    async with aclosing(client.stream(job_id, types=["metric"])) as events:
        async for event in events:
            if event["type"] == "metric" and event["step"] >= step:
                break
        else:
            return None
    while True:
        view: dict[str, Any] = await client.job(job_id)
        if view["status"] in ("COMPLETED", "FAILED", "CANCELLED"):
            return None
        if view["workers"] and all(worker["pid"] for worker in view["workers"]):
            return view
        await asyncio.sleep(0.02)


async def _harm(cluster: LocalCluster, view: dict[str, Any], fault: Fault, lost: list[str]) -> None:
    if fault.harm in _SIGNALS:
        for rank in fault.ranks:
            with contextlib.suppress(ProcessLookupError):  # gone by another's fault already
                os.kill(view["workers"][rank]["pid"], _SIGNALS[fault.harm])
        return
    leader = await cluster.leader(READY_TIMEOUT_S)
    used = sorted({worker["node"] for worker in view["workers"]} - {leader})
    name = leader if fault.harm is Harm.LEADER or not used else used[0]
    cluster.nodes[name].power_off()
    lost.append(name)


_SIGNALS = {Harm.KILL: signal.SIGKILL, Harm.STOP: signal.SIGSTOP}


async def _bring_back(cluster: LocalCluster, lost: list[str]) -> None:
    """Start lost nodes again; until their forkservers are warm too, so that the next loss finds free slots."""
    await cluster.leader(READY_TIMEOUT_S)
    while lost:
        name = lost.pop()
        cluster.nodes[name].start()
        await until_warm(cluster, name)


async def until_warm(cluster: LocalCluster, *names: str) -> None:
    """Wait until the named nodes (default: all) serve and can fork workers."""
    for name in names or cluster.nodes:
        await cluster.wait_ready(name, timeout_s=READY_TIMEOUT_S)
        async with cluster.client(name) as client:
            await cluster.until(
                client.health,
                lambda answer: bool(answer["details"]["warm"]),
                f"the forkserver of node {name} to be warm",
                timeout_s=READY_TIMEOUT_S,
            )
