"""From pieces of a file in any order to the parts that an object store takes. Pure; nothing is copied before it is joined."""

from __future__ import annotations

import threading

from distroml.runtime.checkpoint.stores.interface import Buffer

PART_BYTES = 16 * 1024 * 1024
MAX_PARTS = 10_000
"""S3 takes no more of a file."""
_MIB = 1024 * 1024


def part_size(size_bytes: int) -> int:
    """Bytes of each part but the last of a file: 16 MiB, and more only where they would be too many."""
    return max(PART_BYTES, -(-size_bytes // MAX_PARTS // _MIB) * _MIB)


class Parts:
    """Pieces that arrived, until the part that they belong to is complete; any thread.

    The bytes are not copied: they must stay as they are until their part was taken and sent.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.part_bytes = size_bytes, part_size(size_bytes)
        self._lock = threading.Lock()
        self._waiting: dict[int, list[tuple[int, memoryview]]] = {}
        self._complete: set[int] = set()
        self._missing_bytes = size_bytes

    @property
    def missing_bytes(self) -> int:
        """What has not arrived."""
        return self._missing_bytes

    def add(self, offset: int, data: Buffer) -> list[tuple[int, list[memoryview]]]:
        """The parts that ``data`` completes, each with its number (from 1) and its bytes in order.

        Raises:
            ValueError: it lies outside of the file or on bytes that have arrived before.
        """
        view, end = memoryview(data).cast("B"), offset + memoryview(data).nbytes
        if offset < 0 or end > self.size_bytes:
            raise ValueError(f"bytes {offset} to {end} of a file of {self.size_bytes}")
        taken = []
        with self._lock:
            while view:
                number = offset // self.part_bytes
                piece = view[: (number + 1) * self.part_bytes - offset]
                if (part := self._take(number, offset, piece)) is not None:
                    taken.append((number + 1, part))
                offset, view = offset + len(piece), view[len(piece) :]
        return taken

    def _take(self, number: int, offset: int, piece: memoryview) -> list[memoryview] | None:
        """One piece of one part; that part's bytes if nothing of it is missing now."""
        if number in self._complete:
            raise ValueError(f"bytes at {offset} came twice")
        pieces = self._waiting.setdefault(number, [])
        pieces.append((offset, piece))
        self._missing_bytes -= len(piece)
        if sum(len(one) for _, one in pieces) < self._length(number):
            return None
        self._complete.add(number)
        return _in_order(self._waiting.pop(number), number * self.part_bytes)

    def _length(self, number: int) -> int:
        return min(self.part_bytes, self.size_bytes - number * self.part_bytes)


def _in_order(pieces: list[tuple[int, memoryview]], at: int) -> list[memoryview]:
    ordered = sorted(pieces, key=lambda piece: piece[0])
    for offset, piece in ordered:
        if offset != at:
            raise ValueError(f"bytes at {min(offset, at)} came twice")
        at += len(piece)
    return [piece for _, piece in ordered]
