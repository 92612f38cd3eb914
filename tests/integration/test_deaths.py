"""Agents, leaders and workers that die at each point of a checkpoint's way, in a real cluster that goes on.

Whenever it is, each checkpoint that is listed has all of its bytes at every node, the newest one is what a run without
survivors goes on from, and in the end nothing is on the disks that no checkpoint needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chaos.under_test import deaths
from distroml.client import AsyncClient
from distroml.errors import NotFound
from distroml.local_cluster import LocalCluster
from distroml.runtime.checkpoint.stores.file import TEMPORARY_PREFIX
from tests.integration.jobs import kill_workers, long_spec, restored, until_status, until_step

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERY = 25
KEPT = 3
OF_FOLLOWERS = ("copy arrives", "apply", "delete")
"""Points at which it makes a difference that the process does not lead."""


class Stage:
    """A cluster whose nodes can be told to die, and a job on it that never ends by itself."""

    def __init__(self, cluster: LocalCluster, file: Path) -> None:
        self.cluster, self._file = cluster, file
        self.client = cluster.client(timeout_s=60.0)
        self.job_id = ""

    async def begin(self) -> None:
        spec = long_spec(steps=10_000_000, workers=3, every=EVERY)
        spec["checkpointing"] |= {"keep_last": KEPT}
        self.job_id = (await self.client.submit(spec))["job_id"]
        await until_step(self.cluster, self.client, self.job_id, EVERY)

    async def job(self) -> dict[str, Any]:
        """The job while each rank has a process."""
        found: dict[str, Any] = await self.cluster.until(
            lambda: self.client.job(self.job_id),
            lambda job: (
                job["status"] in ("RUNNING", "CHECKPOINTING")
                and len(job["workers"]) == 3
                and all(worker["pid"] for worker in job["workers"])
            ),
            "all ranks to train",
            timeout_s=60.0,
        )
        return found

    async def die(self, point: str, *, after: bool, pid: int | None) -> None:
        """Returns once the process has come there, and has died."""
        assert pid is not None
        death = deaths.Death(point, after, pid)
        await asyncio.to_thread(deaths.ask, self._file, death)

        async def gone() -> bool:
            return not await asyncio.to_thread(self._file.exists)

        await self.cluster.until(gone, bool, f"process {pid} to come to '{point}'", timeout_s=60.0)

    async def goes_on(self) -> None:
        """More checkpoints are committed than are kept, and each that is listed is whole at every node."""
        before = (await self.listed())[-1]["step"]
        await self.cluster.until(
            self.listed,
            lambda listed: listed[-1]["step"] > before + KEPT * EVERY,
            "checkpoints to be committed again",
            timeout_s=90.0,
        )
        for name in self.cluster.nodes:
            async with self.cluster.client(name, timeout_s=60.0) as client:
                checked = await self._verify(client)
                assert checked["ok"], (name, checked)

    async def listed(self) -> list[dict[str, Any]]:
        page = await self.client.checkpoints(self.job_id)
        listed: list[dict[str, Any]] = page["checkpoints"]
        assert {one["status"] for one in listed} <= {"COMMITTED"}, "none is broken"
        return sorted(listed, key=lambda one: one["step"])

    async def _verify(self, client: AsyncClient) -> dict[str, Any]:
        """Of the newest one that is not retired meanwhile."""
        while True:
            newest = (await self.listed())[-1]["step"]
            with contextlib.suppress(NotFound):
                found: dict[str, Any] = await client.verify_checkpoint(self.job_id, newest)
                return found

    async def end(self) -> None:
        with contextlib.suppress(Exception):
            await self.client.cancel(self.job_id)
        await self.client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="dml-") as place:
        file = Path(place) / "death"
        cluster = LocalCluster(
            Path(place),
            nodes=3,
            slots=1,
            arguments=["--orphan-grace-s", "0"],
            environ={deaths.VARIABLE: str(file)},
            module="chaos.under_test.node",
        )
        async with cluster:
            stage = Stage(cluster, file)
            await stage.begin()
            yield stage
            await stage.end()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", deaths.AGENT_POINTS)
async def test_the_leader_dies(stage: Stage, point: str, after: bool) -> None:
    await stage.job()
    await _agent_dies(stage, await stage.cluster.leader(30.0), point, after=after)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", OF_FOLLOWERS)
async def test_a_follower_dies(stage: Stage, point: str, after: bool) -> None:
    await stage.job()
    leader = await stage.cluster.leader(30.0)
    follower = min(set(stage.cluster.nodes) - {leader})
    await _agent_dies(stage, follower, point, after=after)


async def _agent_dies(stage: Stage, name: str, point: str, *, after: bool) -> None:
    node = stage.cluster.nodes[name]
    await stage.die(point, after=after, pid=node.pid)
    await stage.cluster.until(_running(node), lambda running: not running, f"{name} to be dead")
    node.start()
    await stage.cluster.wait_ready()
    await stage.goes_on()


def _running(node: Any) -> Any:
    async def ask() -> bool:
        return bool(node.running)

    return ask


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", deaths.WORKER_POINTS)
async def test_a_worker_dies(stage: Stage, point: str, after: bool) -> None:
    worker = (await stage.job())["workers"][1]
    await stage.die(point, after=after, pid=worker["pid"])
    await stage.goes_on()


async def test_the_newest_one_is_gone_on_from_and_nothing_else_stays(stage: Stage) -> None:
    """After all of the above, if they ran."""
    cluster, client, job_id = stage.cluster, stage.client, stage.job_id
    workers = (await stage.job())["workers"]
    newest = (await stage.listed())[-1]["step"]
    await kill_workers(workers)
    source = (await restored(cluster, client, job_id))[-1]["source"]
    assert int(source.removeprefix("checkpoint of step ")) >= newest
    await client.stop(job_id)
    await until_status(cluster, client, job_id, "CANCELLED")

    async def litter() -> list[str]:
        wanted = {one["directory"] for one in await stage.listed()}
        return await asyncio.to_thread(_others, cluster, wanted)

    await cluster.until(litter, lambda found: not found, "only what is needed to be left")


def _others(cluster: LocalCluster, wanted: set[str]) -> list[str]:
    """Files on the nodes' disks of checkpoints that are not listed; what is unfinished stays for an hour."""
    return [
        f"{node.name}: {path}"
        for node in cluster.nodes.values()
        for file in node.store_dir.rglob("ckpt_step_*/*")
        if not file.name.startswith(TEMPORARY_PREFIX)
        and str(path := file.relative_to(node.store_dir).parent) not in wanted
    ]
