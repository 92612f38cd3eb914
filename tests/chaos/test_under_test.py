"""Failpoints and edits: what is put into the processes under test before they import the product."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaos.checkers import CHECKERS
from chaos.kinds import BY_NAME
from chaos.mutants import MUTANTS, Mutant
from chaos.under_test import edits, failpoints
from chaos.under_test.edits import Edit, Stale, edited
from chaos.under_test.failpoints import Failpoints, SyncFault

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_failpoints_come_and_go_with_the_file(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "a.json"
    watched = failpoints.Watched(path, clock)
    assert watched.now() == Failpoints()

    wanted = Failpoints(syncs=(SyncFault(under="/x", error=True),), wall_offset_s=5.0)
    failpoints.write(path, wanted)
    assert watched.now() == Failpoints()  # it looks again only after a while
    clock.now_s += failpoints.LOOK_AGAIN_S
    assert watched.now() == wanted

    path.unlink()
    clock.now_s += failpoints.LOOK_AGAIN_S
    assert watched.now() == Failpoints()


def _child(code: str, **environ: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


SYNC_EVERYTHING = """
import json, os, sys
from chaos.under_test import failpoints
failpoints.install_if_asked()
told = {}
for directory in ("sick", "well"):
    with open(os.path.join(PLACE, directory), "wb") as file:
        for name in ("fsync", "fdatasync"):
            try:
                getattr(os, name)(file)
                told[directory + " " + name] = 0
            except OSError as error:
                told[directory + " " + name] = error.errno
print(json.dumps(told))
"""


def test_syncs_fail_where_they_should(tmp_path: Path) -> None:
    path = tmp_path / "failpoints.json"
    failpoints.write(path, Failpoints(syncs=(SyncFault(under=str(tmp_path / "sick"), error=True),)))

    told = _child(
        f"PLACE = {str(tmp_path)!r}" + SYNC_EVERYTHING, **{failpoints.VARIABLE: str(path)}
    )

    assert told == {
        "sick fsync": errno.EIO,
        "sick fdatasync": errno.EIO,
        "well fsync": 0,
        "well fdatasync": 0,
    }


def test_the_wall_clock_jumps_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "failpoints.json"
    failpoints.write(path, Failpoints(wall_offset_s=3600.0))
    code = """
import json, os, time
began, monotonic = time.time(), time.monotonic()
from chaos.under_test import failpoints
failpoints.install_if_asked()
jumps = [time.time() - began, time.time_ns() / 1e9 - began, time.monotonic() - monotonic]
print(json.dumps([round(jump / 600) for jump in jumps]))
"""

    assert _child(code, **{failpoints.VARIABLE: str(path)}) == [6, 6, 0]


def test_an_edit_must_fit_exactly_once() -> None:
    edit = Edit(module="m", old="a = 1", new="a = 2")

    assert edited("x\na = 1\n", [edit]) == "x\na = 2\n"
    with pytest.raises(Stale, match="m has 0 times"):
        edited("nothing", [edit])
    with pytest.raises(Stale, match="m has 2 times"):
        edited("a = 1; a = 1", [edit])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fit_the_product_as_it_is(mutant: Mutant) -> None:
    edits.check(mutant.edits)
    assert set(mutant.caught_by) <= CHECKERS.keys()
    assert {one.kind for one in mutant.planned} <= BY_NAME.keys()


def test_an_edited_module_is_what_everybody_imports() -> None:
    """Also where its functions are imported by name, and whatever is in the cache of bytecode."""
    edit = Edit(module="distroml.failover", old='DEFAULT_URL = "http://127', new='DEFAULT_URL = "evil://127')  # fmt: skip
    code = """
import json
from chaos.under_test import edits
edits.install_if_asked()
from distroml.client_async import DEFAULT_URL
print(json.dumps(DEFAULT_URL))
"""
    asked = {edits.VARIABLE: msgspec.json.encode([edit]).decode()}

    assert _child(code).startswith("http://127")
    assert _child(code, **asked).startswith("evil://127")


def test_what_was_imported_already_is_not_edited() -> None:
    with pytest.raises(Stale, match="was imported before"):
        edits.install([Edit(module="chaos.under_test.edits", old="x", new="y")])
