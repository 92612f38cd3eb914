"""What the kernel is told for a set of faults; and that it does it, where there are namespaces."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from chaos import network
from chaos.network import Impairment, Network, Shape, qdisc_of, ruleset, shape_of
from chaos.processes import own_mark

ADDRESSES = {"b": "10.0.0.2", "c": "10.0.0.3"}
HARNESS = "10.0.0.254"
PORT = 7000
SERVER = """
import asyncio, sys

async def greet(reader, writer):
    writer.write(b"hello")
    while line := await reader.read(65536):
        writer.write(line)

async def main(host, port):
    await (await asyncio.start_server(greet, host, port)).serve_forever()

asyncio.run(main(*sys.argv[1:]))
"""
CLIENT = """
import socket, sys
with socket.create_connection(sys.argv[1:], timeout=0.7) as server:
    sys.exit(server.recv(5) != b"hello")
"""


def test_without_faults_there_is_no_table() -> None:
    program = ruleset((), ADDRESSES, HARNESS, netem=False)

    assert program.splitlines() == ["table inet chaos", "delete table inet chaos"]


def test_a_partition_drops_both_ways_and_leaves_clients_alone() -> None:
    cut = Impairment(node="a", inbound=True, outbound=True)
    program = ruleset([cut], ADDRESSES, HARNESS, netem=False)

    assert "ip saddr { 10.0.0.2, 10.0.0.3 } drop" in program
    assert "ip daddr { 10.0.0.2, 10.0.0.3 } drop" in program
    assert HARNESS not in program


def test_one_link_and_one_way_with_clients() -> None:
    cut = Impairment(node="a", peers=("c",), outbound=True, harness=True)
    program = ruleset([cut], ADDRESSES, HARNESS, netem=False)

    assert "ip daddr { 10.0.0.254, 10.0.0.3 } drop" in program
    assert "saddr" not in program


def test_faults_that_overlap_add_up() -> None:
    both = [
        Impairment(node="a", loss=0.5, delay_ms=10, jitter_ms=2, rate_kbit=500),
        Impairment(node="a", loss=0.5, delay_ms=20, rate_kbit=100),
    ]

    assert shape_of(both) == Shape(0.75, 30, 2, 100)
    assert shape_of([]) == Shape()


def test_loss_is_work_of_netem_where_there_is_one() -> None:
    lossy = Impairment(node="a", loss=0.05)

    assert "numgen random mod 10000 < 500 drop" in ruleset([lossy], ADDRESSES, HARNESS, netem=False)
    assert "numgen" not in ruleset([lossy], ADDRESSES, HARNESS, netem=True)
    assert qdisc_of(shape_of([lossy]), netem=True) == ["netem", "loss", "5%"]
    assert qdisc_of(shape_of([lossy]), netem=False) == []
    assert qdisc_of(Shape(rate_kbit=64), netem=False)[:3] == ["tbf", "rate", "64kbit"]


@pytest_asyncio.fixture
async def joined() -> AsyncIterator[Network]:
    """Two nodes in namespaces, each with a server that greets."""
    if missing := network.missing_for_namespaces():
        pytest.skip(missing)
    made = Network(own_mark(), ["a", "b"])
    servers = []
    try:
        try:
            await made.set_up()
        except network.NetworkUnusable as error:
            if "not permitted" not in str(error):
                raise
            pytest.skip(f"no network namespaces here: {error}")
        for name in ("a", "b"):
            servers.append(
                await asyncio.create_subprocess_exec(
                    *made.inside(name),
                    sys.executable,
                    "-c",
                    SERVER,
                    made.addresses[name],
                    str(PORT),
                )
            )
        yield made
    finally:
        for server in servers:
            server.kill()
            await server.wait()
        await made.tear_down()


async def _reaches(made: Network, source: str, target: str) -> bool:
    """Whether a node (or the harness) gets the greeting of another one."""
    inside = [] if source == "harness" else made.inside(source)
    process = await asyncio.create_subprocess_exec(
        *inside,
        sys.executable,
        "-c",
        CLIENT,
        made.addresses[target],
        str(PORT),
        stderr=asyncio.subprocess.DEVNULL,
    )
    return await process.wait() == 0


async def _until_reached(made: Network, source: str, target: str) -> None:
    async with asyncio.timeout(10):
        while not await _reaches(made, source, target):  # noqa: ASYNC110 - a server tells nobody
            await asyncio.sleep(0.05)


async def test_a_partition_cuts_nodes_off_and_ends(joined: Network) -> None:
    await _until_reached(joined, "a", "b")
    await _until_reached(joined, "harness", "a")

    await joined.impair(0, [Impairment(node="a", inbound=True, outbound=True)])

    assert not await _reaches(joined, "a", "b")
    assert not await _reaches(joined, "b", "a")
    assert await _reaches(joined, "harness", "a")

    await joined.repair(0)

    assert await _reaches(joined, "a", "b")


async def test_faults_end_in_any_order(joined: Network) -> None:
    await _until_reached(joined, "harness", "a")
    await joined.impair(0, [Impairment(node="a", inbound=True, harness=True)])
    await joined.impair(1, [Impairment(node="a", rate_kbit=1000)])

    await joined.repair(1)

    assert not await _reaches(joined, "harness", "a")

    await joined.repair(0)

    assert await _reaches(joined, "harness", "a")


async def test_a_fault_that_was_broken_off_half_way_is_taken_back(
    joined: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules may be in the kernel though nobody was told so."""
    await _until_reached(joined, "harness", "a")
    run = network._run

    async def run_and_break_off(*command: str, **options: Any) -> str:
        await run(*command, **options)
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(network, "_run", run_and_break_off)
        with pytest.raises(asyncio.CancelledError):
            await joined.impair(0, [Impairment(node="a", inbound=True, harness=True)])
    assert not await _reaches(joined, "harness", "a")

    await joined.repair(0)

    assert await _reaches(joined, "harness", "a")


async def test_a_repair_that_was_broken_off_is_done_by_the_next_one(
    joined: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a flapping link whose fault ends while it mends the link."""
    await _until_reached(joined, "harness", "a")
    await joined.impair(0, [Impairment(node="a", inbound=True, harness=True)])

    async def break_off(*command: str, **options: Any) -> str:
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(network, "_run", break_off)
        with pytest.raises(asyncio.CancelledError):
            await joined.repair(0)
    assert not await _reaches(joined, "harness", "a")

    await joined.repair(0)

    assert await _reaches(joined, "harness", "a")


async def test_a_reset_ends_connections(joined: Network) -> None:
    await _until_reached(joined, "harness", "a")
    reader, writer = await asyncio.open_connection(joined.addresses["a"], PORT)
    assert await reader.read(5) == b"hello"

    await joined.impair(0, [Impairment(node="a", reset=True, harness=True)])
    writer.write(b"are you there?\n")

    async with asyncio.timeout(5):
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
    writer.close()


async def test_what_is_delayed_comes_late_and_whole(joined: Network) -> None:
    if not joined.netem and (missing := await network.probe("0-0")):
        pytest.skip(missing)
    await _until_reached(joined, "harness", "a")
    reader, writer = await asyncio.open_connection(joined.addresses["a"], PORT)
    assert await reader.read(5) == b"hello"
    line = b"x" * 100_000 + b"\n"

    await joined.impair(0, [Impairment(node="a", delay_ms=150, jitter_ms=20)])
    began_s = time.monotonic()
    writer.write(line)
    async with asyncio.timeout(20):
        assert await reader.readexactly(len(line)) == line
    assert time.monotonic() - began_s >= 0.13

    await joined.repair(0)

    async with asyncio.timeout(20):
        writer.write(line)
        assert await reader.readexactly(len(line)) == line
    writer.close()


async def test_nothing_is_left_of_a_network(joined: Network) -> None:
    names = await network.remove_namespaces(joined.mark)

    assert len(names) == 3
    assert joined.mark not in network.marks_of_namespaces()
