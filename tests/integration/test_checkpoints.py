"""Checkpoints of a real cluster as a user handles them: asked for, retired, begun with, exported, imported."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from distroml.client import AsyncClient
from distroml.errors import Conflict, InvalidSpec
from distroml.local_cluster import LocalCluster
from tests.integration.conftest import StartCluster
from tests.integration.jobs import long_spec, until_step


def spec(steps: int, every: int = 10, **saving: Any) -> dict[str, Any]:
    made = long_spec(steps=steps, workers=2, every=every)
    made["checkpointing"] |= saving
    return made


def directories(cluster: LocalCluster, job_id: str) -> list[int]:
    """Steps whose files are on some node's disk."""
    found = {
        int(path.name[10:])
        for node in cluster.nodes.values()
        for path in node.store_dir.glob(f"{job_id}/*/checkpoints/ckpt_step_*")
    }
    return sorted(found)


def steps_in(page: dict[str, Any]) -> list[int]:
    return [row["step"] for row in page["checkpoints"]]


async def test_a_checkpoint_is_saved_on_demand_and_only_the_newest_are_kept(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(nodes=3, slots=1) as cluster, cluster.client("b") as client:
        job = await client.submit(spec(100_000, every=90_000, keep_last=2))
        job_id = job["job_id"]
        await until_step(cluster, client, job_id, 20)
        saved = []
        for _ in range(4):
            before = (await client.job(job_id))["step"]
            one = await client.checkpoint_now(job_id, 60.0)
            assert one["step"] > before, "it was taken before it was asked for"
            saved.append(one["step"])
        assert saved == sorted(set(saved))
        page = await cluster.until(
            lambda: client.checkpoints(job_id),
            lambda page: steps_in(page) == saved[-2:],
            "all but the newest two to be retired",
        )
        assert page["saved_request"] == page["save_request"] == 4
        await cluster.until(
            lambda: asyncio.to_thread(directories, cluster, job_id),
            lambda left: left == saved[-2:],
            "the files of the others to be gone",
        )
        verified = await client.verify_checkpoint(job_id, saved[-1])
        assert verified["ok"], verified
        with pytest.raises(Conflict):
            await client.remove_checkpoint(job_id, saved[-1])
        await client.stop(job_id)
        with pytest.raises(Conflict):
            await client.request_checkpoint(job_id)


async def test_a_job_goes_on_with_anothers_checkpoint_after_everything_else_is_lost(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    """60 steps in one job end in the same bits as 30 and, in another job of a new cluster, 30 more."""
    store = tmp_path / "shared"
    async with start_cluster(nodes=1, slots=2) as cluster, cluster.client() as client:
        whole = await _done(client, spec(60))
        first = await _done(client, spec(30))
        *earlier, last = steps_in(await client.checkpoints(first["job_id"]))
        assert earlier[:1] == [10], "the first one never finds another still being written"
        assert last == 30
        second = await _done(client, {**spec(60), "init_from": {"job": first["job_id"]}})
        assert second["result"]["state_digest"] == whole["result"]["state_digest"]
        assert second["result"]["sample_digest"] == whole["result"]["sample_digest"]
        assert steps_in(await client.checkpoints(second["job_id"]))[:2] == [30, 40]
        tuned = await _done(
            client,
            {**spec(10), "init_from": {"job": first["job_id"], "step": 10, "weights_only": True}},
        )
        assert tuned["result"]["step"] == 10
        with pytest.raises(InvalidSpec, match=r"init_from\.job"):
            await client.submit({**spec(60), "init_from": {"job": "job-none"}})
        wider = {**spec(60), "init_from": {"job": first["job_id"]}, "max_restarts": 0}
        failed = await client.submit({**wider, "model_options": {"hidden": 33}})
        assert (
            "does not fit this job's model" in (await client.wait(failed["job_id"], 60))["reason"]
        )
        await _export(client, first["job_id"], tmp_path)
        await asyncio.to_thread(shutil.copytree, cluster.nodes["a"].store_dir, store)

    async with start_cluster(nodes=1, slots=2) as cluster, cluster.client() as client:
        own = cluster.nodes["a"].store_dir
        await asyncio.to_thread(shutil.copytree, store, own, dirs_exist_ok=True)
        answer = await client.import_checkpoints("local", verify=True)
        assert answer["unusable"] == []
        assert first["job_id"] in [one["job_id"] for one in answer["jobs"]]
        again = await _done(client, {**spec(60), "init_from": {"job": first["job_id"], "step": 30}})
        assert again["result"]["state_digest"] == whole["result"]["state_digest"]
        await _removed(cluster, client, first["job_id"], earlier)


async def _done(client: AsyncClient, document: dict[str, Any]) -> dict[str, Any]:
    job = await client.submit(document)
    done = await client.wait(job["job_id"], 90)
    assert done["status"] == "COMPLETED", done["reason"]
    return done


async def _export(client: AsyncClient, job_id: str, directory: Path) -> None:
    from safetensors.torch import load_file

    weights, everything = directory / "weights.safetensors", directory / "all.safetensors"
    await client.export_checkpoint(job_id, 30, weights)
    await client.export_checkpoint(job_id, 30, everything, everything=True)
    tensors, all_tensors = load_file(weights), load_file(everything)
    assert tensors
    assert not any(name.startswith(("model.", "optimizer.")) for name in tensors)
    assert any(name.startswith("optimizer.") for name in all_tensors)
    for name, tensor in tensors.items():
        assert tensor.equal(all_tensors[name])


async def _removed(
    cluster: LocalCluster, client: AsyncClient, job_id: str, earlier: list[int]
) -> None:
    """Of an imported job only what is removed by request goes."""
    await client.remove_checkpoint(job_id, 30)
    await cluster.until(
        lambda: asyncio.to_thread(directories, cluster, job_id),
        lambda left: left == earlier,
        "the files of the removed one to be gone",
    )
    (latest,) = cluster.nodes["a"].store_dir.glob(f"{job_id}/*/checkpoints/LATEST")
    await cluster.until(
        lambda: asyncio.to_thread(latest.read_text),
        lambda text: f'"step":{earlier[-1]}' in text,
        "LATEST to name the newest that is left",
    )
