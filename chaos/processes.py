"""Processes under test: found by the mark in their environment, signalled only where they still are who they were.

A process id alone may be another process by the time of the signal. So a process is a pid and its start time, and a
signal goes through a pidfd that was opened before the start time was compared.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

MARK = "CHAOS_RUN"
"""Variable that every process of a run inherits; its value names the harness, see ``own_mark``."""
NODE = "CHAOS_NODE"
"""Variable with the name of the node that a process belongs to."""
ROOT = Path(__file__).resolve().parent.parent
"""Where this package lies, for programs of it that run elsewhere."""
_PROC = Path("/proc")
_START_TIME = 19
"""Place of the start time behind the command's name in ``/proc/PID/stat``."""
_STATE = 0


def environ_of(mark: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for a process of the run that ``mark`` names: it carries the mark, and finds this package."""
    paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    return {**environ, MARK: mark, "PYTHONPATH": os.pathsep.join(paths)}


class Role(StrEnum):
    """What a process of a node does."""

    AGENT = "agent"
    FORKSERVER = "forkserver"
    WORKER = "worker"
    OTHER = "other"


class Process(Struct, frozen=True):
    """One process that carried the mark of a run when it was seen."""

    pid: int
    started: int
    """Clock ticks since boot."""
    mark: str
    node: str
    role: Role

    def signal(self, number: int) -> bool:
        """Send a signal; False where the process is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if start_time(self.pid) != self.started:
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def kill(self) -> bool:
        """SIGKILL; False where it is gone."""
        return self.signal(signal.SIGKILL)

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[_STATE] in ("Z", "X") else int(fields[_START_TIME])


def own_mark() -> str:
    """Names this process among all that ever ran since boot: PID-STARTED."""
    return f"{os.getpid()}-{start_time(os.getpid())}"


def owner_lives(mark: str) -> bool:
    """Whether the harness that a mark names still runs."""
    pid, _, started = mark.partition("-")
    if not (pid.isdecimal() and started.isdecimal()):
        return False
    return start_time(int(pid)) == int(started)


def marked(mark: str | None = None) -> Iterator[Process]:
    """All processes that carry this mark (None: any), but for this process itself."""
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            found = _look(int(entry.name))
            if found is not None and mark in (None, found.mark):
                yield found


def _look(pid: int) -> Process | None:
    started = start_time(pid)
    directory = _PROC / str(pid)
    try:
        environ = dict(
            part.split("=", 1)
            for part in (directory / "environ").read_bytes().decode(errors="replace").split("\0")
            if "=" in part
        )
        command = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
        name = (directory / "comm").read_text().strip()
    except OSError:
        return None
    if started is None or MARK not in environ:
        return None
    return Process(pid, started, environ[MARK], environ.get(NODE, ""), _role(command, name))


def _role(command: list[str], name: str) -> Role:
    """By the command line and by the name that a worker gives itself after the fork."""
    if any(part.endswith(".forkserver") for part in command):
        return Role.WORKER if name.startswith("dml-") else Role.FORKSERVER
    if any(part in ("chaos.under_test.node", "distroml.node") for part in command):
        return Role.AGENT
    return Role.OTHER
