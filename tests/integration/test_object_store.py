"""Jobs whose checkpoints are in S3: saved, resumed from after all workers died, and found by a new cluster."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distroml.client import AsyncClient
from distroml.errors import StoreError
from distroml.local_cluster import LocalCluster
from tests.integration.conftest import StartCluster
from tests.integration.jobs import long_spec, until_step
from tests.runtime.checkpoint.object_server import (
    CREDENTIALS,
    SECRET_KEY,
    SESSION_TOKEN,
    Fault,
    FaultProxy,
    object_server,
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_server() as url:
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    made = FaultProxy(server)
    yield made
    made.close()


def spec(store: str, steps: int, every: int, **saving: Any) -> dict[str, Any]:
    made = long_spec(steps=steps, workers=2, every=every)
    made["checkpointing"] |= {"store": store, **saving}
    return made


async def done(client: AsyncClient, document: dict[str, Any]) -> dict[str, Any]:
    job = await client.submit(document)
    ended = await client.wait(job["job_id"], 120)
    assert ended["status"] == "COMPLETED", ended["reason"]
    return ended


def steps_in(page: dict[str, Any]) -> list[int]:
    return [row["step"] for row in page["checkpoints"]]


async def test_a_job_comes_back_from_s3_and_its_store_may_be_away(
    start_cluster: StartCluster, proxy: FaultProxy, tmp_path: Path
) -> None:
    store = f"s3://bucket/runs?endpoint={proxy.url}"
    environ = dict(CREDENTIALS)
    async with (
        start_cluster(nodes=3, slots=1, environ=environ, arguments=["--log-level", "debug"]) as cluster,
        cluster.client("b") as client,
    ):  # fmt: skip
        job_id = (await client.submit(spec(store, 100_000, 90_000)))["job_id"]
        await until_step(cluster, client, job_id, 20)
        first = (await client.checkpoint_now(job_id, 90.0))["step"]
        await _all_workers_die(cluster, client, job_id, first)

        away = Fault(lambda asked: True, 10**6, answer=(503, "SlowDown"))
        proxy.faults.append(away)
        await client.request_checkpoint(job_id)
        before = (await client.job(job_id))["step"]
        await cluster.until(
            lambda: client.job(job_id),
            lambda job: job["step"] >= before + 50 and away.times < 10**6 - 3,
            "training to go on while the store is asked in vain",
        )
        assert steps_in(await client.checkpoints(job_id)) == [first]
        proxy.faults.clear()
        page = await cluster.until(
            lambda: client.checkpoints(job_id),
            lambda page: len(page["checkpoints"]) == 2,
            "the next checkpoint to be committed",
            timeout_s=90.0,
        )
        second = steps_in(page)[1]
        verified = await client.verify_checkpoint(job_id, second)
        assert verified["ok"], verified
        target = tmp_path / "weights.safetensors"
        await client.export_checkpoint(job_id, second, target)
        assert target.stat().st_size > 1000
        await client.stop(job_id)
        await client.wait(job_id, 120)
        await asyncio.to_thread(_nothing_secret, cluster, str(await client.job(job_id)))


async def _all_workers_die(
    cluster: LocalCluster, client: AsyncClient, job_id: str, saved: int
) -> None:
    job = await until_step(cluster, client, job_id, saved + 5)
    for sent in (signal.SIGSTOP, signal.SIGKILL):  # a stopped one sees no other one die
        for worker in job["workers"]:
            os.kill(worker["pid"], sent)
    await cluster.until(
        lambda: client.incidents(job_id),
        lambda found: f"checkpoint of step {saved}" in [i["source"] for i in found["incidents"]],
        "the run to go on from its checkpoint",
        timeout_s=90.0,
    )


def _nothing_secret(cluster: LocalCluster, shown: str) -> None:
    """Neither in the API nor in any file of any node: logs, workers' output, the log of consensus, snapshots."""
    for secret in (SECRET_KEY, SESSION_TOKEN):
        assert secret not in shown
        for file in cluster.directory.rglob("*"):
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file


async def test_what_s3_has_is_found_by_a_new_cluster(
    start_cluster: StartCluster, server: str
) -> None:
    store = f"s3://bucket/lost?endpoint={server}"
    options: dict[str, Any] = {"nodes": 1, "slots": 2, "environ": dict(CREDENTIALS)}
    async with start_cluster(**options) as cluster, cluster.client() as client:
        whole = await done(client, spec("local", 40, 20))
        first = await done(client, spec(store, 20, 10, keep_last=1))
        await cluster.until(
            lambda: client.checkpoints(first["job_id"]),
            lambda page: steps_in(page) == [20],
            "the older one to be retired",
        )

    async with start_cluster(**options) as cluster, cluster.client() as client:
        with pytest.raises(StoreError, match="bucket does not exist there: create it"):
            await client.import_checkpoints(f"s3://not-there?endpoint={server}")
        answer = await client.import_checkpoints(store, verify=True)
        assert answer["unusable"] == []
        (found,) = answer["jobs"]
        assert found["job_id"] == first["job_id"]
        # The first cluster may have ended before it had deleted what it had retired.
        assert found["steps"] in ([20], [10, 20])
        again = await done(client, {**spec(store, 40, 20), "init_from": {"job": first["job_id"]}})
        assert again["result"]["state_digest"] == whole["result"]["state_digest"]


async def test_a_shared_directory_is_a_store(start_cluster: StartCluster, tmp_path: Path) -> None:
    store = tmp_path / "shared"
    store.mkdir()
    async with start_cluster(nodes=3, slots=1) as cluster, cluster.client() as client:
        ended = await done(client, spec(f"file://{store}", 20, 10, keep_last=1))
        page = await client.checkpoints(ended["job_id"])
        assert {row["store"] for row in page["checkpoints"]} == {f"file://{store}"}
        await cluster.until(
            lambda: asyncio.to_thread(_directories, store),
            lambda names: names == ["ckpt_step_00000020"],
            "the leader to delete what is not kept",
        )
        for node in cluster.nodes.values():
            assert not await asyncio.to_thread(_directories, node.store_dir)


def _directories(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("*/*/checkpoints/ckpt_step_*"))
