"""Jobs on an undisturbed cluster, end to end over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from distroml.credentials import new_key
from distroml.errors import Conflict, DistroMLError, InvalidSpec, NotFound, Unavailable
from distroml.local_cluster import LocalCluster
from distroml.runtime.checkpoint.shard_check import damage
from distroml.runtime.checkpoint.stores.file import FileStore
from tests.integration.conftest import StartCluster
from tests.integration.jobs import SEED_SPEC, long_spec, until_status, until_step


async def test_the_seed_job_trains_to_the_end_and_its_stream_tells_all(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=2) as cluster, cluster.client("b") as client:
        job = await client.submit(SEED_SPEC)
        job_id = job["job_id"]
        messages = []
        async with asyncio.timeout(120):
            async with cluster.client("c") as reader:
                async for message in reader.stream(job_id):
                    messages.append(message)
        done = await client.job(job_id)
        assert done["status"] == "COMPLETED", done["reason"]
        assert done["step"] == done["total_steps"] == 2 * 8192 // 64
        assert len(done["result"]["state_digest"]) == 64

        steps = [m["step"] for m in messages if m["type"] == "metric" and "loss" in m]
        assert len(set(steps)) == len(steps), "a step was told twice"
        assert set(steps) == set(range(1, done["total_steps"] + 1))
        states = [m["status"] for m in messages if m["type"] == "state"]
        assert states[-1] == "COMPLETED"
        assert {"STARTING", "RUNNING"} <= set(states)
        assert messages[-1]["type"] == "end"
        assert messages[-1]["status"] == "COMPLETED"

        saved = (await client.checkpoints(job_id))["checkpoints"]
        assert [one["step"] for one in saved] == [200, 256]
        for one in saved:
            _verify(cluster, one, copies=2)
        series = await client.metrics(job_id, name="loss", max_points=10_000)
        assert _points(series, "loss") == done["total_steps"]
        assert (await client.incidents(job_id))["incidents"] == []


def _points(answer: dict[str, Any], name: str) -> int:
    (series,) = [one for one in answer["series"] if one["name"] == name]
    return len(series["steps"])


def _verify(cluster: LocalCluster, checkpoint: dict[str, Any], *, copies: int) -> None:
    """What the record, the manifest and the files say agrees, byte for byte, on each of ``copies`` nodes or more."""
    directory = checkpoint["directory"]
    manifests = cluster.copies(f"{directory}/{checkpoint['manifest']}")
    assert len(manifests) >= copies
    for file in manifests:
        data = file.read_bytes()
        assert hashlib.sha256(data).hexdigest() == checkpoint["manifest_sha256"]
    manifest = json.loads(data)
    assert manifest["step"] == checkpoint["step"]
    for shard in manifest["shards"]:
        files = cluster.copies(f"{directory}/{shard['file']}")
        assert len(files) >= copies
        for file in files:
            content = file.read_bytes()
            assert len(content) == shard["size_bytes"]
            header = content[: shard["header_bytes"]]
            assert hashlib.sha256(header).hexdigest() == shard["header_sha256"]
            assert not damage(FileStore(file.parent), shard["file"], shard["header_sha256"])


async def test_one_node_alone_is_a_cluster(start_cluster: StartCluster) -> None:
    async with start_cluster(nodes=1, slots=2) as cluster, cluster.client() as client:
        job = await client.submit(long_spec(steps=30, workers=2, every=10))
        done = await client.wait(job["job_id"], timeout_s=60)
        assert done["status"] == "COMPLETED", done["reason"]
        assert (await client.leader())["leader"] == "a"


async def test_stop_saves_a_final_checkpoint_and_cancel_does_not_wait(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=1, slots=4) as cluster, cluster.client() as client:
        stopped, cancelled, queued = [
            (await client.submit(long_spec(steps=100_000, workers=2, every=90_000)))["job_id"]
            for _ in range(3)
        ]
        for job_id in (stopped, cancelled):
            await until_step(cluster, client, job_id, 20)
        assert (await client.job(queued))["status"] == "QUEUED"
        await client.stop(stopped)
        await client.cancel(cancelled)
        job = await until_status(cluster, client, stopped, "CANCELLED", "FAILED", "COMPLETED")
        assert job["status"] == "CANCELLED"
        assert "stopped" in job["reason"]
        (saved,) = (await client.checkpoints(stopped))["checkpoints"]
        assert saved["step"] == job["result"]["step"] >= 20
        _verify(cluster, saved, copies=1)
        await until_status(cluster, client, cancelled, "CANCELLED")
        await until_step(cluster, client, queued, 1)
        with pytest.raises(Conflict):
            await client.stop(cancelled)
        await client.remove(cancelled)
        with pytest.raises(NotFound):
            await client.job(cancelled)


async def test_a_job_that_keeps_failing_names_the_first_error(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    (tmp_path / "broken_adapter.py").write_text(
        "import distroml, torch\n"
        "class Broken(distroml.FrameworkAdapter):\n"
        "    def build_model(self, spec):\n"
        "        print('about to fail', flush=True)\n"
        "        raise ValueError('the seventh layer is missing')\n"
        "    def build_dataset(self, spec):\n"
        "        return torch.utils.data.TensorDataset(torch.zeros(64, 2), torch.zeros(64).long())\n"
    )
    environ = {"PYTHONPATH": str(tmp_path)}
    async with (
        start_cluster(nodes=1, slots=2, environ=environ) as cluster,
        cluster.client() as client,
    ):
        spec = {
            "entrypoint": "broken_adapter:Broken",
            "resources": {"workers": 2},
            "max_restarts": 1,
        }
        job = await client.submit(spec)
        done = await client.wait(job["job_id"], timeout_s=60)
        assert done["status"] == "FAILED"
        assert "the seventh layer is missing" in done["reason"]
        incidents = (await client.incidents(job["job_id"]))["incidents"]
        assert len(incidents) == 2
        cause = incidents[0]["cause"]
        assert cause["kind"] == "error"
        assert "ValueError: the seventh layer is missing" in cause["traceback"]
        assert any("about to fail" in line for line in cause["last_lines"])
        lines = (await client.logs(job["job_id"]))["lines"]
        assert any("about to fail" in line["line"] for line in lines)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"resources": {"workers": 0}}, "resources.workers"),
        ({"modle": "mlp"}, "modle"),
        ({"distributed": {"strategy": "fsdp"}}, "distributed.strategy"),
    ],
)
async def test_bad_specs_make_no_job(
    start_cluster: StartCluster, spec: dict[str, Any], field: str
) -> None:
    async with start_cluster(nodes=1, slots=0) as cluster, cluster.client() as client:
        with pytest.raises(InvalidSpec) as caught:
            await client.submit(spec)
        assert caught.value.field == field
        assert (await client.jobs())["jobs"] == []


async def test_a_slow_reader_of_a_stream_does_not_slow_training(
    start_cluster: StartCluster,
) -> None:
    """A socket that is never read must not hold anything up: the job ends, others are served."""
    async with start_cluster(nodes=1, slots=2) as cluster, cluster.client() as client:
        job = await client.submit(long_spec(steps=400, workers=2, every=1000))
        host, port = cluster.nodes["a"].url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(
            f"GET /api/jobs/{job['job_id']}/stream HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        await writer.drain()
        done = await client.wait(job["job_id"], timeout_s=90)
        assert done["status"] == "COMPLETED", done["reason"]
        async with asyncio.timeout(30):
            told = [m async for m in client.stream(job["job_id"])]
        assert told[-1]["type"] == "end"
        writer.close()


async def test_sigterm_hands_over_and_exits_cleanly(start_cluster: StartCluster) -> None:
    async with start_cluster(nodes=3, slots=[0, 0, 0]) as cluster:
        leader = await cluster.leader()
        term_before = (await _ask_leader(cluster, leader))["term"]
        assert await cluster.nodes[leader].stop() == 0
        successor = await cluster.leader()
        assert successor != leader
        assert (await _ask_leader(cluster, successor))["term"] > term_before
        async with cluster.client(successor) as client:
            nodes = {node["name"]: node for node in (await client.nodes())["nodes"]}
        assert nodes[leader]["status"] == "LEFT"


async def test_nodes_that_share_a_key_form_a_cluster_and_one_with_another_key_stays_out(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    for name in ("ours", "foreign"):
        (tmp_path / f"{name}.key").touch(mode=0o600)
        (tmp_path / f"{name}.key").write_text(new_key())
    arguments = ["--cluster-key-file", str(tmp_path / "ours.key")]
    async with start_cluster(nodes=3, slots=0, arguments=arguments) as cluster:
        leader = await cluster.leader()
        follower = next(name for name in cluster.nodes if name != leader)
        await cluster.nodes[follower].stop()
        # the others have read their file already, so only this node gets another key
        (tmp_path / "ours.key").write_text((tmp_path / "foreign.key").read_text())
        cluster.nodes[follower].start()
        async with cluster.client(leader) as client:
            job_id = (await client.submit(SEED_SPEC))["job_id"]

        async def refusals() -> str:
            return cluster.nodes[follower].log_tail()

        await cluster.until(
            refusals,
            lambda log: "does not have this cluster's key" in log,
            "the refusal to be told",
        )
        async with cluster.client(follower, timeout_s=2.0) as client:
            with pytest.raises(Unavailable):
                await client.job(job_id)


async def _ask_leader(cluster: Any, node: str) -> dict[str, Any]:
    async with cluster.client(node) as client:
        answer: dict[str, Any] = await client.leader()
        return answer


async def test_a_write_to_any_node_takes_effect_once(start_cluster: StartCluster) -> None:
    async with start_cluster(nodes=3, slots=0) as cluster:
        answers = []
        for name in ("a", "b", "c", "a"):
            async with cluster.client(name) as client:
                answers.append(await client.submit(SEED_SPEC, key="the-same-key"))
        assert len({answer["job_id"] for answer in answers}) == 1
        async with cluster.client("c") as client:
            assert len((await client.jobs())["jobs"]) == 1
            with pytest.raises(DistroMLError) as caught:
                await client.submit({"name": "another"}, key="the-same-key")
            assert caught.value.status == 422
