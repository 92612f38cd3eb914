"""A simulated disk under the product's own `wal.py` and `storage.py`: what survives a kill or a power loss.

Running code sees the page cache. A *kill* keeps all calls that were made by that instant, the last write
perhaps in part. A *power loss* also undoes what was not synced: per file any suffix of the calls since its
last sync, the first one lost perhaps torn or with garbage in its place; per directory any suffix of the
renames, creations and removals since its last sync. After a failed sync the unsynced bytes are lost for good,
as the kernel drops such pages, even if a later sync of the same bytes succeeds.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.sim.loop import ProcessKilled


class _File:
    __slots__ = ("content", "dropped", "undo")

    def __init__(self) -> None:
        self.content = bytearray()
        self.undo: list[tuple[int, bytes]] = []
        """Calls since the last sync, each as (length before, bytes that it cut off)."""
        self.dropped: tuple[int, int] | None = None
        """Range that a failed sync has lost: cached, but never to reach the disk."""


class Failpoint:
    """The process dies before or after the `count`-th next call named `call`.

    Calls of the disk are the names of its methods; `process.Process.passes` knows more."""

    def __init__(self, call: str, *, after: bool, count: int = 1) -> None:
        self.call, self.after, self.count = call, after, count

    def hit(self, call: str, *, after: bool) -> bool:
        """Counts this call if it is one of those meant, and tells whether it is the one."""
        if call != self.call or after is not self.after:
            return False
        self.count -= 1
        return self.count <= 0


class SimDisk:
    """One node's disk; outlives its processes. `directory` is the only one that exists."""

    syncs_lie = False
    """A disk that acknowledges syncs without doing them: to see that this is noticed."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        """Calls that fail with an errno until the key is removed."""
        self.failpoint: Failpoint | None = None
        self.calls = 0
        self._names: dict[Path, _File] = {}
        self._renames: list[tuple[Path, Callable[[], None]]] = []
        """Directory changes since the directory's last sync: (path, undo)."""
        self._open: dict[int, _File] = {}
        self._last_descriptor = 2
        self._recent: list[tuple[float, Callable[[float], None]]] = []
        """Calls of the operation in progress: (when they happen, undo)."""
        self._recording: list[Callable[[float], None]] | None = None

    # ------------------------------------------------------------------ one blocking call of a process

    def execute(
        self, call: Callable[[], Any], now: float, duration_s: float, rng: random.Random
    ) -> tuple[Any, Exception | None]:
        """Runs `call` and spreads the disk calls it makes over the time that it takes."""
        self._recording = undo = []
        result, error = None, None
        try:
            result = call()
        except OSError as failed:
            error = failed
        except ProcessKilled:
            self._recent = []
            raise
        finally:
            self._recording = None
        share = duration_s / max(1, len(undo))
        self._recent = [(now + (n + rng.random()) * share, step) for n, step in enumerate(undo)]
        return result, error

    def kill(self, now: float, rng: random.Random) -> None:
        """The process is gone: calls that it had not come to never happened."""
        self._open.clear()
        self.failpoint = None
        late = [step for at, step in self._recent if at > now]
        self._recent = []
        for place in range(len(late) - 1, -1, -1):
            torn = rng.random() if place == 0 and rng.random() < 0.5 else 0.0
            late[place](torn)

    def lose_power(self, rng: random.Random) -> None:
        """Undoes what was not synced; to be called after `kill`."""
        kept = rng.randint(0, len(self._renames))
        for _, undo in reversed(self._renames[kept:]):
            undo()
        self._renames.clear()
        for file in self._names.values():
            self._lose_bytes(file, rng)

    def _lose_bytes(self, file: _File, rng: random.Random) -> None:
        kept = rng.randint(0, len(file.undo))
        for place in range(len(file.undo) - 1, kept - 1, -1):
            length, cut = file.undo[place]
            added = bytes(file.content[length:])
            del file.content[length:]
            file.content += cut
            if place == kept and added:
                file.content += _torn(added, rng)
        file.undo.clear()
        if file.dropped is not None:
            start, end = file.dropped
            end = min(end, len(file.content))
            if start < end:
                file.content[start:end] = bytes(end - start)
            file.dropped = None

    def wipe(self) -> None:
        self._names.clear()
        self._renames.clear()
        self._recent = []

    # ------------------------------------------------------------------ the product's interface

    def make_directory(self, path: Path) -> None:
        pass

    def names(self, directory: Path) -> list[str]:
        return sorted(path.name for path in self._names if path.parent == directory)

    def read(self, path: Path) -> bytes:
        return bytes(self._names[path].content)

    def open_append(self, path: Path) -> int:
        self._before("open_append")
        if path not in self._names:
            self._names[path] = _File()
            self._changed(path, lambda: self._names.pop(path, None))
        self._last_descriptor += 1
        self._open[self._last_descriptor] = self._names[path]
        self._after("open_append")
        return self._last_descriptor

    def write(self, descriptor: int, content: bytes) -> None:
        file, length = self._open[descriptor], len(self._open[descriptor].content)
        point = self.failpoint
        dies = point is not None and point.call == "write" and not point.after
        partly = "write" in self.fail or (dies and point.count == 1)
        file.undo.append((length, b""))
        file.content += content[: len(content) // 2] if partly else content

        def undo(torn: float) -> None:
            keep = length + int((len(file.content) - length) * torn)
            del file.content[keep:]
            if keep == length:
                file.undo.pop()

        self._record(undo)
        self._before("write")
        self._after("write")

    def sync(self, descriptor: int) -> None:
        file = self._open[descriptor]
        before, dropped = list(file.undo), file.dropped
        if self.fail.get("sync") == errno.EIO and before:
            start = min(length for length, _ in before)
            low = start if dropped is None else min(start, dropped[0])
            file.dropped = (low, len(file.content))
        self._before("sync")
        if self.syncs_lie:
            return
        file.undo.clear()

        def undo(_torn: float) -> None:
            file.undo[:0] = before

        self._record(undo)
        self._after("sync")

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        self._before("truncate")
        file = self._open[descriptor]
        cut = bytes(file.content[size_bytes:])
        dropped = file.dropped
        del file.content[size_bytes:]
        file.undo.append((size_bytes, cut))
        if dropped is not None:
            file.dropped = (
                None if size_bytes <= dropped[0] else (dropped[0], min(size_bytes, dropped[1]))
            )

        def undo(_torn: float) -> None:
            file.undo.pop()
            file.content += cut
            file.dropped = dropped

        self._record(undo)
        self._after("truncate")

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)

    def replace(self, source: Path, target: Path) -> None:
        self._before("replace")
        moved, replaced = self._names.pop(source), self._names.get(target)
        self._names[target] = moved

        def undo() -> None:
            self._names[source] = self._names.pop(target)
            if replaced is not None:
                self._names[target] = replaced

        self._changed(target, undo)
        self._after("replace")

    def remove(self, path: Path) -> None:
        self._before("remove")
        file = self._names.pop(path, None)
        if file is not None:
            self._changed(path, lambda: self._names.__setitem__(path, file))
        self._after("remove")

    def sync_directory(self, path: Path) -> None:
        self._before("sync_directory")
        before = self._renames
        self._renames = [change for change in before if change[0].parent != path]

        def undo(_torn: float) -> None:
            self._renames = before + self._renames

        self._record(undo)
        self._after("sync_directory")

    def lock(self, path: Path) -> int:
        self._last_descriptor += 1
        return self._last_descriptor

    # ------------------------------------------------------------------ small steps

    def _record(self, undo: Callable[[float], None]) -> None:
        if self._recording is not None:
            self._recording.append(undo)

    def _changed(self, path: Path, undo: Callable[[], object]) -> None:
        change = (path, lambda: (undo(), None)[1])
        self._renames.append(change)

        def step(_torn: float) -> None:
            self._renames.remove(change)
            undo()

        self._record(step)

    def _before(self, call: str) -> None:
        self.calls += 1
        self._strike(call, after=False)
        number = self.fail.get(call)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def _after(self, call: str) -> None:
        self._strike(call, after=True)

    def _strike(self, call: str, *, after: bool) -> None:
        if self.failpoint is not None and self.failpoint.hit(call, after=after):
            self.failpoint = None
            raise ProcessKilled


def _torn(added: bytes, rng: random.Random) -> bytes:
    """What may be left of a write that was under way: a prefix, perhaps with sectors never written."""
    part = bytearray(added[: rng.randint(0, len(added))])
    if part and rng.random() < 0.3:
        start = rng.randrange(len(part))
        part[start : start + 512] = bytes(len(part[start : start + 512]))
    return bytes(part)
