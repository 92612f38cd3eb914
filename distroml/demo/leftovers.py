"""Makes sure that nothing of the demo outlives it: its processes are recognised by a mark in their environment."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

VARIABLE = "DEMO_RUN_ID"
_PROC = Path("/proc")


class Mark:
    """A mark that every descendant inherits, whatever process group or parent it ends up with.

    Where there is no /proc (macOS) nothing is recognised: nodes end their own workers there.
    """

    def __init__(self) -> None:
        self._value = uuid.uuid4().hex

    @property
    def environ(self) -> dict[str, str]:
        """What to add to the environment of the processes."""
        return {VARIABLE: self._value}

    def on(self, pid: int) -> bool:
        """Whether a running process carries the mark; true where that cannot be told."""
        if not (_PROC / "self/environ").exists():
            return True
        wanted = f"{VARIABLE}={self._value}".encode()
        try:
            return wanted in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def kill_all(self) -> list[int]:
        """SIGKILL every process that carries the mark; returns their ids."""
        if not (_PROC / "self/environ").exists():
            return []
        pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and self.on(pid) and kill(pid)]


def kill(pid: int) -> bool:
    """SIGKILL a process; false where it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
