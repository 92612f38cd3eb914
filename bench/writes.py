"""Acknowledged writes: POST /api/jobs on three nodes beside what the disk allows, an append and fdatasync."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec import Struct

from bench.table import Aim, Row, compare, median
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

RECORD_BYTES = 4096
CLIENTS = 16
WARM_UP = 10
PEER = "4 KiB append + fdatasync"
_SPEC = JobSpec(name="bench-write")


class Round(Struct, frozen=True):
    """Seconds of each call of one round."""

    appends: list[float]
    health: list[float]
    leader: list[float]
    follower: list[float]
    crowd: list[float]
    crowd_wall_s: float


async def measure(rounds: int, writes: int, directory: Path) -> list[Row]:
    """Rows for one client at the leader, one at a follower, and ``CLIENTS`` at once.

    Args:
        rounds: each on a cluster of its own, since all jobs stay queued and a queue has its cost.
        writes: of each kind and round; a round's latency is the median over them.
    """
    done = [await _round(directory / f"round-{number}", writes) for number in range(rounds)]
    limit_ms = _ms([one.appends for one in done])
    note = (
        f"one GET /health of the same node and client takes {median(_ms([r.health for r in done])):.2f} ms; "
        f"in each round the queue grows to {3 * writes} jobs"
    )
    return [
        _latency("1 client at the leader", [one.leader for one in done], limit_ms, 0.05, note),
        _latency("1 client at a follower", [one.follower for one in done], limit_ms, 0.04),
        _latency(f"{CLIENTS} clients", [one.crowd for one in done], limit_ms),
        compare(
            f"acknowledged submits, {CLIENTS} clients",
            "1/s",
            "higher",
            ours=[len(one.crowd) / one.crowd_wall_s for one in done],
            peer_name=f"{PEER}, one after another",
            peer=[len(one.appends) / sum(one.appends) for one in done],
            aim=Aim("ratio", ">=", 0.1),
        ),
    ]


async def _round(directory: Path, writes: int) -> Round:
    async with LocalCluster(directory, nodes=3, slots=0) as cluster:
        leader = await cluster.leader()
        follower = next(name for name in cluster.nodes if name != leader)
        async with cluster.client(leader) as near, cluster.client(follower) as far:

            async def submit_near() -> object:
                return await near.submit(_SPEC)

            async def submit_far() -> object:
                return await far.submit(_SPEC)

            for warm in (submit_near, submit_far):
                await _timed(WARM_UP, warm)
            appends(directory / "appends", WARM_UP)
            appended = appends(directory / "appends", writes)
            health = await _timed(writes, near.health)
            alone = await _timed(writes, submit_near)
            forwarded = await _timed(writes, submit_far)
            began = time.perf_counter()
            each = max(2, writes // CLIENTS)
            loops = await asyncio.gather(*(_timed(each, submit_near) for _ in range(CLIENTS)))
            wall_s = time.perf_counter() - began
    crowd = [seconds for loop in loops for seconds in loop]
    return Round(appended, health, alone, forwarded, crowd, wall_s)


def _latency(
    who: str,
    ours: list[list[float]],
    limit_ms: list[float],
    least: float | None = None,
    note: str = "",
) -> Row:
    return compare(
        f"submit p50, {who}",
        "ms",
        "lower",
        ours=_ms(ours),
        peer_name=PEER,
        peer=limit_ms,
        aim=None if least is None else Aim("ratio", ">=", least),
        note=note,
    )


def _ms(rounds: list[list[float]]) -> list[float]:
    return [1000 * median(times) for times in rounds]


def appends(path: Path, count: int) -> list[float]:
    """Seconds of each of ``count`` appends that reach the disk."""
    record, times = os.urandom(RECORD_BYTES), []
    with path.open("ab", buffering=0) as file:
        for _ in range(count):
            began = time.perf_counter()
            file.write(record)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return times


async def _timed(count: int, call: Callable[[], Awaitable[object]]) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return times
