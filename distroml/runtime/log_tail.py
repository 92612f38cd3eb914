"""Follows the file that a worker's stdout and stderr go to.

A file, not a pipe: a worker never waits for its agent, and what it wrote last is there after both died.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path

MAX_READ_BYTES = 256 * 1024
"""Most that one poll takes, so that a chatty worker cannot hold up the event loop."""
MAX_LINE_CHARS = 4096
MAX_FILE_BYTES = 64 * 1024 * 1024
"""A longer file is cut to nothing once it was read to its end."""
LAST_LINES = 20
LAST_LINE_CHARS = 300


class LogTail:
    """Incremental reader of one log file; survives that the file does not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._partial = b""
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The newest lines, cut short, to explain a failure."""
        return tuple(line[:LAST_LINE_CHARS] for line in self._last)

    def poll(self, *, final: bool = False) -> list[str]:
        """New complete lines since the last call; with ``final`` an unfinished last line too."""
        data = self._partial + self._read()
        *lines, self._partial = data.split(b"\n")
        if (final or len(self._partial) > MAX_LINE_CHARS * 4) and self._partial:
            lines.append(self._partial)
            self._partial = b""
        texts = [_text(line) for line in lines]
        self._last.extend(texts)
        return texts

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        if self._offset >= MAX_FILE_BYTES and len(data) < MAX_READ_BYTES:
            self._cut()
        return data

    def _cut(self) -> None:
        # The worker appends (O_APPEND), so it goes on at the new end. What it wrote since the read is lost.
        with contextlib.suppress(OSError):
            os.truncate(self.path, 0)
            self._offset = 0
            self._last.append(f"[log over {MAX_FILE_BYTES} bytes: file was cut]")


def _text(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip("\r")
    return text if len(text) <= MAX_LINE_CHARS else text[:MAX_LINE_CHARS] + " [line cut]"
