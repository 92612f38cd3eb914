"""Acknowledged writes: POST /api/jobs on three nodes beside what the disk allows, an append and fdatasync."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.table import Aim, Row, compare, median
from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

RECORD_BYTES = 4096
CLIENTS = 16
PEER = "4 KiB append + fdatasync"
_SPEC = JobSpec(name="bench-write")


async def measure(rounds: int, writes: int, directory: Path) -> list[Row]:
    """Rows for one client at the leader, one at a follower, and ``CLIENTS`` at once.

    Args:
        writes: of each kind and round; a round's latency is the median over them.
    """
    disk: list[list[float]] = []
    http: list[list[float]] = []
    lone: list[list[float]] = []
    forwarded: list[list[float]] = []
    crowd: list[tuple[list[float], float]] = []
    async with LocalCluster(directory / "writes", nodes=3, slots=0) as cluster:
        leader = await cluster.leader()
        follower = next(name for name in cluster.nodes if name != leader)
        async with cluster.client(leader) as near, cluster.client(follower) as far:
            for _ in range(1 + rounds):  # the first one warms connections and file up
                disk.append(_appends(directory / "appends", writes))
                http.append(await _timed(writes, near.health))
                lone.append(await _timed(writes, lambda: near.submit(_SPEC)))
                forwarded.append(await _timed(writes, lambda: far.submit(_SPEC)))
                crowd.append(await _crowd(near, writes))
    limit_ms = _ms(disk[1:])
    floor = f"one GET /health of the same node and client takes {median(_ms(http[1:])):.2f} ms"
    rate = [writes / sum(round_) for round_ in disk[1:]]
    return [
        _latency("submit p50, 1 client at the leader", lone[1:], limit_ms, Aim("ratio", ">=", 0.05), floor),
        _latency("submit p50, 1 client at a follower", forwarded[1:], limit_ms, Aim("ratio", ">=", 0.04)),
        _latency(f"submit p50, {CLIENTS} clients", [times for times, _ in crowd[1:]], limit_ms),
        compare(
            f"acknowledged submits, {CLIENTS} clients",
            "1/s",
            "higher",
            ours=[len(times) / wall_s for times, wall_s in crowd[1:]],
            peer_name=f"{PEER}, one after another",
            peer=rate,
            aim=Aim("ratio", ">=", 0.1),
        ),
    ]  # fmt: skip


def _latency(
    quantity: str,
    ours: list[list[float]],
    limit_ms: list[float],
    aim: Aim | None = None,
    note: str = "",
) -> Row:
    return compare(
        quantity,
        "ms",
        "lower",
        ours=_ms(ours),
        peer_name=PEER,
        peer=limit_ms,
        aim=aim,
        note=note,
    )


def _ms(rounds: list[list[float]]) -> list[float]:
    return [1000 * median(times) for times in rounds]


def _appends(path: Path, count: int) -> list[float]:
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


async def _crowd(client: AsyncClient, writes: int) -> tuple[list[float], float]:
    """Latencies of ``CLIENTS`` loops at once, and the wall time of them all."""
    each = max(2, writes // CLIENTS)
    began = time.perf_counter()
    loops = [_timed(each, lambda: client.submit(_SPEC)) for _ in range(CLIENTS)]
    times = [seconds for part in await asyncio.gather(*loops) for seconds in part]
    return times, time.perf_counter() - began
