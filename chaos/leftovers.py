"""What outlives a run and should not: removed whatever happens, and looked for to be told.

Everything that a harness makes carries its mark (pid and start time): processes in their environment, namespaces and
mounts in their names. So the next start finds what one that was killed has left, and never touches one that lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from chaos import network, storage
from chaos.processes import marked, owner_lives
from chaos.records import Leftover
from distroml.runtime.worker_server import socket_path

KILL_TIMEOUT_S = 5.0
POLL_S = 0.02
_SHARED_MEMORY = Path("/dev/shm")
_PROC = Path("/proc")
_MOMENTARY = (".tmp", ".partial")


async def remove_of_dead_harnesses() -> list[str]:
    """Remove what harnesses that are gone have left; the marks of those that had left something."""
    marks = network.marks_of_namespaces() | storage.marks_of_mounts()
    marks |= {process.mark for process in marked()}
    dead = sorted(mark for mark in marks if not owner_lives(mark))
    for mark in dead:
        await remove_of(mark)
    return dead


async def remove_of(mark: str) -> None:
    """Kill all processes with this mark, and remove its namespaces and mounts.

    Raises:
        TimeoutError: a process that was killed does not end.
    """
    async with asyncio.timeout(KILL_TIMEOUT_S):
        while victims := list(marked(mark)):
            for victim in victims:
                victim.kill()
            await asyncio.sleep(POLL_S)
    await network.remove_namespaces(mark)
    for path in storage.unmount(mark):
        if path.parent.name == "disks":
            shutil.rmtree(path.parent, ignore_errors=True)


class Before(frozenset[Path]):
    """The files that others had in shared memory when the run began."""


def before() -> Before:
    """Look at shared memory before the nodes start."""
    return Before(_shared_memory())


def look(
    mark: str, at_s: float, known: Before, data_dirs: Sequence[Path], listening: Iterable[str]
) -> list[Leftover]:
    """What is left once all nodes have been stopped.

    Args:
        data_dirs: of the nodes; what they hold may stay, but for what was to be there for a moment.
        listening: addresses (host:port) at which nobody may listen any more.
    """
    found = [("process", f"{p.role} of node {p.node or '?'}, pid {p.pid}") for p in marked(mark)]
    found += [("shared_memory", str(path)) for path in sorted(_ours(_shared_memory() - known))]
    found += [("file", str(path)) for place in data_dirs for path in _momentary(place)]
    found += [("port", address) for address in sorted(set(listening) & _listening())]
    return [Leftover(at_s=at_s, kind=kind, what=what) for kind, what in found]


def _momentary(data_dir: Path) -> list[Path]:
    """Halves of files, and sockets; those of a long path are not in the directory."""
    sockets = {socket_path(data_dir, name) for name in ("agent", "forkserver")}
    found = {path for path in data_dir.rglob("*") if path.suffix in _MOMENTARY}
    return sorted(found | {path for path in sockets if path.exists()})


def _shared_memory() -> set[Path]:
    return set(_SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else set()


def _ours(paths: set[Path]) -> set[Path]:
    """Without those that some process has mapped: the nodes are gone, so they are another's."""
    if not paths:
        return paths
    mapped = ""
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                mapped += (entry / "maps").read_text(errors="replace")
    return {path for path in paths if str(path) not in mapped and path.exists()}


def _listening() -> set[str]:
    """host:port of the IPv4 TCP sockets that listen in this process's namespace."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {_address(row[1]) for row in rows if row[3] == "0A"}


def _address(text: str) -> str:
    host, _, port = text.partition(":")
    parts = [str(byte) for byte in bytes.fromhex(host)[::-1]]
    return f"{'.'.join(parts)}:{int(port, 16)}"
