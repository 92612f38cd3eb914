"""Consensus: writes per second and their latency on three nodes with fsync, beside three members of etcd.

Both parts run three processes on loopback on the same disk, and take turns with etcd round by round:

- ``http``: POST /api/jobs beside etcd's PUT over its HTTP/JSON gateway, by the same driver. Ours includes HTTP, JSON,
  the checks of a job, consensus, fsync, and the state machine with the whole queue; etcd's includes HTTP, JSON, its
  own gRPC hop, consensus, fsync and its key-value store. One client talks to the leader, more are spread over all
  nodes, as clients of either are.
- ``raft``: proposals made inside the leader's process: links, log, fsync, proposer and state machine, without HTTP
  and jobs. etcd has no such entry, so the peer is its gateway again; that figure carries HTTP and ours does not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from bench import etcd
from bench.http_load import Load, closed_loop, post
from bench.parts import Bench, Part, Say, run_parts
from bench.raft_trio import RaftTrio
from bench.table import Aim, Row, compare
from bench.writes import PEER, appends
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

CLIENTS = (1, 16, 256)
WARM_UP_S = 0.5
DISK_APPENDS = 200
_SUBMIT = post("/api/jobs", msgspec.json.encode(JobSpec(name="bench-write")))

Loads = dict[int, Load]
"""By number of clients."""


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each load."""


FULL = Scale(rounds=5, seconds=3.0)
QUICK = Scale(rounds=1, seconds=0.5)


async def http(bench: Bench[Scale]) -> list[Row]:
    """Acknowledged writes over HTTP."""
    return await _compare(bench, "submits over HTTP", _our_http, bench.scale)


async def raft(bench: Bench[Scale]) -> list[Row]:
    """Commits of proposals that are made in the leader's process."""
    return await _compare(bench, "commits in process", partial(_our_raft, bench.say), bench.scale)


async def _compare(
    bench: Bench[Scale], what: str, ours: Callable[[Path, float], Awaitable[Loads]], scale: Scale
) -> list[Row]:
    has_peer = etcd.installed()
    if not has_peer:
        bench.say(etcd.HOW_TO_GET)
    own: list[Loads] = []
    peer: list[Loads] = []
    disk: list[list[float]] = []
    for number in range(scale.rounds):
        bench.say(f"{what}: round {number + 1} of {scale.rounds}")
        place = bench.directory / f"round-{number}"
        sides = [partial(_add, own, ours, place / "ours")]
        if has_peer:
            sides.append(partial(_add, peer, _etcd, place / "etcd"))
        for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
            await side(scale.seconds)
        disk.append(appends(place / "appends", DISK_APPENDS))
    return rows(what, own, peer, disk)


async def _add(
    to: list[Loads], side: Callable[[Path, float], Awaitable[Loads]], place: Path, seconds: float
) -> None:
    to.append(await side(place, seconds))


async def _our_http(place: Path, seconds: float) -> Loads:
    async with LocalCluster(place, nodes=3, slots=0) as cluster:
        leader = await cluster.leader()
        ports = {name: int(node.url.rpartition(":")[2]) for name, node in cluster.nodes.items()}
        first = [("127.0.0.1", ports.pop(leader))]
        every = first + [("127.0.0.1", port) for port in ports.values()]
        await closed_loop(every, lambda: _SUBMIT, len(every), WARM_UP_S)
        return {
            clients: await closed_loop(
                first if clients == 1 else every, lambda: _SUBMIT, clients, seconds
            )
            for clients in CLIENTS
        }


async def _our_raft(say: Say, place: Path, seconds: float) -> Loads:
    async with RaftTrio(place) as trio:
        await trio.load(1, WARM_UP_S)
        loads = {clients: await trio.load(clients, seconds) for clients in CLIENTS}
        if trio.leaders_lost:
            say(f"leadership was lost {trio.leaders_lost} times; those loads were repeated")
        return loads


async def _etcd(place: Path, seconds: float) -> Loads:
    async with etcd.EtcdCluster(place) as cluster:
        first = [("127.0.0.1", cluster.ports[await cluster.leader()])]
        every = cluster.endpoints()
        request = etcd.puts()
        await closed_loop(every, request, len(every), WARM_UP_S)
        return {
            clients: await closed_loop(first if clients == 1 else every, request, clients, seconds)
            for clients in CLIENTS
        }


def rows(what: str, own: list[Loads], peer: list[Loads], disk: list[list[float]]) -> list[Row]:
    """Rate, p50 and p99 for each number of clients.

    Args:
        own, peer: one value per round; without an etcd there is no ``peer``, and the disk takes its place for one
            client.
        disk: seconds of each append of each round.
    """
    found = []
    disk_ms = [Load(seconds, sum(seconds)).ms(0.5) for seconds in disk]
    name = "etcd, HTTP gateway" if peer else ""
    note = f"one {PEER} takes {sorted(disk_ms)[len(disk_ms) // 2]:.2f} ms here"
    if not peer:
        note = f"{etcd.HOW_TO_GET}; {note}"
    for clients in CLIENTS:
        who = "1 client" if clients == 1 else f"{clients} clients"
        at_one, at_most = clients == min(CLIENTS), clients == max(CLIENTS)
        found.append(
            compare(
                f"{what}, {who}",
                "1/s",
                "higher",
                ours=[loads[clients].rate for loads in own],
                peer_name=name,
                peer=[loads[clients].rate for loads in peer],
                aim=Aim("ratio", ">=", 1) if peer and at_most else None,
                note=note if at_one else "",
            )
        )
        for share in (0.5, 0.99):
            beside = [loads[clients].ms(share) for loads in peer]
            alone = not peer and at_one and share == 0.5
            found.append(
                compare(
                    f"{what}, {who}: p{share * 100:g}",
                    "ms",
                    "lower",
                    ours=[loads[clients].ms(share) for loads in own],
                    peer_name=PEER if alone else name,
                    peer=disk_ms if alone else beside,
                    aim=Aim("ratio", ">=", 1) if peer and at_one and share == 0.5 else None,
                )
            )
    return found


PARTS: dict[str, Part[Scale]] = {"http": http, "raft": raft}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    return await run_parts(PARTS, only, QUICK if quick else FULL, directory, say)
