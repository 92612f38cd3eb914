"""Nothing of the demo outlives it: marked processes are found and killed, also by the sentry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distroml.demo.leftovers import Mark

WAIT_S = 20.0
SLEEPER = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


def sleeper(mark: Mark | None) -> subprocess.Popen[bytes]:
    """A process that runs until its input ends, in a group of its own."""
    process = subprocess.Popen(
        SLEEPER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(mark.environ if mark else {})},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def close(process: subprocess.Popen[bytes]) -> int:
    process.communicate(timeout=WAIT_S)
    return process.returncode


def test_only_what_carries_the_mark_is_killed() -> None:
    mark = Mark()
    ours, other, foreign = sleeper(mark), sleeper(Mark()), sleeper(None)
    assert [mark.on(p.pid) for p in (ours, other, foreign)] == [True, False, False]
    assert mark.kill_all() == [ours.pid]
    assert [close(p) for p in (ours, other, foreign)] == [-9, 0, 0]
    assert mark.kill_all() == []


def test_the_sentry_kills_what_is_left_when_its_owner_goes() -> None:
    mark = Mark()
    mark.post_sentry()
    left = sleeper(mark)
    mark.dismiss_sentry()
    assert left.wait(WAIT_S) == -9
    close(left)
