"""Who reads history at a node that was away gets what others recorded meanwhile, or waits a moment at most."""

from __future__ import annotations

import asyncio
from pathlib import Path

from distroml.runtime.store.catching_up import COMPARISON_S, START_S
from tests.runtime.store.histories import JOB, Cluster, key, originate
from tests.runtime.store.test_sharing import has_all, steps

MANY = 1500
"""Streams: more than one message has room for."""


def reader(cluster: Cluster, name: str) -> asyncio.Task[None]:
    return asyncio.create_task(cluster.replicators[name].caught_up())


async def test_a_reader_at_a_node_that_comes_back_waits_until_it_has_what_the_others_have(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path)
    cluster.crash("c")
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    cluster.known.clear()  # it has yet to apply the log
    cluster.start("c")
    cluster.run(0.5)
    task = reader(cluster, "c")
    await asyncio.sleep(0)
    assert not task.done()
    cluster.known.add(JOB)
    cluster.replicators["c"].catch_up()
    await steps(cluster, task, 1000)
    assert task.done()
    assert has_all(cluster, "c", 0, 40)


async def test_what_needs_many_messages_to_tell_is_waited_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    cluster.crash("b")
    for rank in range(MANY):
        originate(cluster, "a", key(rank), 1)
    cluster.run(0.5)
    cluster.start("b")
    cluster.replicators["b"].catch_up()
    task = reader(cluster, "b")
    await steps(cluster, task, 1000)
    assert task.done()
    cluster.stores["b"].flush()
    assert list(cluster.stores["b"].heads(JOB).values()) == [1] * MANY


async def test_a_reader_at_a_node_that_was_cut_off_waits_too(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for replicator in cluster.replicators.values():
        replicator.catch_up()
    cluster.run(5)
    for peer in "ab":
        cluster.wire.set_link("c", peer, up=False)
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    await asyncio.wait_for(cluster.replicators["c"].caught_up(), 5)
    for peer in "ab":
        cluster.wire.set_link("c", peer, up=True)
    task = reader(cluster, "c")
    await asyncio.sleep(0)
    assert not task.done()
    await steps(cluster, task, 1000)
    assert task.done()
    assert has_all(cluster, "c", 0, 40)


async def test_a_peer_that_does_not_answer_holds_readers_up_for_a_moment_only(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path)
    cluster.replicators["c"].catch_up()
    cluster.wire.loss = 1.0
    cluster.wire.letters.clear()
    task = reader(cluster, "c")
    began = cluster.now
    await steps(cluster, task, 1000)
    assert task.done()
    assert COMPARISON_S <= cluster.now - began <= COMPARISON_S + 1


async def test_so_does_a_log_that_cannot_be_applied(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "a")
    task = reader(cluster, "a")
    await steps(cluster, task, 1000)
    assert task.done()
    assert START_S <= cluster.now <= START_S + 1


async def test_peers_that_are_down_are_not_waited_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for name in "ab":
        cluster.crash(name)
    cluster.replicators["c"].catch_up()
    await asyncio.wait_for(cluster.replicators["c"].caught_up(), 5)
