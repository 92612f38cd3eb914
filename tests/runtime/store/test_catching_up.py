"""Who reads history at a node that was away gets what others recorded meanwhile, or waits a moment at most."""

from __future__ import annotations

import asyncio
from pathlib import Path

from distroml.runtime.store import sync
from distroml.runtime.store.catching_up import COMPARISON_S, CatchingUp
from tests.runtime.store.histories import JOB, Cluster, key, originate
from tests.runtime.store.test_sharing import has_all, steps

MANY = 1500
"""Streams: more than one message has room for."""


def reader(cluster: Cluster, name: str) -> asyncio.Task[None]:
    return asyncio.create_task(cluster.replicators[name].caught_up(JOB))


async def read_when_let(cluster: Cluster, name: str) -> None:
    """A reader waits first, and is let go in the end."""
    task = reader(cluster, name)
    await asyncio.sleep(0)
    assert not task.done()
    await steps(cluster, task, 1000)
    assert task.done()


async def test_a_reader_at_a_node_that_comes_back_waits_until_it_can_read_what_the_others_have(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path)
    cluster.crash("c")
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    cluster.known.clear()  # it has yet to apply the log, and learns nothing of the job by itself
    cluster.start("c")
    cluster.run(0.5)
    cluster.known.add(JOB)
    first, second = reader(cluster, "c"), reader(cluster, "c")
    for task in (first, second):
        await steps(cluster, task, 1000)
        assert task.done()
        assert has_all(cluster, "c", 0, 40)


async def test_what_is_here_and_not_written_yet_is_waited_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    cluster.crash("b")
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    cluster.start("b")
    task = reader(cluster, "b")
    store = cluster.stores["b"]
    while store.next_seq(key(0)) < 40:
        while cluster.wire.deliver():
            pass
        await asyncio.sleep(0.002)
    assert not has_all(cluster, "b", 0, 40)
    assert not task.done()
    store.flush()
    await asyncio.wait_for(task, 5)


async def test_what_needs_many_messages_to_tell_is_waited_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab")
    cluster.crash("b")
    for rank in range(MANY):
        originate(cluster, "a", key(rank), 1)
    cluster.run(0.5)
    cluster.start("b")
    await read_when_let(cluster, "b")
    assert list(cluster.stores["b"].heads(JOB).values()) == [1] * MANY


async def test_a_reader_at_a_node_that_was_cut_off_waits_too(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    await read_when_let(cluster, "c")
    for peer in "ab":
        cluster.wire.set_link("c", peer, up=False)
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    await asyncio.wait_for(cluster.replicators["c"].caught_up(JOB), 5)
    for peer in "ab":
        cluster.wire.set_link("c", peer, up=True)
    await read_when_let(cluster, "c")
    assert has_all(cluster, "c", 0, 40)


async def test_a_job_is_compared_once_for_each_link_and_told_of_only_where_it_differs(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path, "ab")
    originate(cluster, "a", key(0), 40)
    cluster.run(5)
    cluster.wire.letters.clear()
    task = reader(cluster, "b")
    await asyncio.sleep(0)
    assert len(cluster.wire.letters) == 1
    cluster.wire.deliver()
    assert len(cluster.wire.letters) == 1, "that there is nothing to tell"
    await steps(cluster, task, 1000)
    await asyncio.wait_for(cluster.replicators["b"].caught_up(JOB), 5)


async def test_a_peer_that_does_not_answer_holds_readers_up_once_and_for_a_moment(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path)
    cluster.wire.loss = 1.0
    began = cluster.now
    await read_when_let(cluster, "c")
    assert cluster.now - began >= COMPARISON_S
    await asyncio.wait_for(cluster.replicators["c"].caught_up(JOB), 5)


async def test_peers_that_are_down_are_not_waited_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    for name in "ab":
        cluster.crash(name)
    await asyncio.wait_for(cluster.replicators["c"].caught_up(JOB), 5)


async def test_an_answer_that_was_on_its_way_before_is_none(tmp_path: Path) -> None:
    """The reader asks between two of its messages."""
    cluster = Cluster(tmp_path, "ab")
    cluster.crash("b")
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    cluster.known.clear()
    cluster.start("b")
    cluster.run(0.5)
    cluster.known.add(JOB)
    cluster.wire.letters.clear()
    cluster.replicators["a"]._on_ask_heads("b", sync.AskHeads((JOB,)))
    assert len(cluster.wire.letters) == 2
    task = reader(cluster, "b")
    await asyncio.sleep(0)
    cluster.wire.letters = cluster.wire.letters[1:]
    await steps(cluster, task, 1000)
    assert task.done()
    assert has_all(cluster, "b", 0, 40)


async def test_what_is_lost_on_the_way_is_asked_for_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "ab", seed=1)
    cluster.crash("b")
    originate(cluster, "a", key(0), 40)
    cluster.run(1)
    cluster.start("b")
    cluster.wire.letters.clear()
    task = reader(cluster, "b")
    await asyncio.sleep(0)
    cluster.wire.letters.clear()  # the question
    await steps(cluster, task, 1000)
    assert task.done()
    assert has_all(cluster, "b", 0, 40)


async def test_what_takes_longer_is_waited_for_again_as_long_as_more_comes(tmp_path: Path) -> None:
    arrived, now_s = 0, 0.0
    asked: list[tuple[str, str, int]] = []

    def ask(*question: object) -> bool:
        asked.append(question)  # type: ignore[arg-type]
        return True

    catching_up = CatchingUp(
        peers=lambda: ["a"],
        ask=ask,
        lacks=lambda key, seq: seq - arrived,
        clock=lambda: now_s,
    )

    async def waits() -> bool:
        nonlocal now_s
        task = asyncio.create_task(catching_up.caught_up(JOB))
        await asyncio.sleep(0)
        if task.done():
            return False
        if len(asked) == 1:
            span = sync.Span(key(0), 0, 10)
            catching_up.take("a", sync.Heads((span,), (JOB,), asked[0][2]))
        now_s += COMPARISON_S
        await asyncio.wait_for(task, 5)
        return True

    assert await waits()
    arrived = 5
    assert await waits()
    assert await waits()
    assert not await waits(), "nothing more came"
