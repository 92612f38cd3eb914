"""Whose turn it is: threads that serve checkpoints let those that train go first."""

from __future__ import annotations

import contextlib
import os
import threading

NICENESS = 10
"""Added to that of the process: training gets about nine times as much of a core that both want."""


def give_way() -> None:
    """Let threads of normal priority go before this one, where the system can tell them apart."""
    with contextlib.suppress(OSError, AttributeError):
        thread, usual = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, thread, min(19, usual + NICENESS))
