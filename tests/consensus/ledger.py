"""The smallest state machine that shows what was applied, and in which order."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import msgspec


class Ledger:
    """Remembers each operation once, in order; `chain` sums up all of them."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.chain = 0
        self.on_apply: Callable[[int, bytes], None] = lambda _index, _entry: None

    def apply(self, index: int, entry: bytes) -> None:
        if entry not in self.entries:
            self.entries.append(entry)
            self.chain = zlib.crc32(entry, self.chain)
        self.on_apply(index, entry)

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode((self.entries, self.chain))

    def restore(self, index: int, blob: bytes) -> None:
        self.entries, self.chain = msgspec.msgpack.decode(blob, type=tuple[list[bytes], int])
