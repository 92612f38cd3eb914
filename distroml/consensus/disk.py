"""The few file operations that durability rests on, behind one seam.

`storage.py` and `wal.py` touch the file system only through a `Disk`, so that tests can make any
single call fail with ENOSPC or EIO. All calls block; they run in the node's sync thread.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol

_WRITE_SLICE_BYTES = 64 * 1024 * 1024
"""One write(2) moves at most about 2 GiB; smaller slices keep a failing disk's answer prompt."""


class Disk(Protocol):
    def make_directory(self, path: Path) -> None: ...
    def names(self, directory: Path) -> list[str]: ...
    def read(self, path: Path) -> bytes: ...
    def open_append(self, path: Path) -> int: ...
    def write(self, descriptor: int, content: bytes) -> None: ...
    def sync(self, descriptor: int) -> None: ...
    def truncate(self, descriptor: int, size_bytes: int) -> None: ...
    def close(self, descriptor: int) -> None: ...
    def replace(self, source: Path, target: Path) -> None: ...
    def remove(self, path: Path) -> None: ...
    def sync_directory(self, path: Path) -> None: ...
    def lock(self, path: Path) -> int: ...


class RealDisk:
    """The operating system's files."""

    def make_directory(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def names(self, directory: Path) -> list[str]:
        return sorted(os.listdir(directory))

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def open_append(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view[:_WRITE_SLICE_BYTES]) :]

    def sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        os.ftruncate(descriptor, size_bytes)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, path: Path) -> int:
        """An exclusive lock that dies with its holder. Raises BlockingIOError if it is held."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def write_atomically(disk: Disk, target: Path, content: bytes) -> None:
    """`target` has the old content or the new one, never a mixture, whenever we die."""
    temporary = target.with_name(target.name + ".tmp")
    disk.remove(temporary)
    descriptor = disk.open_append(temporary)
    try:
        disk.write(descriptor, content)
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)
    disk.replace(temporary, target)
    disk.sync_directory(target.parent)
