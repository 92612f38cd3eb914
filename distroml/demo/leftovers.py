"""Makes sure that nothing of the demo outlives it: its processes are recognised by a mark in their environment.

Run as a program it is the sentry: it waits until its standard input ends, as it does with the demo's life however
that ends, and then kills whatever still carries the mark.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

VARIABLE = "DEMO_RUN_ID"
SENTRY_TIMEOUT_S = 10.0
_PROC = Path("/proc")


class Mark:
    """A mark that every descendant inherits, whatever process group or parent it ends up with.

    Where there is no /proc (macOS) nothing is recognised: nodes end their own workers there.
    """

    def __init__(self, value: str = "") -> None:
        self._value = value or uuid.uuid4().hex
        self._sentry: subprocess.Popen[bytes] | None = None

    @property
    def environ(self) -> dict[str, str]:
        """What to add to the environment of the processes."""
        return {VARIABLE: self._value}

    def on(self, pid: int) -> bool:
        """Whether a running process carries the mark; true where that cannot be told."""
        if not _can_tell():
            return True
        wanted = f"{VARIABLE}={self._value}".encode()
        try:
            return wanted in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def kill_all(self) -> list[int]:
        """SIGKILL every process that carries the mark; returns their ids."""
        if not _can_tell():
            return []
        pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and self.on(pid) and kill(pid)]

    def post_sentry(self) -> None:
        """From now on a process of its own kills what is left, should this one not live to do it."""
        self._sentry = subprocess.Popen(
            [sys.executable, "-m", "distroml.demo.leftovers", self._value],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def dismiss_sentry(self) -> None:
        """The sentry looks a last time and ends."""
        sentry, self._sentry = self._sentry, None
        if sentry is not None and sentry.stdin is not None:
            sentry.stdin.close()
            sentry.wait(SENTRY_TIMEOUT_S)


def kill(pid: int) -> bool:
    """SIGKILL a process; false where it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _can_tell() -> bool:
    return (_PROC / "self/environ").exists()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    Mark(sys.argv[1]).kill_all()
