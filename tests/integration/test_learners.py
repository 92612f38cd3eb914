"""Learners as a user starts them: they run workers, serve the API, and may die like any node."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distroml.errors import Conflict, NotFound, Unavailable
from distroml.local_cluster import LocalCluster, LocalNode, free_ports
from tests.integration.conftest import StartCluster
from tests.integration.jobs import long_spec, until_checkpoint, until_step

STEPS = 200


async def test_a_job_on_learners_outlives_the_leader_and_a_learner(
    start_cluster: StartCluster,
) -> None:
    async with (
        start_cluster(nodes=3, learners=2, slots=[0, 0, 0, 3, 3]) as cluster,
        cluster.client("l1", "l2") as client,
    ):
        nodes = {node["name"]: node for node in (await client.nodes())["nodes"]}
        assert [nodes[name]["role"] for name in ("a", "b", "c", "l1", "l2")] == [
            *["voter"] * 3,
            *["learner"] * 2,
        ]
        spec = long_spec(steps=STEPS, workers=3)
        job_id = (await client.submit(spec))["job_id"]
        await until_checkpoint(cluster, client, job_id)
        led = await cluster.leader()
        cluster.nodes[led].kill()
        job = await until_step(cluster, client, job_id, 60)
        cluster.nodes[led].start()  # it may be the one that keeps what the learner writes
        await cluster.wait_ready(led)
        victim = job["workers"][0]["node"]
        cluster.nodes[victim].kill()
        other = "l2" if victim == "l1" else "l1"
        async with cluster.client(other) as survivor:
            done = await survivor.wait(job_id, timeout_s=120)
            assert done["status"] == "COMPLETED", done["reason"]
            assert {worker["node"] for worker in done["workers"]} <= {other}
            cluster.nodes[victim].start()
            await cluster.wait_ready(victim)
            await cluster.until(
                survivor.nodes,
                lambda page: all(
                    node["status"] == "ALIVE" and node["incarnation"] == 2
                    for node in page["nodes"]
                    if node["name"] == victim
                ),
                f"{victim} to be back",
            )
        async with cluster.client(victim) as back:
            assert (await back.job(job_id))["status"] == "COMPLETED"
            ours = await cluster.until(
                lambda: back.logs(job_id),
                lambda page: len({line["rank"] for line in page["lines"]}) == 3,
                "the logs of all ranks to reach the learner",
            )
            assert ours["lines"]


async def test_leadership_moves_among_voters_on_a_word_at_any_node(
    start_cluster: StartCluster,
) -> None:
    async with (
        start_cluster(nodes=3, learners=1, slots=0) as cluster,
        cluster.client("l1") as client,
    ):
        for target in ("a", "b", "c"):
            assert (await client.transfer_leadership(target))["leader"] == target
            assert await cluster.leader() == target
        assert (await client.transfer_leadership())["leader"] != "c"
        with pytest.raises(
            Conflict, match="does not vote, so it cannot lead; the voters are a, b, c"
        ):
            await client.transfer_leadership("l1")
        with pytest.raises(NotFound, match="no node 'nobody'"):
            await client.transfer_leadership("nobody")
        leader = await cluster.leader()
        dead = next(name for name in "abc" if name != leader)
        cluster.nodes[dead].kill()
        with pytest.raises(Conflict, match=f"'{dead}' did not take over .* '{leader}' leads on"):
            await client.transfer_leadership(dead)
        assert await cluster.leader() == leader
        third = next(name for name in "abc" if name not in (leader, dead))
        cluster.nodes[third].kill()
        with pytest.raises((Conflict, Unavailable), match=r"No other voter took over|Nobody leads"):
            await client.transfer_leadership()


async def test_the_only_voter_keeps_leadership_and_says_why(start_cluster: StartCluster) -> None:
    async with (
        start_cluster(nodes=1, slots=0) as cluster,
        cluster.client() as client,
    ):
        (name,) = cluster.nodes
        assert (await client.transfer_leadership(name))["leader"] == name
        with pytest.raises(Conflict, match=f"There is no other voter; '{name}' leads on"):
            await client.transfer_leadership()
        assert await cluster.nodes[name].stop() == 0


async def test_a_learner_outlives_a_rolling_restart_of_all_voters_and_the_loss_of_its_directory(
    start_cluster: StartCluster,
) -> None:
    async with (
        start_cluster(nodes=3, learners=1, slots=0) as cluster,
        cluster.client("a", "b", "c") as client,
        cluster.client("l1") as reader,
    ):

        async def follows() -> None:
            job_id = (await client.submit(long_spec(steps=1, workers=1)))["job_id"]
            await cluster.until(
                reader.jobs,
                lambda page: job_id in {job["job_id"] for job in page["jobs"]},
                "the learner to see the new job",
            )

        for name in "abc":
            assert await cluster.nodes[name].stop() == 0
            cluster.nodes[name].start()
            await cluster.wait_ready(name)
            await follows()
        cluster.nodes["l1"].kill()
        shutil.rmtree(cluster.directory / "l1")
        cluster.nodes["l1"].start()
        await cluster.wait_ready("l1")
        await follows()
        listed = {node["name"]: node for node in (await client.nodes())["nodes"]}
        assert (listed["l1"]["status"], listed["l1"]["incarnation"]) == ("ALIVE", 2)


async def test_a_learner_that_does_not_belong_is_told_why(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    async with start_cluster(nodes=3, learners=1, slots=0) as cluster:
        impostor = _learner(cluster, tmp_path, "l1")
        stranger = _learner(cluster, tmp_path, "l9", "--cluster-id", "another")
        try:
            for node, said in (
                (impostor, "another node of this node's name is there already"),
                (stranger, "it is of another cluster"),
            ):
                node.start()
                await cluster.until(
                    lambda node=node: _log(node),  # type: ignore[misc]
                    lambda text, said=said: said in text,  # type: ignore[misc]
                    f"{node.name} to be told: {said}",
                )
        finally:
            impostor.kill()
            stranger.kill()
        async with cluster.client() as client:
            listed = {node["name"]: node for node in (await client.nodes())["nodes"]}
        assert "l9" not in listed
        assert (listed["l1"]["status"], listed["l1"]["incarnation"]) == ("ALIVE", 1)


def _learner(cluster: LocalCluster, directory: Path, name: str, *flags: str) -> LocalNode:
    """One more learner of the cluster's voters, not started yet."""
    listen, http = (f"127.0.0.1:{port}" for port in free_ports(2))
    voters = ",".join(f"{voter}={cluster.nodes[voter].peer_address}" for voter in "abc")
    arguments = ["--name", name, "--join", voters, "--listen", listen, "--http", http]
    arguments += ["--slots", "0", "--data-dir", str(directory / f"other-{name}"), *flags]
    return LocalNode(f"other-{name}", directory, arguments, http, listen)


async def _log(node: LocalNode) -> str:
    return node.log_tail(200)
