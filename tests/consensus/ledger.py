"""The smallest state machine that shows what was applied, and in which order."""

from __future__ import annotations

import msgspec


class Ledger:
    """Remembers each operation once, in order."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []

    def apply(self, index: int, entry: bytes) -> None:
        if entry not in self.entries:
            self.entries.append(entry)

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode(self.entries)

    def restore(self, index: int, blob: bytes) -> None:
        self.entries = msgspec.msgpack.decode(blob, type=list[bytes])
