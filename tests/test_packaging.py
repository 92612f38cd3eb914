"""What a fresh machine relies on: pins, targets, and the one command of the build machine."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!\[;]", requirement)[0].lower().replace("_", "-")


def test_every_dependency_is_pinned_to_a_public_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    pinned = {_name(name) for name in PINNED}
    assert {_name(one) for group in groups for one in group} <= pinned
    assert PINNED["torch"] == "2.13.0"
    assert [version for version in PINNED.values() if "+" in version or "/" in version] == []


def test_the_build_machine_runs_the_users_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = script.read_text().splitlines()
    assert "set -euo pipefail" in commands
    assert commands.index("make test") > commands.index("set -euo pipefail")


@pytest.mark.parametrize(
    "target",
    ["venv", "demo", "test", "check", "golden", "fuzz", "format", "bench", "clean"],
)
def test_make_explains_its_targets(target: str) -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"make {target} +\w", shown.stdout)
