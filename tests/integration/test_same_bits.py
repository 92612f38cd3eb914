"""Through the whole stack: whatever fails, the weights, the samples and every loss are those of an undisturbed run."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from distroml.local_cluster import LocalCluster
from tests.soak.play import Bits, digits_job, outcome, play, reached, until_warm
from tests.soak.schedules import Fault, Harm, draw

pytestmark = pytest.mark.asyncio(loop_scope="module")

STEPS = 150
ELASTIC_STEPS = 1000
"""Some are left when it grows, three seconds after it shrank."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[LocalCluster]:
    """Three nodes for all tests of the module; each leaves them all up and idle."""
    with tempfile.TemporaryDirectory(prefix="dml-") as place:
        async with LocalCluster(Path(place), nodes=3, slots=2) as cluster:
            await until_warm(cluster)
            yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(cluster: LocalCluster) -> Bits:
    played = await play(cluster, digits_job(steps=STEPS))
    assert not played.incidents
    assert sorted(played.bits.losses) == list(range(1, STEPS + 1))
    return played.bits


def _at_random_steps() -> tuple[Fault, ...]:
    rng = random.Random(5)
    steps = sorted(rng.sample(range(5, 110), 3))
    return tuple(Fault(step, Harm.KILL, (rng.randrange(4),)) for step in steps)


SCHEDULES = {
    "a worker, three times": _at_random_steps(),
    "two workers at once": (Fault(30, Harm.KILL, (0, 3)),),
    "a stopped worker": (Fault(40, Harm.STOP, (1,)),),
    "all workers at once": (Fault(60, Harm.KILL, (0, 1, 2, 3)),),
    "a node": (Fault(35, Harm.NODE),),
    "the leader": (Fault(45, Harm.LEADER),),
    "at random": draw(seed=1, last_step=100),
}


def _most_incidents(schedule: Sequence[Fault]) -> int:
    """Of ranks that are killed at once, the last may be found dead when the others are replaced already."""
    return sum(max(1, len(fault.ranks)) for fault in schedule)


@pytest.mark.parametrize("name", SCHEDULES)
async def test_faults_do_not_change_a_bit(
    cluster: LocalCluster, undisturbed: Bits, name: str
) -> None:
    schedule = SCHEDULES[name]
    played = await play(cluster, digits_job(steps=STEPS), schedule)
    assert undisturbed.differences(played.bits) == []
    assert 1 <= len(played.incidents) <= _most_incidents(schedule), (
        "faults that did nothing prove nothing"
    )
    if len(schedule[0].ranks) < 4:
        assert all(incident["steps_lost"] == 0 for incident in played.incidents)


@pytest.mark.timeout(480)
async def test_a_job_that_shrinks_and_grows_does_not_change_a_bit(cluster: LocalCluster) -> None:
    """It loses one of two nodes, and gets the third one, which is warm: that takes less time than a node's return."""
    spec = digits_job(steps=ELASTIC_STEPS, min_workers=2)
    leader = await cluster.leader()
    dead, spare = sorted(set(cluster.nodes) - {leader})
    expected = (await play(cluster, spec)).bits
    async with cluster.client() as client:
        await client.drain(spare)
        job_id = (await client.submit(spec))["job_id"]
        assert await reached(client, job_id, 20)
        whole = await cluster.until(
            lambda: client.job(job_id),
            lambda job: {w["node"] for w in job["workers"]} == {leader, dead} and _is_of(job, 4),
            "four workers to train on two nodes",
        )
        cluster.nodes[dead].power_off()
        await cluster.until(
            lambda: client.job(job_id),
            lambda job: job["generation"] > whole["generation"] and _is_of(job, 2),
            "the job to go on with two workers",
        )
        await client.drain(spare, undo=True)
        cluster.nodes[dead].start()
        played = await outcome(client, await client.wait(job_id, 240))
        await until_warm(cluster, dead)
    assert expected.differences(played.bits) == []
    assert len(played.incidents) == 1
    assert played.incidents[0]["steps_lost"] == 0
    assert played.job["reason"].startswith("4 workers finished")


def _is_of(job: dict[str, Any], workers: int) -> bool:
    return len(job["workers"]) == workers and all(one["pid"] for one in job["workers"])
