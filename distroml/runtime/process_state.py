"""What the kernel says of a process that says nothing itself."""

from __future__ import annotations

STOPPED = frozenset(b"Tt")
"""Stopped by a signal, or by a debugger: letters of ``/proc/PID/stat`` (proc(5))."""


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped; False where the kernel cannot be asked, or the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read(512)
    except OSError:
        return False
    _, _, after_name = stat.rpartition(b") ")  # the name may itself hold parentheses
    return bool(after_name) and after_name[0] in STOPPED
