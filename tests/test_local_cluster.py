"""Clusters on one machine for tests and demos: they start, tell what is wrong, and leave nothing behind."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from distroml.errors import Unavailable
from distroml.local_cluster import LocalCluster, free_ports


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_more_ports_than_there_are_is_said() -> None:
    with pytest.raises(RuntimeError, match="free ports"):
        free_ports(100_000)


def test_each_node_has_a_store_of_its_own_and_copies_are_found(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, nodes=3)
    places = {node.store_dir for node in cluster.nodes.values()}
    assert len(places) == 3
    assert cluster.copies("x/y") == []
    for name in "ca":
        (cluster.nodes[name].store_dir / "x").mkdir(parents=True)
    assert cluster.copies("x") == [cluster.nodes[name].store_dir / "x" for name in "ac"]


async def test_a_node_lives_dies_and_comes_back(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path, nodes=1, slots=0) as cluster:
        node = cluster.nodes["a"]
        first = node.pid
        assert node.running
        assert await cluster.leader() == "a"
        with pytest.raises(RuntimeError, match="runs already"):
            node.start()
        node.kill()
        assert (node.running, node.pid, node.exit_code) == (False, None, -9)
        node.start()
        await cluster.wait_ready("a")
        assert node.pid not in (None, first)
        assert "incarnation 1" in node.log_tail(1000), "the log goes on where it was"
    assert node.exit_code == 0


async def test_a_node_that_cannot_start_is_told_at_once_with_its_log(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, nodes=1, arguments=["--worker-threads", "0"])
    with pytest.raises(RuntimeError, match=r"(?s)not running \(exit 2\).*worker_threads"):
        async with cluster:
            raise AssertionError("it started")
    assert not cluster.nodes["a"].running


async def test_nothing_runs_on_when_the_caller_is_cancelled(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, nodes=1, slots=0)
    inside = asyncio.Event()

    async def use() -> None:
        async with cluster:
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    async with asyncio.timeout(60):
        await inside.wait()
    task.cancel()
    await asyncio.sleep(0)  # it is leaving the context now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not cluster.nodes["a"].running


async def test_a_wait_in_vain_names_what_was_awaited_and_the_last_answer(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, nodes=1)

    async def ask() -> int:
        return 7

    async def refuse() -> int:
        raise Unavailable("no leader")

    with pytest.raises(TimeoutError, match=r"waited 0\.05 s for eight; last answer: 7\n--- a"):
        await cluster.until(ask, lambda answer: answer == 8, "eight", timeout_s=0.05)
    with pytest.raises(TimeoutError, match="no leader"):
        await cluster.until(refuse, lambda _: True, "an answer", timeout_s=0.05)
