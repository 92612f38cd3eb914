"""The simulator itself: what it must catch it catches, and a failure shrinks to what matters."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distroml.consensus.raft import RaftNode
from tests.sim.disk import SimDisk
from tests.sim.run import Result, draw_config, kind_of, run, shrink

ROOT = Path(__file__).parents[2]
SECONDS = 20.0


def first_failure(seeds: range, *, lossy: bool = False) -> Result:
    for seed in seeds:
        result = run(seed, draw_config(seed, 3, lossy=lossy), SECONDS)
        if result.violation:
            return result
    raise AssertionError("nothing was noticed")


def test_a_disk_that_lies_about_syncs_is_noticed_and_the_failure_shrinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SimDisk, "syncs_lie", True)
    result = first_failure(range(10))
    assert re.search("forgot|voted in term|refuses its own directory", result.violation)
    smallest = shrink(result, SECONDS)
    assert kind_of(smallest.violation) == kind_of(result.violation)
    assert len(smallest.schedule) <= 3
    assert any(fault.power for fault in smallest.schedule), (
        "without a loss of power no lie is found out"
    )
    again = run(result.seed, result.config, SECONDS, smallest.schedule)
    assert (again.violation, again.fingerprint) == (smallest.violation, smallest.fingerprint)
    assert result.replay in str(result)


def test_a_request_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(_self: RaftNode, _timeout_s: float) -> int:
        await asyncio.get_running_loop().create_future()
        return 0

    monkeypatch.setattr(RaftNode, "read_index", hangs)
    assert "stuck: a read" in first_failure(range(3)).violation


@pytest.mark.parametrize(
    ("mutant", "noticed"),
    [
        ("vote-not-durable", "forgot"),
        ("append-unsynced", "forgot"),
        ("tail-behind-snapshot-dropped", "forgot"),
        ("truncates-what-matches", "takes entry"),
    ],
)
def test_a_fix_taken_out_is_noticed_under_random_faults(mutant: str, noticed: str) -> None:
    options = f"--mutant {mutant} --seeds 40 --seconds 20 --stop --shrink 0"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.sim", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert any(word in told[0] for word in noticed.split("|")), told
