"""A run whose only node is drained or shuts down goes on elsewhere, from the very step that it had come to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from distroml.local_cluster import LocalCluster
from tests.integration.conftest import StartCluster
from tests.integration.jobs import long_spec, until_step

STEPS = 4000


async def _drain(cluster: LocalCluster, name: str) -> None:
    async with cluster.client() as client:
        await client.drain(name)


async def _stop(cluster: LocalCluster, name: str) -> None:
    await cluster.nodes[name].stop()


@pytest.mark.parametrize("leave", [_drain, _stop])
async def test_the_only_rank_of_a_run_loses_no_step(
    start_cluster: StartCluster, leave: Any
) -> None:
    spec = long_spec(steps=STEPS, workers=1, checkpointing={"enabled": False})
    async with start_cluster(nodes=3, slots=1) as cluster, cluster.client() as client:
        undisturbed = await client.submit(spec)
        disturbed = await client.submit(spec | {"name": "disturbed"})
        job = await until_step(cluster, client, disturbed["job_id"], 20)
        await leave(cluster, job["workers"][0]["node"])
        async with asyncio.timeout(120):
            expected = await client.wait(undisturbed["job_id"], timeout_s=120)
            done = await client.wait(disturbed["job_id"], timeout_s=120)
        incidents = (await client.incidents(disturbed["job_id"]))["incidents"]
        assert done["status"] == "COMPLETED", done["reason"]
        assert (done["generation"], done["restarts"], len(incidents)) == (2, 0, 1)
        assert (incidents[0]["cause"]["kind"], incidents[0]["steps_lost"]) == ("node_left", 0)
        assert incidents[0]["reason"].endswith("is saved")
        for digest in ("state_digest", "sample_digest"):
            assert done["result"][digest] == expected["result"][digest]
