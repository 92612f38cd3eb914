"""Whole clusters under random faults in virtual time; `make sim SEEDS=10000` is the long run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.run import draw_config, run

ROOT = Path(__file__).parents[2]
SECONDS = 10.0


@pytest.mark.parametrize("lossy", [False, True], ids=["fifo", "lossy"])
@pytest.mark.parametrize("nodes", [1, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_random_faults_break_no_invariant(seed: int, nodes: int, lossy: bool) -> None:
    result = run(seed, draw_config(seed, nodes, lossy=lossy), SECONDS)
    assert not result.violation, str(result)
    assert result.figures["committed"] > 0, "a run without work proves nothing"


def test_a_seed_replays_bit_for_bit_in_any_process() -> None:
    code = (
        "from tests.sim.run import draw_config, run\n"
        "print(run(7, draw_config(7, 3, lossy=True), 5.0).fingerprint)"
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
