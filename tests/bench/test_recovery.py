"""The peers of the recovery benchmark: what is read out of what they tell, and one kill of each for real."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import live_job, recovery, torchft, torchrun
from bench.parts import Bench
from bench.processes import Broken
from bench.torchft import Groups
from bench.torchrun import RECOVERY_TIMEOUT_S
from bench.workloads import SMALL, STEPS_BEFORE_KILL, VICTIM_RANK

GROUPS = 4
BEFORE_STEP = 50


def told(rank: int, step: int, groups: int, batches: int, discarded: int = 0) -> dict[str, Any]:
    """A line of one group."""
    return {
        "rank": rank,
        "attempt": 0,
        "step": step,
        "groups": groups,
        "batches": batches,
        "discarded": discarded,
    }


BEFORE = {rank: told(rank, BEFORE_STEP, GROUPS, 200, discarded=1) for rank in (0, 1, 3)}


def read(*events: tuple[float, dict[str, Any]]) -> torchft.Recovery:
    return torchft.recovery(BEFORE, events, GROUPS)


def ours(seen_s: float) -> live_job.Recovery:
    return live_job.Recovery(
        seen_s=seen_s, first_step_s=seen_s, phases_ms={}, steps_lost=0, reason="", source=""
    )


# --- what torchft tells


def test_steps_of_all_groups_that_were_told_late_are_not_yet_the_recovery() -> None:
    found = read((0.01, told(1, 51, 4, 204, 1)), (0.5, told(0, 52, 3, 207, 2)))
    assert found.step_s == 0.5
    assert found.whole_s == RECOVERY_TIMEOUT_S, "not all are in again"
    assert found.steps_discarded == 1


def test_all_are_in_again_with_the_first_step_of_all_whoever_tells_of_it() -> None:
    found = read(
        (0.5, told(0, 51, 2, 202, 2)),
        (0.6, told(3, 52, 3, 205, 3)),
        (3.0, {"pid": 1, "rank": 2, "attempt": 1}),
        (4.0, told(2, 61, 4, 233)),
        (4.1, told(1, 61, 4, 233, 1)),
    )
    assert (found.step_s, found.whole_s) == (0.5, 4.0)
    assert found.steps_discarded == 2
    assert found.shares_lost == 2 + 9, "two of the first step, one of each of nine others"


def test_a_peer_that_does_not_come_back_counts_as_the_bound() -> None:
    found = read((3.0, {"pid": 1, "rank": 2, "attempt": 1}))
    assert (found.step_s, found.whole_s) == (RECOVERY_TIMEOUT_S, RECOVERY_TIMEOUT_S)
    assert (found.steps_discarded, found.shares_lost) == (0, 0)


async def steady(*events: dict[str, Any]) -> tuple[int, dict[int, dict[str, Any]]]:
    """What is read of three groups of which the first tells all this before it ends."""
    lines = iter(events)

    async def event() -> dict[str, Any]:
        for line in lines:
            return line
        raise Broken("torchrun ended: that was all")

    async def silence() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    members = [SimpleNamespace(event=one, said=lambda: "why") for one in (event, silence, silence)]
    async with Groups(members).listening() as groups:  # type: ignore[arg-type]
        return await groups.steady()


async def test_groups_are_steady_once_each_has_told_of_a_late_step_of_all() -> None:
    pids = [{"pid": 70 + rank, "rank": rank, "attempt": 0} for rank in range(3)]
    early = [told(rank, STEPS_BEFORE_KILL - 10, 3, 0) for rank in range(3)]
    fewer = [told(VICTIM_RANK, STEPS_BEFORE_KILL, 2, 0)]
    late = [told(rank, STEPS_BEFORE_KILL, 3, 0) for rank in range(3)]
    victim, before = await steady(*pids, *early, *fewer, *late)
    assert victim == 70 + VICTIM_RANK
    assert before == {rank: late[rank] for rank in range(3) if rank != VICTIM_RANK}
    with pytest.raises(Broken, match="that was all"):
        await steady(*pids, *early, *fewer, *late[:-1])


async def test_a_group_that_fails_by_itself_is_named_with_what_it_wrote() -> None:
    with pytest.raises(Broken, match=r"group 0 of torchft failed before any was killed: why"):
        await steady({"pid": 70, "rank": 0, "attempt": 0}, {"pid": 71, "rank": 0, "attempt": 1})


# --- rows


def test_torchft_stands_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchft, "version", lambda: "torchft 1")
    back = torchft.Recovery(step_s=1.0, whole_s=8.0, steps_discarded=1, shares_lost=30)
    away = torchft.Recovery(
        step_s=3.0, whole_s=RECOVERY_TIMEOUT_S, steps_discarded=2, shares_lost=90
    )
    step, whole, samples = torchft.rows("kill", 16, [ours(0.5), ours(0.5)], [back, away])
    assert {row.peer_name for row in (step, whole, samples)} == {"torchft 1"}
    assert (step.ours, step.peer, step.ratio) == (0.5, 2.0, 4.0)
    assert step.note.endswith("did again: 2")
    assert (whole.ours, whole.peer) == (0.5, (8.0 + RECOVERY_TIMEOUT_S) / 2)
    assert whole.note.startswith("1 of 2 were not back")
    assert (samples.ours, samples.peer) == (0.0, 60 * 16)


async def test_without_torchft_it_is_left_out_and_the_reason_and_the_way_to_get_it_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchft, "installed", lambda: False)
    said: list[str] = []
    bench = Bench(scale=recovery.QUICK, directory=tmp_path, say=said.append)
    assert await recovery._torchft(bench) == []
    assert torchft.rows("kill", 16, [ours(0.5)], []) == []
    assert len(said) == 1
    assert "torchft is not installed" in said[0]
    assert "pip install --no-deps torchft==0.2.0" in said[0]


# --- for real


async def test_torchrun_trains_for_real(tmp_path: Path) -> None:
    run = await torchrun.train(SMALL.spec(2, epochs=1), tmp_path)
    assert len(run.stamps) == SMALL.epoch_steps
    assert run.stamps == sorted(run.stamps)
    assert run.loss > 0


@pytest.mark.timeout(400)
@pytest.mark.skipif(not torchft.installed(), reason=torchft.HOW_TO_GET)
async def test_torchft_goes_on_without_a_killed_group_and_takes_it_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchft, "RECOVERY_TIMEOUT_S", 150.0)
    found = await torchft.time_to_recover(SMALL.spec(3, epochs=1_000_000), tmp_path)
    assert 0 < found.step_s < found.whole_s < torchft.RECOVERY_TIMEOUT_S
    assert found.shares_lost > 0
