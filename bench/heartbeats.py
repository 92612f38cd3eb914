"""Heartbeats of 1,000 simulated workers on 125 agents to one leader: what one costs, and how many it holds.

The leader is a whole node in a process of its own (``leader_process``), the agents are learners with real peer links
on loopback in two others (``agents_process``). Handling is everything that the node does with a report: decoding,
observations, what goes on to the other learners, rendezvous keys, waking the coordinator. Not in it are the kernel's
work, cutting frames, and the coordinator's turn, which runs beside it and has a row of its own. The cluster has no key
and no TLS. Agents acknowledge the log and keep none of it; they send no metrics.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench.control_plane import SLOTS, ControlPlane, control_plane
from bench.parts import Bench, Part, Say, run_parts
from bench.processes import Broken
from bench.table import RUST_PEER, Aim, Row, compare, percentile

RUST_RATE = 11_500.0
"""Worker-heartbeats per second, on its own machine."""
INTERVAL_S = 0.2
HELD = 0.95
"""Part of the reports sent that must have been handled when the window ends; the two ends are not quite at once."""
MAX_DELAY_S = 0.25
"""A rate at which half of the reports wait longer than this builds up a backlog."""
TRIES = 3
DECODES = 2000
FULL_SPEED = 0.95
"""Part of a rate that the agents must reach for it to be judged."""


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    workers: int
    windows: int
    window_s: float
    searches: int
    rates: tuple[int, ...]
    """Worker-heartbeats per second, ascending."""


FULL = Scale(
    workers=1000,
    windows=5,
    window_s=6.0,
    searches=3,
    rates=(5_000, 11_500, 20_000, 30_000, 40_000, 50_000, 60_000, 80_000, 100_000),
)
QUICK = Scale(workers=200, windows=2, window_s=2.0, searches=1, rates=(2_000, 11_500, 30_000))


class Window(Struct, frozen=True, kw_only=True):
    """One stretch of reports at one rate."""

    sent_per_s: float
    """Reports; the agents' count."""
    handled: float
    """Part of those sent."""
    dropped: int
    leader: dict[str, Any]
    """As ``leader_process`` tells."""
    agents_cpu: float
    """Processors that the agents took, together."""

    @property
    def leader_cpu(self) -> float:
        """Processors that the leader took."""
        return float(self.leader["cpu_s"] / self.leader["wall_s"])

    def ms(self, what: str, part: float) -> float:
        """A percentile of the leader's times, in milliseconds."""
        return 1000 * percentile(self.leader[what], part)


async def steady(bench: Bench[Scale]) -> list[Row]:
    """Each agent reports every 200 ms, as in production."""
    scale, windows, alone = bench.scale, [], []
    async with control_plane(bench.directory, scale.workers) as plane:
        for number in range(scale.windows):
            bench.say(f"steady: window {number + 1} of {scale.windows}")
            windows.append(await _window(plane, INTERVAL_S, scale.window_s))
            alone.append(await plane.leader.ask("decode_alone", times=DECODES))
    who = f"{scale.workers:,} workers, 5/s each"
    decode = "msgspec decode alone, same process"
    note = f"{windows[0].sent_per_s:.0f} reports/s of {SLOTS} workers; {windows[-1].leader['job']}"
    rows = [
        _row("handling p50", "ms", windows, "handling_s", 0.5, alone=(decode, alone, 0.5), note=note),
        _row("handling p99", "ms", windows, "handling_s", 0.99, aim=Aim("ours", "<", 1.2),
             alone=(decode, alone, 0.99)),
        _row("handling p99, processor time", "ms", windows, "handling_cpu_s", 0.99,
             aim=Aim("ours", "<", 1.2)),
        _row("handling max", "ms", windows, "handling_s", 1.0),
        _row("sent to handled p50", "ms", windows, "delay_s", 0.5),
        _row("sent to handled p99", "ms", windows, "delay_s", 0.99),
        _row("event loop late p99", "ms", windows, "late_s", 0.99),
        _row("turn of the coordinator p99, processor time", "ms", windows, "turns_cpu_s", 0.99),
    ]  # fmt: skip
    cpu = [window.leader_cpu for window in windows]
    rows.append(compare(f"leader, {who}", "cores", "lower", ours=cpu, peer_name="", peer=[]))
    return rows


async def rate(bench: Bench[Scale]) -> list[Row]:
    """The agents report ever faster until the leader does not keep up."""
    scale = bench.scale
    held: list[float] = []
    per_cpu: list[float] = []
    why = ""
    async with control_plane(bench.directory, scale.workers) as plane:
        for number in range(scale.searches):
            best: Window | None = None
            for target in scale.rates:
                bench.say(f"rate: search {number + 1} of {scale.searches}, {target:,}/s")
                window, why = await _tried(plane, scale, target)
                if why:
                    break
                best = window
            if best is None:
                raise Broken(f"not even {scale.rates[0]:,} worker-heartbeats/s were held: {why}")
            handled = best.sent_per_s * best.handled * SLOTS
            held.append(handled)
            per_cpu.append(handled / best.leader_cpu)
    where = "leader and agents share this machine's cores"
    return [
        compare("worker-heartbeats held", "1/s", "higher", ours=held, peer_name=RUST_PEER,
                peer=[RUST_RATE] * len(held), aim=Aim("ours", ">=", 50_000),
                note=f"{where}; the last search ended because {why or 'there was no higher rate'}"),
        compare("worker-heartbeats per second of leader's processor", "1/s", "higher", ours=per_cpu,
                peer_name=RUST_PEER, peer=[RUST_RATE] * len(held), note="at the highest rate held"),
    ]  # fmt: skip


async def _tried(plane: ControlPlane, scale: Scale, target: int) -> tuple[Window, str]:
    """A window at one rate, and why it was not held; other load on the machine may spoil all tries but one."""
    for _ in range(TRIES):
        window = await _window(plane, scale.workers / target, scale.window_s / 2)
        why = _not_held(window, target)
        if not why:
            break
        await _window(plane, INTERVAL_S, scale.window_s / 2)  # for what was left unread
    return window, why


def _not_held(window: Window, target: int) -> str:
    """Why a rate does not count as held; empty if it does."""
    if window.sent_per_s * SLOTS < FULL_SPEED * target:
        return f"the agents sent {window.sent_per_s * SLOTS:,.0f} of {target:,}/s, with {window.agents_cpu:.2f} cores"
    if window.dropped:
        return f"{window.dropped} reports did not fit the links' queues"
    if window.handled < HELD:
        return f"the leader handled {window.handled:.0%} of {target:,}/s, with {window.leader_cpu:.2f} cores"
    waited_s = percentile(window.leader["delay_s"], 0.5)
    return f"half of the reports waited over {waited_s:.2f} s" if waited_s > MAX_DELAY_S else ""


async def _window(plane: ControlPlane, interval_s: float, window_s: float) -> Window:
    await plane.all_agents("report_every", interval_s=interval_s)
    await plane.leader.ask("forget")
    await asyncio.sleep(window_s)
    counts = await plane.all_agents("count")
    leader = await plane.leader.ask("read")
    sent_per_s = sum(count["sent"] / count["wall_s"] for count in counts)
    return Window(
        sent_per_s=sent_per_s,
        handled=len(leader["handling_s"]) / leader["wall_s"] / sent_per_s,
        dropped=int(sum(count["dropped"] for count in counts)),
        leader=leader,
        agents_cpu=sum(count["cpu_s"] / count["wall_s"] for count in counts),
    )


def _row(
    quantity: str,
    unit: str,
    windows: list[Window],
    what: str,
    part: float,
    *,
    aim: Aim | None = None,
    alone: tuple[str, list[list[float]], float] | None = None,
    note: str = "",
) -> Row:
    name, times, of = alone or ("", [], 0.0)
    return compare(
        quantity,
        unit,
        "lower",
        ours=[window.ms(what, part) for window in windows],
        peer_name=name,
        peer=[1000 * percentile(one, of) for one in times],
        aim=aim,
        note=note,
    )


PARTS: dict[str, Part[Scale]] = {"steady": steady, "rate": rate}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    scale = QUICK if quick else FULL
    return await run_parts(PARTS, only, scale, directory, say)
