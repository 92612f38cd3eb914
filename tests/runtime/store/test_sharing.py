"""A node knows when others have what it recorded, however the links behave meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.retention import HistoryLimits
from tests.runtime.store.histories import JOB, Cluster, key, lines, originate


async def steps(cluster: Cluster, task: asyncio.Task[None], most: int) -> None:
    """Let time pass until ``task`` has ended, or so often."""
    for _ in range(most):
        if task.done():
            return
        cluster.step()
        await asyncio.sleep(0.002)


def has_all(cluster: Cluster, name: str, rank: int, count: int) -> bool:
    return cluster.stores[name].heads(JOB).get(key(rank)) == count


async def test_records_are_shared_once_another_node_has_them(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    originate(cluster, "a", key(0), 5)
    task = asyncio.create_task(cluster.replicators["a"].sharing.shared(JOB))
    await asyncio.sleep(0)
    assert not task.done()
    await steps(cluster, task, 2000)
    assert task.done()
    assert has_all(cluster, "b", 0, 5) or has_all(cluster, "c", 0, 5)
    await asyncio.wait_for(cluster.replicators["a"].sharing.shared(JOB), 5)  # it knows by now


async def test_they_are_not_while_nobody_can_be_reached(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for peer in "bc":
        cluster.wire.set_link("a", peer, up=False)
    originate(cluster, "a", key(0), 5)
    task = asyncio.create_task(cluster.replicators["a"].sharing.shared(JOB))
    await steps(cluster, task, 100)
    assert not task.done()
    cluster.wire.set_link("a", "c", up=True)
    await steps(cluster, task, 2000)
    assert task.done()
    assert has_all(cluster, "c", 0, 5)


async def test_losses_on_the_way_are_made_good(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.wire.loss = 0.5
    originate(cluster, "a", key(0), 40)
    task = asyncio.create_task(cluster.replicators["a"].sharing.shared(JOB))
    await steps(cluster, task, 5000)
    assert task.done()
    assert has_all(cluster, "b", 0, 40) or has_all(cluster, "c", 0, 40)


async def test_what_comes_later_and_what_others_recorded_is_not_waited_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    originate(cluster, "a", key(0), 5)
    originate(cluster, "b", key(1), 5)
    cluster.run(5)
    originate(cluster, "b", key(1), 5)
    task = asyncio.create_task(cluster.replicators["a"].sharing.shared(JOB))
    await asyncio.sleep(0)
    originate(cluster, "a", key(0), 5)
    cluster.wire.set_link("a", "b", up=False)
    await steps(cluster, task, 2000)
    assert task.done()


async def test_generations_of_long_ago_are_not_asked_for(tmp_path: Path) -> None:
    async with HistoryStore(tmp_path) as store:
        for generation in (1, 2, 3):
            store.append(key(0, generation), 0, lines(0, generation))
        store.append(key(1, 9), 0, lines(0, 9), local=False)
        assert store.own_heads(JOB) == {key(0, 2): 2, key(0, 3): 3}


async def test_a_node_alone_waits_for_nobody(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "a")
    originate(cluster, "a", key(0), 5)
    await asyncio.wait_for(cluster.replicators["a"].sharing.shared(JOB), 5)


async def test_who_is_in_a_hurry_does_not_wait_for_more_records(tmp_path: Path) -> None:
    async with HistoryStore(tmp_path, limits=HistoryLimits(flush_s=3600.0)) as store:
        store.append(key(), 0, lines(0, 3))
        await asyncio.sleep(0)
        assert store.heads(JOB)[key()] == 0
        store.hurry()
        await asyncio.wait_for(store.settled(), 20)
        assert store.heads(JOB)[key()] == 3
