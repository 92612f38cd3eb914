"""The Raft log in memory, and the disk operations that make it durable.

Pure: every change updates the entries at once and records an operation. At the end of a turn the
driver takes the operations, performs them in order (`storage.py`), and only then lets the turn's
messages leave. `apply_record` is the same arithmetic for replay, so what is read back after a
crash is what some prefix of the operations had built.
"""

from __future__ import annotations

import msgspec

from distroml.consensus.messages import NO_OP, Entry, Number
from distroml.consensus.raft_types import SafetyViolation, StorageCorrupt
from distroml.consensus.snapshot import Snapshot

FIRST_INDEX = 1
"""Index of the anchor of an empty log: the library's own no-op, identical on every node."""


class EntryRecord(msgspec.Struct, frozen=True, array_like=True, tag=1):
    command: bytes
    index: Number
    term: Number


class TermRecord(msgspec.Struct, frozen=True, array_like=True, tag=2):
    term: Number
    vote: str | None


class TruncateRecord(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Entries with `first_removed` and above are gone."""

    first_removed: Number


class AnchorRecord(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The log is nothing but the position (index, term); what was before is in a snapshot."""

    index: Number
    term: Number


class ProvenRecord(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """This voter has forgotten nothing, or has all that it had forgotten (see `proofs`)."""


class NonceRecord(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The name of this directory among all that this voter ever had."""

    nonce: Number


Record = EntryRecord | TermRecord | TruncateRecord | AnchorRecord | ProvenRecord | NonceRecord


class LogImage(msgspec.Struct):
    """Everything the log file holds; `entries[0]` is the anchor and is never sent or applied."""

    entries: list[Entry]
    term: int
    vote: str | None
    proven: bool
    nonce: int = 0
    """0 until the directory has one; those that are proven need none."""

    @property
    def anchor_index(self) -> int:
        return self.entries[0][1]

    @property
    def last_index(self) -> int:
        return self.entries[-1][1]

    @property
    def last_term(self) -> int:
        return self.entries[-1][2]

    def copy(self) -> LogImage:
        return LogImage(list(self.entries), self.term, self.vote, self.proven, self.nonce)


def blank_image() -> LogImage:
    return LogImage(entries=[(NO_OP, FIRST_INDEX, 0)], term=0, vote=None, proven=False)


def image_records(image: LogImage) -> list[Record]:
    """The records that rebuild `image` from nothing."""
    anchor = image.entries[0]
    records: list[Record] = [AnchorRecord(anchor[1], anchor[2]), TermRecord(image.term, image.vote)]
    if image.proven:
        records.append(ProvenRecord())
    if image.nonce:
        records.append(NonceRecord(image.nonce))
    records.extend(EntryRecord(*entry) for entry in image.entries[1:])
    return records


def apply_record(image: LogImage, record: Record) -> None:
    """Replays one record. Raises StorageCorrupt where it cannot follow what came before."""
    match record:
        case EntryRecord():
            if record.index != image.last_index + 1 or record.term < image.last_term:
                raise StorageCorrupt(
                    f"entry {record.index} of term {record.term} cannot follow "
                    f"entry {image.last_index} of term {image.last_term}"
                )
            image.entries.append((record.command, record.index, record.term))
        case TermRecord():
            if record.term < image.term:
                raise StorageCorrupt(f"term went back from {image.term} to {record.term}")
            image.term, image.vote = record.term, record.vote
        case TruncateRecord():
            keep = record.first_removed - image.anchor_index
            if not 1 <= keep <= len(image.entries):
                raise StorageCorrupt(f"truncation at {record.first_removed} is outside the log")
            del image.entries[keep:]
        case AnchorRecord():
            image.entries = [(NO_OP, record.index, record.term)]
        case ProvenRecord():
            image.proven = True
        case NonceRecord():
            image.nonce = record.nonce


class AppendRecords(msgspec.Struct, frozen=True):
    """Append one batch to the log file and make it durable."""

    records: list[Record]


class StoreSnapshot(msgspec.Struct, frozen=True):
    """Make the snapshot durable under its own name; the log is not touched."""

    snapshot: Snapshot


class RewriteLog(msgspec.Struct, frozen=True):
    """Replace the log file by a new one with exactly this content, atomically."""

    image: LogImage


DiskOp = AppendRecords | StoreSnapshot | RewriteLog


class RaftLog:
    """Entries, term and vote of one node. Positions count from the anchor, indexes are absolute."""

    def __init__(self, image: LogImage) -> None:
        self._image = image
        self._ops: list[DiskOp] = []
        self._pending: list[Record] = []
        self.payload_bytes = sum(len(entry[0]) for entry in image.entries)

    @property
    def entries(self) -> list[Entry]:
        return self._image.entries

    @property
    def anchor_index(self) -> int:
        return self._image.entries[0][1]

    @property
    def last_index(self) -> int:
        return self._image.entries[-1][1]

    @property
    def last_term(self) -> int:
        return self._image.entries[-1][2]

    @property
    def term(self) -> int:
        return self._image.term

    @property
    def vote(self) -> str | None:
        return self._image.vote

    @property
    def proven(self) -> bool:
        return self._image.proven

    @property
    def nonce(self) -> int:
        return self._image.nonce

    @property
    def blank(self) -> bool:
        """Nothing was ever appended, and no snapshot stands behind the anchor."""
        return self.last_index == FIRST_INDEX

    def term_at(self, index: int) -> int | None:
        """Term of the entry, or None outside the log."""
        position = index - self.anchor_index
        if 0 <= position < len(self._image.entries):
            return self._image.entries[position][2]
        return None

    def slice(self, first: int, limit_bytes: int, limit_entries: int) -> list[Entry]:
        """Entries from index `first`, at least one, until a limit is reached."""
        start = first - self.anchor_index
        entries = self._image.entries[start : start + limit_entries]
        size_bytes = 0
        for count, entry in enumerate(entries):
            size_bytes += len(entry[0])
            if size_bytes > limit_bytes and count > 0:
                return entries[:count]
        return entries

    def append(self, command: bytes, index: int, term: int) -> None:
        if index != self.last_index + 1 or term < self.last_term:
            raise SafetyViolation(
                f"append of {index}/{term} behind {self.last_index}/{self.last_term}"
            )
        self._image.entries.append((command, index, term))
        self.payload_bytes += len(command)
        self._pending.append(EntryRecord(command, index, term))

    def truncate_from(self, index: int) -> None:
        """Removes the entry `index` and all behind it."""
        position = index - self.anchor_index
        if position < 1:
            raise SafetyViolation(f"truncation at {index} reaches the anchor {self.anchor_index}")
        removed = self._image.entries[position:]
        if removed:
            del self._image.entries[position:]
            self.payload_bytes -= sum(len(entry[0]) for entry in removed)
            self._pending.append(TruncateRecord(index))

    def set_term(self, term: int, vote: str | None) -> None:
        if term < self.term:
            raise SafetyViolation(f"term would go back from {self.term} to {term}")
        if (term, vote) == (self.term, self.vote):
            return
        self._image.term, self._image.vote = term, vote
        self._pending.append(TermRecord(term, vote))

    def set_proven(self) -> None:
        if not self.proven:
            self._image.proven = True
            self._pending.append(ProvenRecord())

    def set_nonce(self, nonce: int) -> None:
        self._image.nonce = nonce
        self._pending.append(NonceRecord(nonce))

    def compact(self, snapshot: Snapshot, anchor_index: int) -> None:
        """Drops the entries below `anchor_index`, once `snapshot` (which covers them) is durable."""
        position = anchor_index - self.anchor_index
        if not 0 <= position < len(self._image.entries) or anchor_index > snapshot.index:
            raise SafetyViolation(f"compaction to {anchor_index} is outside snapshot or log")
        removed = self._image.entries[:position]
        _, index, term = self._image.entries[position]
        self._image.entries = [(NO_OP, index, term), *self._image.entries[position + 1 :]]
        self.payload_bytes -= sum(len(entry[0]) for entry in removed)
        self._replace(snapshot)

    def reset_to(self, snapshot: Snapshot) -> None:
        """The log becomes the position of `snapshot` and nothing else."""
        self._image.entries = [(NO_OP, snapshot.index, snapshot.term)]
        self.payload_bytes = 0
        self._replace(snapshot)

    def _replace(self, snapshot: Snapshot) -> None:
        self._flush_pending()
        self._ops.append(StoreSnapshot(snapshot))
        self._ops.append(RewriteLog(self._image.copy()))

    def _flush_pending(self) -> None:
        if self._pending:
            self._ops.append(AppendRecords(self._pending))
            self._pending = []

    def take_ops(self) -> list[DiskOp]:
        """What must be on disk, in this order, before anything of this turn may leave the node."""
        self._flush_pending()
        ops, self._ops = self._ops, []
        return ops
