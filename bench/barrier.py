"""The control plane's barrier for 100 and 1,000 workers, beside bare asyncio in the same shape.

All workers arrive at the same instant, period after period: a Unix socket to the agent, peer links to the leader, and
back, all real (``leader_process``, ``agents_process``). Reports and the log's heartbeats go on meanwhile. A worker's
wait is from its own arrival to its release.

What is simulated costs what it would not in production: the ends of all workers and all their agents share one or two
processes, so a worker's wait holds the work of all others. ``bare_process`` pays the same and does nothing else, on
as many sockets; so the ratio is what the product adds, and the wait itself an upper bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from msgspec import Struct

from bench.control_plane import SLOTS, ControlPlane, control_plane
from bench.parts import Bench, Part, Say, run_parts
from bench.players import Player, playing
from bench.table import RUST_PEER, Aim, Row, compare, percentile

BARE = "bare asyncio, same sockets"
RUST_P99_MS = 48.0
"""Of a barrier of 100 workers, on its own machine."""
LEAD_S = 0.3
"""From the order until the first arrival: by then all processes have it."""
AGENTS_PER_PROCESS = 63
MEET_TIMEOUT_S = 120.0

Times = list[list[list[float]]]
"""Arrivals and releases in monotonic seconds, by worker."""


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    repetitions: int
    rounds: dict[int, int]
    periods_s: dict[int, float]
    """From one barrier to the next. Both by number of workers."""


PERIODS_S = {100: 0.1, 1000: 0.6}
FULL = Scale(repetitions=7, rounds={100: 60, 1000: 12}, periods_s=PERIODS_S)
QUICK = Scale(repetitions=3, rounds={100: 15, 1000: 5}, periods_s=PERIODS_S)


class Meeting(Struct, frozen=True):
    """One repetition: many barriers one after the other."""

    waits_ms: list[float]
    """Of each worker at each barrier."""
    whole_ms: list[float]
    """Of each barrier, from the first arrival to the last release."""
    leader_cpu_ms: float = 0.0
    """Processor time of the leader per barrier, for its frames alone."""
    agents_cpu_ms: float = 0.0
    """The same of all processes that play agents and workers, reports included."""
    repeats: int = 0


async def hundred(bench: Bench[Scale]) -> list[Row]:
    """100 workers on 13 agents."""
    rows = await _measured(bench, 100)
    p99 = rows[1].values.ours
    versus = compare("wait p99, 100 workers", "ms", "lower", ours=p99, peer_name=RUST_PEER,
                     peer=[RUST_P99_MS] * len(p99), aim=Aim("ours", "<", 10))  # fmt: skip
    return [*rows, versus]


async def thousand(bench: Bench[Scale]) -> list[Row]:
    """1,000 workers on 125 agents."""
    return await _measured(bench, 1000)


async def _measured(bench: Bench[Scale], workers: int) -> list[Row]:
    scale = bench.scale
    rounds, period_s = scale.rounds[workers], scale.periods_s[workers]
    own: list[Meeting] = []
    bare: list[Meeting] = []
    async with AsyncExitStack() as stack:
        bare_crowd = await _bare_crowd(stack, bench.directory, workers)
        plane = await stack.enter_async_context(control_plane(bench.directory, workers))
        await plane.all_agents("employ", MEET_TIMEOUT_S, state=plane.placed["state"])
        for number in range(scale.repetitions):
            bench.say(f"{workers} workers: repetition {number + 1} of {scale.repetitions}")
            own.append(await _ours(plane, f"repetition-{number}", rounds, period_s))
            bare.append(_meeting(await _meet(bare_crowd, "bare", rounds, period_s)))
    who = f"{workers:,} workers"
    best = min(percentile(one.waits_ms, 0.99) for one in own)
    note = (
        f"best repetition {best:.2f} ms; {sum(one.repeats for one in own)} repeats of agents in "
        f"{scale.repetitions * rounds} barriers"
    )

    def row(quantity: str, values: Callable[[Meeting], float], note: str = "") -> Row:
        return compare(f"{quantity}, {who}", "ms", "lower", ours=[values(one) for one in own],
                       peer_name=BARE, peer=[values(one) for one in bare], note=note)  # fmt: skip

    return [
        row("wait p50", lambda one: percentile(one.waits_ms, 0.5)),
        row("wait p99", lambda one: percentile(one.waits_ms, 0.99), note),
        row("whole barrier p50", lambda one: percentile(one.whole_ms, 0.5)),
        row("whole barrier p99", lambda one: percentile(one.whole_ms, 0.99)),
        *(
            compare(f"processor of {whose} per barrier, {who}", "ms", "lower", ours=values,
                    peer_name="", peer=[])
            for whose, values in (
                ("the leader", [one.leader_cpu_ms for one in own]),
                ("agents' and workers' ends", [one.agents_cpu_ms for one in own]),
            )
        ),
    ]  # fmt: skip


async def _ours(plane: ControlPlane, name: str, rounds: int, period_s: float) -> Meeting:
    before = sum(await plane.all_agents("repeats"))
    cpu_began_s = await _agents_cpu_s(plane)
    await plane.leader.ask("forget")
    times = await _meet(plane.crowd, name, rounds, period_s)
    leader = await plane.leader.ask("read")
    return _meeting(
        times,
        leader_cpu_ms=1000 * sum(leader["barrier_cpu_s"]) / rounds,
        agents_cpu_ms=1000 * (await _agents_cpu_s(plane) - cpu_began_s) / rounds,
        repeats=sum(await plane.all_agents("repeats")) - before,
    )


async def _agents_cpu_s(plane: ControlPlane) -> float:
    return float(sum(count["cpu_s"] for count in await plane.all_agents("count")))


async def _bare_crowd(stack: AsyncExitStack, directory: Path, workers: int) -> list[Player]:
    """The same number of workers, agents and processes without the product."""
    counts = [SLOTS] * (workers // SLOTS) + [workers % SLOTS] * (workers % SLOTS > 0)
    log_path = directory / "bare.log"
    server = await stack.enter_async_context(playing("bare_process", [], log_path))
    port = await server.ask("serve", agents=len(counts))
    crowd = []
    for begin in range(0, len(counts), AGENTS_PER_PROCESS):
        player = await stack.enter_async_context(playing("bare_process", [], log_path))
        part = counts[begin : begin + AGENTS_PER_PROCESS]
        await player.ask("employ", port=port, workers=part)
        crowd.append(player)
    return crowd


async def _meet(crowd: list[Player], name: str, rounds: int, period_s: float) -> Times:
    first_s = time.monotonic() + LEAD_S
    asked = (
        player.ask(
            "meet", MEET_TIMEOUT_S, name=name, rounds=rounds, first_s=first_s, period_s=period_s
        )
        for player in crowd
    )
    return [worker for part in await asyncio.gather(*asked) for worker in part]


def _meeting(
    times: Times, *, leader_cpu_ms: float = 0.0, agents_cpu_ms: float = 0.0, repeats: int = 0
) -> Meeting:
    return Meeting(
        waits_ms=[1000 * (r - a) for worker in times for a, r in zip(*worker, strict=True)],
        whole_ms=[
            1000 * (max(worker[1][at] for worker in times) - min(worker[0][at] for worker in times))
            for at in range(len(times[0][0]))
        ],
        leader_cpu_ms=leader_cpu_ms,
        agents_cpu_ms=agents_cpu_ms,
        repeats=repeats,
    )


PARTS: dict[str, Part[Scale]] = {
    "hundred": hundred,
    "thousand": thousand,
}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    scale = QUICK if quick else FULL
    return await run_parts(PARTS, only, scale, directory, say)
