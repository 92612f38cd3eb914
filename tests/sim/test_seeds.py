"""Whole clusters under random faults in virtual time; `make sim SEEDS=10000` is the long run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEEDS = 300
SECONDS = 10.0


@pytest.mark.timeout(900)
def test_random_faults_break_no_invariant() -> None:
    cores = len(os.sched_getaffinity(0))
    options = f"--seeds {SEEDS} --seconds {SECONDS} --nodes 1,2,3,5 --jobs {cores}"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.sim", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = dict(re.findall(r"([a-z_ ]+) (\d+)", run.stdout.splitlines()[-1]))
    for what in ("snapshots taken", "snapshots installed", "power losses", "writes acked", "reads"):
        assert int(figures[f" {what}"]) > SEEDS / 10, f"{what}: a run without it proves nothing"


@pytest.mark.parametrize("lossy", [False, True])
def test_a_seed_replays_bit_for_bit_in_any_process(lossy: bool) -> None:
    code = (
        "from msgspec.structs import replace\n"
        "from tests.sim.run import draw_config, run\n"
        f"config = replace(draw_config(7, 3, lossy={lossy}), learners=1, keyed=True)\n"
        "print(run(7, config, 5.0).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(prints) == 1
