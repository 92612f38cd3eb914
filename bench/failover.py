"""Failover: SIGKILL of the leader's process under writes, until the next write is acknowledged; nothing may be lost.

Three real nodes serve a few clients that write all the time. A kill is followed at once by one more write through the
product's client, which is given all nodes and moves on from those that do not answer, as a user's would. The time
from the kill to its acknowledgement is what counts. The killed node is started again and caught up before the next
kill. At the end every node must have every write that was ever acknowledged. With ``--load`` all cores are busy with
training all the while. etcd's members, with etcd's own defaults, are killed in the same way beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from bench import burn, etcd
from bench.parts import Bench, Part, Say, run_parts
from bench.processes import within
from bench.table import Aim, Row, Values, compare, percentile
from distroml.client import AsyncClient
from distroml.errors import Unavailable
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

OPTIONS = frozenset({"load"})
WRITERS = 4
WRITE_PAUSE_S = 0.2
"""Between two writes of one writer: all that is written stays in the queue, which is bounded."""
KILL_SPREAD_S = 0.3
"""Kills come at random within this, so that they do not keep step with heartbeats."""
RETURN_TIMEOUT_S = 60.0
ETCD_PAUSE_S = 0.02
"""Between two attempts of the write to etcd, of which each goes to another member."""
NEXT_WRITE_TIMEOUT_S = 60.0
CATCH_UP_TIMEOUT_S = 60.0
JOBS_PER_PAGE = 10_000
CATCH_UP_POLL_S = 0.2
LOST = "acknowledged writes that a node lacks afterwards"
_SPEC = JobSpec(name="bench-failover")


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    kills: int
    etcd_kills: int
    load: bool


FULL = Scale(kills=50, etcd_kills=20, load=False)
QUICK = Scale(kills=2, etcd_kills=1, load=False)


async def kills(bench: Bench[Scale]) -> list[Row]:
    """Times from kill to the next acknowledged write, and how many acknowledged writes are missing."""
    with ExitStack() as stack:
        if bench.scale.load:
            stack.enter_context(burn.all_cores(bench.directory))
        own, writes = await _ours(bench)
        peer = await _etcd(bench) if etcd.installed() else []
    if not peer:
        bench.say(etcd.HOW_TO_GET)
    busy = "all cores were busy with training" if bench.scale.load else "no other load of ours"
    note = (
        f"{len(writes.acknowledged)} writes were acknowledged meanwhile and {writes.unanswered} got no answer in "
        f"their time; {busy}"
    )
    return [*rows(own, peer, note), _missing(writes)]


def rows(own: list[float], peer: list[float], note: str) -> list[Row]:
    """p50, p99 and the greatest of the times from kill to the next acknowledged write, in seconds."""
    wanted = (
        ("p50", 0.5, Aim("ours", "<=", 0.5)),
        ("p99", 0.99, Aim("ours", "<=", 1.0)),
        ("max", 1.0, None),
    )
    found = [
        compare(
            f"kill of the leader to the next write: {name}",
            "s",
            "lower",
            ours=[percentile(own, share)],
            peer_name="etcd, its defaults" if peer else "",
            peer=[percentile(peer, share)] if peer else [],
            aim=aim,
        )
        for name, share, aim in wanted
    ]
    values = Values(ours=own, peer=peer)
    found[0] = replace(found[0], note=note)
    return [replace(row, runs=len(own), values=values) for row in found]


class Writes(Struct):
    """What the writers have done."""

    acknowledged: set[str] = msgspec.field(default_factory=set)
    """Ids of jobs."""
    unanswered: int = 0
    missing: int = 0
    """Acknowledged writes that some node does not have at the end, once for each node."""

    async def write(self, client: AsyncClient) -> bool:
        """One write: whether it was acknowledged."""
        try:
            job = await client.submit(_SPEC)
        except Unavailable:
            self.unanswered += 1
            return False
        self.acknowledged.add(job["job_id"])
        return True


async def _ours(bench: Bench[Scale]) -> tuple[list[float], Writes]:
    times: list[float] = []
    writes = Writes()
    async with LocalCluster(bench.directory / "ours", nodes=3, slots=0) as cluster:
        async with _writers(cluster, writes), cluster.client() as client:
            for number in range(bench.scale.kills):
                bench.say(f"kill {number + 1} of {bench.scale.kills}")
                name = await cluster.leader(RETURN_TIMEOUT_S)
                await asyncio.sleep(random.uniform(0, KILL_SPREAD_S))
                times.append(await _kill(cluster, name, client, writes))
                cluster.nodes[name].kill()  # reaps it
                cluster.nodes[name].start()
                await cluster.wait_ready(name, timeout_s=RETURN_TIMEOUT_S)
        for name in cluster.nodes:
            writes.missing += len(await _missing_at(cluster, name, writes.acknowledged))
    return times, writes


@asynccontextmanager
async def _writers(cluster: LocalCluster, writes: Writes) -> AsyncIterator[None]:
    """``WRITERS`` clients that write all the time, each beginning at another node."""

    async def write(first: int) -> None:
        names = list(cluster.nodes)
        async with cluster.client(*names[first:], *names[:first]) as client:
            while True:
                await writes.write(client)
                await asyncio.sleep(WRITE_PAUSE_S)

    tasks = [asyncio.create_task(write(n % len(cluster.nodes))) for n in range(WRITERS)]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _kill(cluster: LocalCluster, name: str, client: AsyncClient, writes: Writes) -> float:
    """Seconds from SIGKILL to the acknowledgement of a write that was begun right after it.

    Raises:
        Broken: none was acknowledged within ``NEXT_WRITE_TIMEOUT_S``.
    """
    killed_at = time.monotonic()
    cluster.nodes[name].signal(signal.SIGKILL)
    async with within(NEXT_WRITE_TIMEOUT_S, f"a write after the kill of {name}"):
        while not await writes.write(client):
            pass  # the client has waited already
    return time.monotonic() - killed_at


async def _missing_at(cluster: LocalCluster, name: str, wanted: set[str]) -> set[str]:
    """Which of the acknowledged jobs this node does not have, after it had time to catch up."""
    missing = wanted
    deadline = time.monotonic() + CATCH_UP_TIMEOUT_S
    async with cluster.client(name) as client:
        while missing and time.monotonic() < deadline:
            missing = wanted - await _jobs(client)
            await asyncio.sleep(CATCH_UP_POLL_S if missing else 0)
    return missing


async def _jobs(client: AsyncClient) -> set[str]:
    found: set[str] = set()
    cursor: str | None = None
    while True:
        page = await client.jobs(limit=JOBS_PER_PAGE, cursor=cursor)
        found |= {job["job_id"] for job in page["jobs"]}
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def _missing(writes: Writes) -> Row:
    return compare(
        LOST,
        "1",
        "lower",
        ours=[float(writes.missing)],
        peer_name="",
        peer=[],
        aim=Aim("ours", "<=", 0),
    )


async def _etcd(bench: Bench[Scale]) -> list[float]:
    """The same with etcd; its writes go to one member after another until one acknowledges."""
    times: list[float] = []
    async with etcd.EtcdCluster(bench.directory / "etcd") as cluster:
        for number in range(bench.scale.etcd_kills):
            bench.say(f"etcd: kill {number + 1} of {bench.scale.etcd_kills}")
            name = await cluster.leader()
            await asyncio.sleep(random.uniform(0, KILL_SPREAD_S))
            killed_at = time.monotonic()
            cluster.kill(name)
            async with within(NEXT_WRITE_TIMEOUT_S, f"a write to etcd after the kill of {name}"):
                await _put_somewhere(cluster, [one for one in etcd.MEMBERS if one != name])
            times.append(time.monotonic() - killed_at)
            cluster.reap(name)
            cluster.start(name)
    return times


async def _put_somewhere(cluster: etcd.EtcdCluster, names: list[str]) -> None:
    for name in itertools.cycle(names):
        if await asyncio.to_thread(cluster.put, name, "failover", b"x"):
            return
        await asyncio.sleep(ETCD_PAUSE_S)


PARTS: dict[str, Part[Scale]] = {"kills": kills}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = (), *, load: bool = False
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    scale = replace(QUICK if quick else FULL, load=load)
    found, failures = await run_parts(PARTS, only, scale, directory, say)
    failures += [
        f"{row.quantity}: {row.ours:g}" for row in found if row.quantity == LOST and row.ours
    ]
    return found, failures
