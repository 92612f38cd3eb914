"""SIGKILL against workers, nodes, the leader, and all at once: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distroml.client import AsyncClient
from distroml.errors import Unavailable
from distroml.local_cluster import LocalCluster
from tests.integration.conftest import StartCluster
from tests.integration.jobs import long_spec, until_checkpoint, until_step

STEPS = 300


async def _digest_of_an_undisturbed_run(cluster: LocalCluster) -> str:
    async with cluster.client() as client:
        job = await client.submit(long_spec(steps=STEPS))
        done = await client.wait(job["job_id"], timeout_s=120)
        assert done["status"] == "COMPLETED", done["reason"]
        assert done["restarts"] == 0
        return str(done["result"]["state_digest"])


async def _finished(client: AsyncClient, job_id: str) -> dict[str, Any]:
    done: dict[str, Any] = await client.wait(job_id, timeout_s=120)
    assert done["status"] == "COMPLETED", done["reason"]
    return done


async def test_killed_workers_and_a_killed_leader_do_not_change_the_result(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=2) as cluster:
        digest = await _digest_of_an_undisturbed_run(cluster)
        async with cluster.client() as client:
            job_id = (await client.submit(long_spec(steps=STEPS)))["job_id"]
            await until_checkpoint(cluster, client, job_id)
            job = await until_step(cluster, client, job_id, 60)
            victim = job["workers"][2]
            os.kill(victim["pid"], signal.SIGKILL)
            job = await cluster.until(
                lambda: client.job(job_id),
                lambda job: (
                    job["generation"] == 2 and job["status"] in ("RUNNING", "CHECKPOINTING")
                ),
                "generation 2 to train",
            )
            leader = await cluster.leader()
            cluster.nodes[leader].kill()
            successor = await cluster.leader()
            assert successor != leader
            cluster.nodes[leader].start()
            done = await _finished(client, job_id)
            assert done["result"]["state_digest"] == digest
            await cluster.wait_ready(leader)
            incidents = (await client.incidents(job_id))["incidents"]
        first = incidents[0]
        assert first["cause"]["rank"] == 2
        assert first["cause"]["signal"] == "SIGKILL"
        assert f"worker 2 on node {victim['node']}" in first["reason"]
        assert sorted(first["collateral"]) == [0, 1, 3]
        assert first["phases_ms"]["total"] > 0
        assert first["steps_lost"] >= 0


async def test_a_leader_without_workers_dies_unnoticed_by_training(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=[1, 1, 0]) as cluster:
        await _make_leader(cluster, "c")
        async with cluster.client("a", "b") as client:
            spec = long_spec(steps=1_000_000, workers=2, every=900_000)
            job_id = (await client.submit(spec))["job_id"]
            before = await until_step(cluster, client, job_id, 20)
            cluster.nodes["c"].kill()
            assert await cluster.leader() in ("a", "b")
            now = await client.job(job_id)
            after = await until_step(cluster, client, job_id, now["step"] + 50)
            assert after["generation"] == before["generation"] == 1
            assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]
            await client.cancel(job_id)


async def _make_leader(cluster: LocalCluster, wanted: str) -> None:
    """Restart leaders until ``wanted`` leads; each handover picks one of the other two."""
    for _ in range(12):
        leader = await cluster.leader()
        if leader == wanted:
            return
        await cluster.nodes[leader].stop()
        await cluster.leader()
        cluster.nodes[leader].start()
        await cluster.wait_ready(leader)
    raise AssertionError(f"{wanted} did not become the leader in 12 handovers")


async def test_jobs_acknowledged_around_a_leader_kill_exist_exactly_once(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=0) as cluster:
        leader = await cluster.leader()
        followers = [name for name in cluster.nodes if name != leader]
        acknowledged: list[str] = []
        posted = 0
        killed = asyncio.Event()

        async def post(name: str) -> None:
            nonlocal posted
            async with cluster.client(name, timeout_s=20) as client:
                for number in range(60):
                    posted += 1
                    job = await client.submit({"name": f"{name}-{number}"})
                    acknowledged.append(job["job_id"])
                    if len(acknowledged) == 20:
                        cluster.nodes[leader].kill()
                        killed.set()

        await asyncio.gather(*(post(name) for name in followers))
        assert killed.is_set()
        cluster.nodes[leader].start()
        await cluster.wait_ready()
        for name in cluster.nodes:
            async with cluster.client(name) as client:
                jobs = (await client.jobs(limit=1000))["jobs"]
                assert sorted(job["job_id"] for job in jobs) == sorted(acknowledged)
                assert len({job["name"] for job in jobs}) == posted


async def test_all_nodes_killed_at_once_resume_from_the_checkpoint(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=2) as cluster:
        digest = await _digest_of_an_undisturbed_run(cluster)
        async with cluster.client() as client:
            job_id = (await client.submit(long_spec(steps=STEPS)))["job_id"]
            saved = await until_checkpoint(cluster, client, job_id)
            workers = (await client.job(job_id))["workers"]
            for node in cluster.nodes.values():
                node.signal(signal.SIGKILL)
            for node in cluster.nodes.values():
                node.kill()
            await cluster.until(
                lambda: _alive(workers), lambda left: not left, "workers to end with their agents"
            )
            for node in cluster.nodes.values():
                node.start()
            done = await _finished(client, job_id)
            assert done["result"]["state_digest"] == digest
            incident = (await client.incidents(job_id))["incidents"][0]
            assert incident["resume_step"] >= saved["checkpoints"][0]["step"]


async def _alive(workers: list[dict[str, Any]]) -> list[int]:
    return [worker["pid"] for worker in workers if _is_alive(worker["pid"])]


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


async def test_a_corrupt_checkpoint_is_passed_over_loudly(start_cluster: StartCluster) -> None:
    async with start_cluster(nodes=1, slots=2) as cluster, cluster.client() as client:
        # One worker: a survivor, for however short a time, would know better than any checkpoint.
        spec = long_spec(steps=100_000, workers=1, every=300)
        job_id = (await client.submit(spec))["job_id"]
        answer = await cluster.until(
            lambda: client.checkpoints(job_id),
            lambda answer: len(answer["checkpoints"]) >= 2,
            "two checkpoints",
        )
        (worker,) = (await client.job(job_id))["workers"]
        newest = max(answer["checkpoints"], key=lambda one: one["step"])
        (shard,) = cluster.copies(f"{newest['directory']}/worker_0.safetensors")
        content = bytearray(shard.read_bytes())
        content[-5] ^= 0x40
        os.kill(worker["pid"], signal.SIGKILL)
        shard.write_bytes(content)
        resumed = await cluster.until(
            lambda: client.job(job_id),
            lambda job: job["generation"] == 3 and job["step"] > newest["step"],
            "generation 3 to pass the corrupt step",
        )
        incidents = (await client.incidents(job_id))["incidents"]
        assert [one["cause"]["kind"] for one in incidents] == ["exit", "corrupt_checkpoint"]
        assert "worker_0.safetensors" in incidents[1]["reason"]
        assert incidents[0]["resume_step"] == newest["step"]
        assert incidents[1]["resume_step"] < newest["step"]
        assert resumed["restarts"] == 1, "a corrupt checkpoint is not the job's fault"
        await client.cancel(job_id)


async def test_a_write_without_a_quorum_is_refused_in_time(start_cluster: StartCluster) -> None:
    async with start_cluster(nodes=3, slots=0) as cluster:
        survivor = "a"
        for name in ("b", "c"):
            cluster.nodes[name].kill()
        async with cluster.client(survivor, timeout_s=25) as client:
            with pytest.raises(Unavailable) as caught:
                await client.submit({"name": "nobody-agrees"})
            assert caught.value.status in (503, 504)
