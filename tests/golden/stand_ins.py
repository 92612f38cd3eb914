"""What a node of a script applies its entries to, and the disk that it writes to."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import msgspec

from distroml.consensus.raft_log import (
    AppendRecords,
    DiskOp,
    LogImage,
    RewriteLog,
    StoreSnapshot,
    apply_record,
    blank_image,
)
from distroml.consensus.snapshot import Snapshot
from distroml.consensus.storage import Recovered, join


class Ledger:
    """A state machine that remembers each operation once, in order."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.known: set[bytes] = set()
        self.chain = 0
        self.on_apply: Callable[[int, bytes], None] = lambda _index, _entry: None

    def apply(self, index: int, entry: bytes) -> None:
        if entry not in self.known:
            self.known.add(entry)
            self.entries.append(entry)
            self.chain = zlib.crc32(entry, self.chain)
        self.on_apply(index, entry)

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode((self.entries, self.chain))

    def restore(self, index: int, blob: bytes) -> None:
        self.entries, self.chain = msgspec.msgpack.decode(blob, type=tuple[list[bytes], int])
        self.known = set(self.entries)


class SimDisk:
    """What survives a crash: the operations that were performed, each of them atomic."""

    def __init__(self) -> None:
        self.image: LogImage | None = None
        self.snapshot: Snapshot | None = None

    def perform(self, op: DiskOp) -> None:
        match op:
            case AppendRecords():
                assert self.image is not None
                for record in op.records:
                    apply_record(self.image, record)
            case StoreSnapshot():
                self.snapshot = op.snapshot
            case RewriteLog():
                self.image = op.image.copy()

    def recover(self) -> Recovered:
        if self.image is None:
            self.image = blank_image()
        self.image = join(self.image, self.snapshot, "disk").copy()
        return Recovered(self.image.copy(), self.snapshot, [])
