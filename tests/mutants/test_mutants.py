"""A fix that can be taken out without any test noticing is not tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.engine import Mutant, fits, run
from tests.mutants.table import MUTANTS, WITHOUT_MUTANT

ROOT = Path(__file__).parents[2]
HAZARDS = {
    *(f"S{number}" for number in range(1, 16)),
    *(f"L{number}" for number in range(1, 8)),
    *(f"P{number}" for number in range(1, 6)),
    "X1",
    "X2",
}
"""All rows of the audit of the library."""


@pytest.mark.timeout(900)
def test_every_mutant_is_caught() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.mutants"],
        cwd=ROOT,
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(MUTANTS)} of {len(MUTANTS)} caught" in done.stdout


def test_every_hazard_has_a_mutant_or_a_reason() -> None:
    covered = {mutant.hazard for mutant in MUTANTS}
    assert covered | WITHOUT_MUTANT.keys() >= HAZARDS
    assert not covered & WITHOUT_MUTANT.keys()
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def _mutant(**changes: str) -> Mutant:
    sound = {
        "name": "sound",
        "hazard": "none",
        "breaks": "nothing",
        "target": "consensus.storage:snapshot_name",
        "old": "snapshot-",
        "new": "other-",
        "caught_by": "tests/consensus/test_snapshot.py::test_compaction_keeps_the_trailing_window",
    }
    return Mutant(**(sound | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"old": "no such text"}, "did not run"),
        ({"new": "snapshot-{undefined}-"}, "is broken itself: NameError"),
        ({}, ""),
        ({"caught_by": "tests/consensus/test_wal.py::test_no_such_test"}, "did not run"),
        ({"old": "snapshot-", "new": "snapshot-"}, "survived"),
    ],
)
def test_what_does_not_count_as_caught(changes: dict[str, str], why: str) -> None:
    (verdict,) = run([_mutant(**changes)], jobs=1)
    if why:
        assert not verdict.caught
        assert why in verdict.why
    else:
        assert verdict.caught


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_fits_the_source_and_names_a_test(mutant: Mutant) -> None:
    assert fits(mutant)
    file, *classes, test = mutant.caught_by.split("::")
    text = (ROOT / file).read_text()
    assert f"def {test.partition('[')[0]}(" in text
    assert all(f"class {name}:" in text for name in classes)
