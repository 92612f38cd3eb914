"""Failures that only the process itself can have: an fsync that fails or is slow, a wall clock that jumps.

The harness writes a small JSON file per node; the node's processes look at it when they are about to sync a file or to
tell the time. So a failure comes and goes while they run, and outlives a restart as a broken disk would.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

VARIABLE = "CHAOS_FAILPOINTS"
"""Path of the file; without it nothing is put in."""
LOOK_AGAIN_S = 0.02
"""The file is looked at no more often than this."""


class SyncFault(Struct, frozen=True, kw_only=True):
    """What happens when a file below ``under`` is synced."""

    under: str
    error: bool = False
    """It fails with EIO, and nothing is synced."""
    pause_s: float = 0.0
    """It takes so much longer."""


class Failpoints(Struct, frozen=True, kw_only=True):
    """All failures of one node now."""

    syncs: tuple[SyncFault, ...] = ()
    wall_offset_s: float = 0.0


def write(path: Path, failpoints: Failpoints) -> None:
    """Have the processes of a node see these from now on; a reader sees the old file or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(failpoints))
    fresh.replace(path)


class Watched:
    """The file's content, read again when it was replaced."""

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._monotonic = monotonic
        self._looked_s = float("-inf")
        self._version: tuple[int, int] | None = None
        self._now = Failpoints()

    def now(self) -> Failpoints:
        """What the harness wants to fail; nothing where it says nothing."""
        if self._monotonic() - self._looked_s < LOOK_AGAIN_S:
            return self._now
        self._looked_s = self._monotonic()
        try:
            status = self._path.stat()
            version = (status.st_ino, status.st_mtime_ns)
            if version != self._version:
                self._now = msgspec.json.decode(self._path.read_bytes(), type=Failpoints)
                self._version = version
        except FileNotFoundError:
            self._now, self._version = Failpoints(), None
        return self._now


def install(path: Path) -> None:
    """Put the failpoints into this process; to be called before anything binds these functions to names of its own."""
    watched = Watched(path)
    for name in ("fsync", "fdatasync"):
        setattr(os, name, _failing(getattr(os, name), watched))
    real_s, real_ns = time.time, time.time_ns
    time.time = lambda: real_s() + watched.now().wall_offset_s
    time.time_ns = lambda: real_ns() + round(watched.now().wall_offset_s * 1e9)


def install_if_asked() -> None:
    """``install`` where the environment names a file."""
    if given := os.environ.get(VARIABLE):
        install(Path(given))


def _failing(sync: Callable[[int], None], watched: Watched) -> Callable[[int], None]:
    def maybe(descriptor: int | object) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()  # type: ignore[attr-defined]
        if faults := watched.now().syncs:
            path = os.readlink(f"/proc/self/fd/{number}")
            for fault in faults:
                if path.startswith(fault.under):
                    time.sleep(fault.pause_s)
                    if fault.error:
                        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        sync(number)

    return maybe
