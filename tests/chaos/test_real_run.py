"""Clients, observers, the aftermath and the judgement against real nodes: nothing wrong is found where nothing is."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from chaos.checkers import Limits, judge
from chaos.records import (
    EventSeen,
    FaultBegan,
    FaultEnded,
    Incident,
    JobEnded,
    JobSeen,
    LeaderSeen,
    MemorySeen,
    NodeSeen,
    Operation,
    Outcome,
    Streamed,
)
from chaos.report import write_report
from chaos.workload import Workload
from distroml.local_cluster import LocalCluster
from tests.chaos.local import LocalTarget, play
from tests.soak.play import until_warm

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

LIMITS = Limits(machine_factor=4.0)
"""Tests share a machine with whatever else runs there; what is judged here is not its speed."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="dml-") as place:
        async with LocalCluster(Path(place), nodes=3, slots=2) as cluster:
            await until_warm(cluster)
            yield cluster


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def forgotten(cluster: LocalCluster) -> AsyncIterator[None]:
    """A history is of a cluster that was new: afterwards no job is left."""
    yield
    async with cluster.client() as client:
        for job in (await client.jobs())["jobs"]:
            if not job["finished_at"]:
                await client.cancel(job["job_id"])
            await client.remove(job["job_id"])


async def test_without_faults_every_promise_is_held(cluster: LocalCluster, tmp_path: Path) -> None:
    history = await play(cluster, tmp_path, seed=3, duration_s=8.0, specs=("points-lone",), jobs=2)
    assert judge(history, LIMITS) == []
    operations = Counter(
        one.kind for one in history if isinstance(one, Operation) and one.outcome is Outcome.OK
    )
    assert operations.keys() >= {"submit", "read_job", "read_jobs", "read_checkpoints"}
    followed = [one for one in history if isinstance(one, Streamed) and not one.reference]
    assert {one.stream for one in followed} == {"metrics", "logs", "events"}
    assert all(one.ended and one.items for one in followed)
    assert any(one.connections > 1 for one in followed), "some went on at another node"
    nodes = set(cluster.nodes)
    assert {one.node for one in history if isinstance(one, NodeSeen) and one.answers} == nodes
    assert {one.node for one in history if isinstance(one, MemorySeen) and one.rss_bytes} == nodes
    assert sum(isinstance(one, LeaderSeen) for one in history) == 1
    looks = {(one.name, one.state) for one in history if isinstance(one, JobSeen)}
    assert looks >= {("points-lone", "RUNNING"), ("points-lone", "COMPLETED")}
    ends = [one for one in history if isinstance(one, JobEnded)]
    assert all(
        one.checkpoints and one.samples and len(one.losses) == one.total_steps
        for one in ends
        if one.state == "COMPLETED"
    )
    report = write_report(tmp_path, history, [])
    assert report["held"]
    assert report["goodput"]["share_of_steps"] == 1.0


async def test_a_killed_worker_breaks_no_promise(cluster: LocalCluster, tmp_path: Path) -> None:
    """The only rank of the job dies with its state: steps are done again, and judged to be the same."""
    history = await play(
        cluster,
        tmp_path,
        seed=4,
        duration_s=8.0,
        specs=("points-lone",),
        jobs=1,
        disturb=_kill_a_worker,
        faults=("worker-kill",),
    )
    assert judge(history, LIMITS) == []
    incidents = [one for one in history if isinstance(one, Incident)]
    assert any(one.steps_lost is not None and one.reason for one in incidents)
    (fault,) = (one for one in history if isinstance(one, FaultBegan))
    assert any(
        isinstance(one, EventSeen)
        and one.data.get("status") == "RECOVERING"
        and one.at_s > fault.at_s
        for one in history
    )


async def _kill_a_worker(target: LocalTarget, workload: Workload) -> None:
    """Once a training job has a checkpoint, so that the recovery has something to go back to."""
    async with target.cluster.client() as client:
        while True:
            for job_id in workload.known:
                job = await client.job(job_id)
                pids = [worker["pid"] for worker in job["workers"] if worker["pid"]]
                if job["name"] == "points-lone" and pids and job["checkpoints"]["count"]:
                    target.history.write(
                        FaultBegan(
                            at_s=target.clock(),
                            fault=0,
                            kind="worker-kill",
                            family="process",
                            nodes=tuple(worker["node"] for worker in job["workers"]),
                            detail={"pids": pids},
                        )
                    )
                    os.kill(pids[0], signal.SIGKILL)
                    target.history.write(FaultEnded(at_s=target.clock(), fault=0))
                    return
            await asyncio.sleep(0.02)
