"""Checkpoints on the disks of nodes that share nothing: what is left when a host is lost with its disk."""

from __future__ import annotations

import asyncio
import shutil
import urllib.request

from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster, LocalNode
from tests.integration.conftest import StartCluster
from tests.integration.jobs import kill_workers, long_spec, restored, until_status, until_step


async def _files(cluster: LocalCluster, client: AsyncClient, job_id: str) -> dict[str, list[str]]:
    """Nodes that have each file of each listed checkpoint."""
    found: dict[str, list[str]] = {}
    for row in (await client.checkpoints(job_id))["checkpoints"]:
        shown = await client.checkpoint(job_id, row["step"])
        names = [row["manifest"], *(shard["file"] for shard in shown["files"])]
        for name in names:
            path = f"{row['directory']}/{name}"
            there = await asyncio.to_thread(cluster.copies, path)
            found[path] = [
                node.name for node in cluster.nodes.values() if node.store_dir / path in there
            ]
    return found


async def _whole_everywhere(cluster: LocalCluster, job_id: str, names: list[str]) -> None:
    """Each of these nodes finds every byte of every listed checkpoint."""
    for name in names:
        async with cluster.client(name, timeout_s=60.0) as client:
            for row in (await client.checkpoints(job_id))["checkpoints"]:
                checked = await client.verify_checkpoint(job_id, row["step"])
                assert checked["ok"], (name, checked)


def _metrics(node: LocalNode) -> dict[str, float]:
    with urllib.request.urlopen(f"{node.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


async def test_a_host_that_is_lost_with_its_disk_takes_no_checkpoint_with_it(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=2) as cluster:
        spec = long_spec(steps=100_000, workers=3, every=20)
        spec["checkpointing"] |= {"keep_last": 1000, "delta": True}
        async with cluster.client(timeout_s=30.0) as client:
            job_id = (await client.submit(spec))["job_id"]
            job = await until_step(cluster, client, job_id, 100)
            files = await _files(cluster, client, job_id)
            assert files
            assert all(len(nodes) >= 2 for nodes in files.values()), files
            lost = cluster.nodes[await cluster.leader()]
            await kill_workers(job["workers"])
            lost.power_off()
            await asyncio.to_thread(shutil.rmtree, lost.data_dir)
        left = [name for name in cluster.nodes if name != lost.name]
        async with cluster.client(*left, timeout_s=60.0) as client:
            await restored(cluster, client, job_id)
            await _whole_everywhere(cluster, job_id, left)
            await client.stop(job_id)
            await until_status(cluster, client, job_id, "CANCELLED")

            async def lacking() -> dict[str, list[str]]:
                found = await _files(cluster, client, job_id)
                return {path: nodes for path, nodes in found.items() if len(nodes) < 2}

            await cluster.until(
                lacking, lambda found: not found, "two copies of each file again", timeout_s=60.0
            )
            measured = await asyncio.to_thread(
                _metrics, cluster.nodes[(await client.leader())["leader"]]
            )
            assert measured['distroml_checkpoint_copies_total{event="restored"}'] > 0
            assert measured["distroml_checkpoint_files_lost"] == 0


async def test_a_broken_copy_is_not_the_end_of_a_checkpoint(start_cluster: StartCluster) -> None:
    async with start_cluster(nodes=3, slots=1) as cluster, cluster.client(timeout_s=60.0) as client:
        spec = long_spec(steps=100_000, workers=3, every=90_000)
        job_id = (await client.submit(spec))["job_id"]
        await until_step(cluster, client, job_id, 20)
        saved = await client.checkpoint_now(job_id, 60.0)
        files = await _files(cluster, client, job_id)
        broken = []
        for path, (holder, *_) in files.items():
            file = cluster.nodes[holder].store_dir / path
            data = bytearray(await asyncio.to_thread(file.read_bytes))
            data[-20] ^= 0x40
            await asyncio.to_thread(file.write_bytes, data)
            broken.append(file)
        await kill_workers((await client.job(job_id))["workers"])
        incidents = await restored(cluster, client, job_id)
        assert incidents[-1]["source"] == f"checkpoint of step {saved['step']}"
        assert "corrupt_checkpoint" not in [one["cause"]["kind"] for one in incidents]
        await _whole_everywhere(cluster, job_id, list(cluster.nodes))
        logs = cluster.log_tails(10_000)
        for file in broken:
            assert f"/{file.name}" in logs
        assert "has a broken" in logs
        await client.cancel(job_id)


async def test_a_checkpoint_whose_only_node_is_away_is_waited_for(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=1) as cluster:
        spec = long_spec(steps=100_000, workers=1, every=90_000)
        spec["checkpointing"] |= {"replicas": 1}
        async with cluster.client(timeout_s=60.0) as client:
            job_id = (await client.submit(spec))["job_id"]
            job = await until_step(cluster, client, job_id, 20)
            saved = await client.checkpoint_now(job_id, 60.0)
        away = cluster.nodes[job["workers"][0]["node"]]
        away.power_off()
        left = [name for name in cluster.nodes if name != away.name]
        async with cluster.client(*left, timeout_s=60.0) as client:

            async def causes() -> list[str]:
                listed = (await client.incidents(job_id))["incidents"]
                return [one["cause"]["kind"] for one in listed]

            await cluster.until(
                causes,
                lambda found: "checkpoint_away" in found,
                "the run to notice who is away",
                timeout_s=60.0,
            )
            assert away.name in (await client.job(job_id))["reason"]
            away.start()
            incidents = await restored(cluster, client, job_id)
            assert incidents[-1]["source"] == f"checkpoint of step {saved['step']}"
            assert (await client.job(job_id))["restarts"] == 1, "only the node's end counts"
            (listed,) = (await client.checkpoints(job_id))["checkpoints"]
            assert listed["status"] == "COMMITTED"
            await client.cancel(job_id)
