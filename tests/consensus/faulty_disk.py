"""A real disk whose next calls can be made to fail."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from distroml.consensus.disk import RealDisk


class FaultyDisk(RealDisk):
    """`fail["sync"] = errno.EIO` makes each later sync fail, until the key is removed.

    A failing write first writes the half of its bytes, as a full disk does.
    """

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []
        self.flowing = threading.Event()
        """While cleared, a sync does not return (for a minute at most)."""
        self.flowing.set()

    def _check(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fail:
            number = self.fail[call]
            raise OSError(number, os.strerror(number))

    def write(self, descriptor: int, content: bytes) -> None:
        if "write" in self.fail:
            super().write(descriptor, content[: len(content) // 2])
        self._check("write")
        super().write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        self._check("sync")
        self.flowing.wait(60)
        super().sync(descriptor)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        self._check("truncate")
        super().truncate(descriptor, size_bytes)

    def replace(self, source: Path, target: Path) -> None:
        self._check("replace")
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._check("remove")
        super().remove(path)

    def sync_directory(self, path: Path) -> None:
        self._check("sync_directory")
        super().sync_directory(path)


ENOSPC = errno.ENOSPC
EIO = errno.EIO
