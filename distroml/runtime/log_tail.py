"""Follows the files that workers' stdout and stderr go to, and lets go of old ones.

A file, not a pipe: a worker never waits for its agent, and what it wrote last is there after both died. The lines
go into history; the files only bridge the time until they are read, so their size and number are bounded here.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Collection, Iterable
from pathlib import Path

MAX_READ_BYTES = 256 * 1024
"""Most that one poll takes, so that a chatty worker cannot hold up the event loop."""
MAX_BEHIND_BYTES = 8 * 1024 * 1024
"""A reader that is further behind skips what lies between: who writes faster than is read must not fill the disk."""
FINAL_READ_BYTES = 1024 * 1024
"""Most that the last poll takes: of what is left the end, where the error stands."""
MAX_LINE_CHARS = 4096
MAX_FILE_BYTES = 64 * 1024 * 1024
"""A longer file is cut to nothing once it was read."""
LAST_LINES = 20
LAST_LINE_CHARS = 300
KEPT_FILES = 16
"""Files of workers that have ended which are kept of each run, the newest ones."""
KEPT_RUNS = 64
"""Directories of runs that are kept, the most recently written ones first."""


class LogTail:
    """Incremental reader of one log file; survives that the file does not exist yet."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._offset = 0
        if from_end:
            with contextlib.suppress(OSError):
                self._offset = path.stat().st_size
        self._partial = b""
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The newest lines, cut short, to explain a failure."""
        return tuple(line[:LAST_LINE_CHARS] for line in self._last)

    def poll(self, *, final: bool = False) -> list[str]:
        """New complete lines since the last call; with ``final`` all that is left, an unfinished last line too.

        Raises:
            OSError: the file exists but cannot be read.
        """
        limit = FINAL_READ_BYTES if final else MAX_READ_BYTES
        skipped, read = self._read(limit, limit if final else MAX_BEHIND_BYTES)
        texts = []
        if skipped:
            texts += [_text(self._partial)] if self._partial else []
            texts.append(f"[{skipped} bytes of output skipped: more was written than is kept]")
            self._partial = b""
        *lines, self._partial = (self._partial + read).split(b"\n")
        if (final or len(self._partial) > MAX_LINE_CHARS * 4) and self._partial:
            lines.append(self._partial)
            self._partial = b""
        texts += map(_text, lines)
        self._last.extend(texts)
        return texts

    def _read(self, limit: int, behind: int) -> tuple[int, bytes]:
        """How many bytes were passed over, and the next ones."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    self._offset = 0  # somebody else cut it
                skipped = 0
                if size - self._offset > behind:
                    skipped = size - limit - self._offset
                    self._offset += skipped
                file.seek(self._offset)
                data = file.read(limit)
        except FileNotFoundError:
            return 0, b""
        self._offset += len(data)
        if self._offset >= MAX_FILE_BYTES and self._offset >= size:
            self._cut()
        return skipped, data

    def _cut(self) -> None:
        # The worker appends (O_APPEND), so it goes on at the new end. What it wrote since the read is lost.
        with contextlib.suppress(OSError):
            os.truncate(self.path, 0)
            self._offset = 0
            self._last.append(f"[log over {MAX_FILE_BYTES} bytes: file was cut]")


def log_path(root: Path, run_id: str, worker: int) -> Path:
    """Where the output of one worker process goes."""
    return root / run_id / f"worker-{worker}.log"


def stale_logs(root: Path, runs: Collection[str], busy: Collection[tuple[str, int]]) -> list[Path]:
    """Files that can go: of runs that are gone, and all but the newest ones of the others.

    Args:
        runs: those that exist.
        busy: (run, worker) of processes that live; their files stay.
    """
    stale: list[Path] = []
    quiet: list[tuple[float, list[Path]]] = []
    for run in _directories(root):
        used = {worker for run_id, worker in busy if run_id == run.name}
        idle = {worker: path for path in _files(run) if 0 < (worker := _number(path)) not in used}
        kept = sorted(idle)[-KEPT_FILES:] if run.name in runs else []
        stale += [path for worker, path in sorted(idle.items()) if worker not in kept]
        if not used:
            quiet.append((_written_at(run), [idle[worker] for worker in kept]))
    quiet.sort(key=lambda one: one[0], reverse=True)
    return stale + [path for _, paths in quiet[KEPT_RUNS:] for path in paths]


def remove_logs(files: Iterable[Path]) -> None:
    """Remove files, and the directories of runs that are empty then. Blocks on the disk."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()
        with contextlib.suppress(OSError):  # others are left, or a new one was made just now
            file.parent.rmdir()


def _number(file: Path) -> int:
    """The worker that a file belongs to; 0 for one that is not ours."""
    number = file.name.removeprefix("worker-").removesuffix(".log")
    return int(number) if number.isdecimal() and number.isascii() else 0


def _files(path: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [entry for entry in path.iterdir() if entry.is_file() and not entry.is_symlink()]
    return []


def _directories(path: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()]
    return []


def _written_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _text(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip("\r")
    return text if len(text) <= MAX_LINE_CHARS else text[:MAX_LINE_CHARS] + " [line cut]"
