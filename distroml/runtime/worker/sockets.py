"""The TCP sockets that a Gloo group opened, so that they can be shut down under it.

Nothing in torch's interface frees a thread that is blocked in a Gloo operation: ``abort``, ``shutdown`` and timeouts
of the group do not reach it. ``shutdown(2)`` on the group's own connections does, at once and at both ends. They
are found by comparing this process's descriptors before and after the group was made.
"""

from __future__ import annotations

import contextlib
import os
import socket


def open_sockets() -> dict[str, int]:
    """This process's sockets: kernel name (``socket:[inode]``, never reused while open) → descriptor."""
    found: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                found[link] = int(name)
    return found


def shut_down(names: frozenset[str] | None, but_for: frozenset[str] = frozenset()) -> int:
    """Shut the TCP connections called ``names`` (None: all) down, except ``but_for``; how many there were.

    Never a listening socket: Gloo's failing ``accept`` would end the process. Descriptors stay open; they are Gloo's
    to close.
    """
    count = 0
    for name, descriptor in open_sockets().items():
        if name in but_for or (names is not None and name not in names):
            continue
        try:
            duplicate = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        with duplicate, contextlib.suppress(OSError):
            if _is_connection(duplicate):
                duplicate.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _is_connection(opened: socket.socket) -> bool:
    internet = opened.family in (socket.AF_INET, socket.AF_INET6)
    if not internet or opened.type != socket.SOCK_STREAM:
        return False
    return not opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
