"""The control plane's benchmarks: small real measurements, the parts that take orders, and that they end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from bench import barrier, heartbeats
from bench.control_plane import SLOTS, control_plane
from bench.heartbeats import Window
from bench.players import playing
from bench.processes import Broken

WORKERS = 16
RATE = 200


def say(text: str) -> None:
    """Nobody listens."""


async def test_a_player_tells_what_went_wrong_and_ends_with_the_benchmark(tmp_path: Path) -> None:
    async with playing("bare_process", [], tmp_path / "log") as player:
        assert await player.ask("serve", agents=1) > 0
        with pytest.raises(Broken, match="KeyError: 'dance'"):
            await player.ask("dance")
        process = player._process
    assert process.returncode == 0
    async with playing("no_such_part", [], tmp_path / "log") as player:
        with pytest.raises(Broken, match="no_such_part"):
            await player.ask("serve", agents=1)


async def test_heartbeats_are_measured_for_real(tmp_path: Path) -> None:
    scale = heartbeats.Scale(workers=WORKERS, windows=1, window_s=0.5, searches=1, rates=(RATE,))
    bench = heartbeats.Bench(scale=scale, directory=tmp_path, say=say)
    rows = await heartbeats.steady(bench)
    assert rows[0].quantity == "handling p50"
    assert rows[0].peer
    assert rows[0].ours > rows[0].peer, "handling includes decoding"
    assert all(row.ours > 0 for row in rows)


async def test_barriers_are_measured_for_real_and_leave_no_process(tmp_path: Path) -> None:
    scale = barrier.Scale(repetitions=2, rounds={WORKERS: 3}, periods_s={WORKERS: 0.05})
    rows = await barrier._measured(barrier.Bench(scale=scale, directory=tmp_path, say=say), WORKERS)
    assert all(row.ours > 0 and row.runs == 2 for row in rows)
    (tmp_path / "again").mkdir()
    async with control_plane(tmp_path / "again", WORKERS) as plane:
        pids = [player._process.pid for player in (plane.leader, *plane.crowd)]
        placed = plane.placed["ranks"]
        assert sorted(rank for ranks in placed.values() for rank in ranks) == list(range(WORKERS))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def window(sent_per_s: float, handled: float, delay_s: float = 0.0, dropped: int = 0) -> Window:
    leader = {"cpu_s": 0.5, "wall_s": 1.0, "delay_s": [delay_s]}
    return Window(
        sent_per_s=sent_per_s, handled=handled, dropped=dropped, leader=leader, agents_cpu=1.0
    )


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (window(1000, 1.0), ""),
        (window(900, 1.0), "the agents sent 7,200 of 8,000/s"),
        (window(1000, 0.9), "the leader handled 90%"),
        (window(1000, 1.0, delay_s=1.0), "waited over 1.00 s"),
        (window(1000, 1.0, dropped=3), "3 reports did not fit"),
    ],
)
def test_a_rate_is_held_only_if_all_was_sent_and_handled_in_time(seen: Window, why: str) -> None:
    assert why in heartbeats._not_held(seen, 8000)
    assert bool(heartbeats._not_held(seen, 8000)) == bool(why)


async def test_the_search_for_the_rate_ends_at_the_highest_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def nothing(directory: Path, workers: int) -> AsyncIterator[None]:
        yield

    async def played(plane: None, interval_s: float, window_s: float) -> Window:
        rate = WORKERS / interval_s
        return window(rate / SLOTS, 1.0 if rate <= 400 else 0.5)

    monkeypatch.setattr(heartbeats, "control_plane", nothing)
    monkeypatch.setattr(heartbeats, "_window", played)
    scale = heartbeats.Scale(
        workers=WORKERS, windows=1, window_s=1.0, searches=2, rates=(200, 400, 800, 1600)
    )
    bench = heartbeats.Bench(scale=scale, directory=tmp_path, say=say)
    held, per_cpu = await heartbeats.rate(bench)
    assert (held.ours, held.runs, per_cpu.ours) == (400.0, 2, 800.0)
    assert "handled 50% of 800/s" in held.note
    scale = replace(scale, rates=(800,))
    with pytest.raises(Broken, match="not even 800"):
        await heartbeats.rate(replace(bench, scale=scale))
