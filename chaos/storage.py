"""The disk of a node or of the store: a small tmpfs where root allows it, so that it can be full; else a directory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

MNT_DETACH = 2
_BALLOON = "balloon"
_MOUNTS = Path("/proc/self/mounts")
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """One file system; its name in the table of mounts carries the mark of the harness.

    Args:
        source: what the table of mounts calls it.
        path: where it is.
    """

    def __init__(self, source: str, path: Path, size_mib: int) -> None:
        self.source = source
        self.path = path
        self.size_mib = size_mib
        self.own = False
        """Whether it is a file system of its own, and so can be full."""

    def make(self) -> None:
        """Make the directory and mount it, where that is allowed."""
        self.path.mkdir(parents=True)
        if os.geteuid() == 0:
            options = f"size={self.size_mib}m,mode=0700".encode()
            done = _libc.mount(self.source.encode(), os.fsencode(self.path), b"tmpfs", 0, options)
            self.own = done == 0

    def fill(self) -> int:
        """Leave no byte free; returns how many were taken.

        Raises:
            RuntimeError: the directory is no file system of its own.
        """
        if not self.own:
            raise RuntimeError(f"{self.path} has no file system of its own to be filled")
        taken = 0
        with (
            (self.path / _BALLOON).open("ab", buffering=0) as balloon,
            contextlib.suppress(OSError),
        ):
            while True:
                taken += balloon.write(b"\0" * (1 << 16))
        return taken

    def empty(self) -> None:
        """Take the balloon away."""
        (self.path / _BALLOON).unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free


def marks_of_mounts() -> set[str]:
    """The marks of all harnesses that have mounted something."""
    return {source.removeprefix("chaos-").rpartition("-")[0] for source, _ in _mounted("")}


def unmount(mark: str) -> list[Path]:
    """Unmount everything that carries a mark, also where a process still uses it."""
    found = [path for _, path in _mounted(mark)]
    for path in found:
        if _libc.umount2(os.fsencode(path), MNT_DETACH) and ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return found


def _mounted(mark: str) -> list[tuple[str, Path]]:
    prefix = f"chaos-{mark}-" if mark else "chaos-"
    rows = [line.split(" ") for line in _MOUNTS.read_text().splitlines()]
    return [
        (row[0], Path(row[1].encode().decode("unicode_escape")))
        for row in rows
        if row[0].startswith(prefix) and row[2] == "tmpfs"
    ]
