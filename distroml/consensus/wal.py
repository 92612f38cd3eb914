"""The write-ahead log: one file of checksummed batches that holds entries, term and vote.

A *segment* file is a header, then batches; one batch is what one turn had to make durable, written
and fdatasynced as a whole. Compaction writes a new segment that starts from the kept window and
renames it into place, so the highest segment is always complete by itself and older ones are rubbish.
A start does the same with what it replays: what a killed process wrote may be in the page cache only,
and after a failed fsync even a later one would not bring those pages to the disk.

Replay tells a crash from damage: batch n+1 is only ever written after batch n was synced. So a bad
batch with no good batch behind it is an unfinished write that nobody was promised: it is cut off
and reported. A bad batch with a good one behind it had been promised: replay refuses.

The checksum of a batch covers a random number of its segment and its sequence number, so bytes left
over from an earlier file or attempt can not pass for a batch.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final

import msgspec

from distroml.consensus.disk import Disk, write_atomically
from distroml.consensus.raft_log import (
    AnchorRecord,
    LogImage,
    Record,
    apply_record,
    blank_image,
    image_records,
)
from distroml.consensus.raft_types import StorageCorrupt
from distroml.errors import UNDECODABLE

FORMAT: Final = 1
_MAGIC: Final = b"DMLWAL\x00\x01"
_BATCH_MAGIC: Final = b"\xd1BT\x9e"
_HEADER_LENGTHS: Final = struct.Struct("<II")
_BATCH: Final = struct.Struct("<4sQQI")
"""magic, sequence, payload length, CRC-32: 64-bit numbers, so no size limit hides here."""
_MAX_HEADER_BYTES: Final = 64 * 1024
_SEARCH_SHARE: Final = 8
"""Bytes checksummed in search of an intact batch behind a bad one, in lengths of the file; by accident it is less than one."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[Record]] = msgspec.msgpack.Decoder(list[Record])


class Identity(msgspec.Struct, frozen=True):
    """Whose log this is; a data directory of another node or cluster is refused."""

    cluster_id: str
    name: str
    voters: tuple[str, ...] = ()
    """In order; empty on a learner, and where an older version wrote the log."""


class _Header(msgspec.Struct, frozen=True):
    format: int
    identity: Identity
    number: int
    salt: Annotated[int, msgspec.Meta(ge=0)]


class Replayed(msgspec.Struct):
    image: LogImage
    batches: int
    good_bytes: int
    """Length of the valid part of the segment."""
    cut_bytes: int
    """Length of the unfinished write behind it."""


def segment_name(number: int) -> str:
    return f"log-{number:016d}.wal"


def segment_number(name: str) -> int | None:
    digits = name.removeprefix("log-").removesuffix(".wal")
    return int(digits) if name == f"log-{digits}.wal" and digits.isdigit() else None


def _checksum(salt: int, sequence: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QQQ", salt, sequence, len(payload))))


def encode_batch(salt: int, sequence: int, records: list[Record]) -> bytes:
    payload = _encoder.encode(records)
    checksum = _checksum(salt, sequence, payload)
    return _BATCH.pack(_BATCH_MAGIC, sequence, len(payload), checksum) + payload


def encode_segment(identity: Identity, number: int, salt: int, image: LogImage) -> bytes:
    """A whole new segment whose first batch rebuilds `image`."""
    header = _encoder.encode(_Header(FORMAT, identity, number, salt))
    lengths = _HEADER_LENGTHS.pack(len(header), zlib.crc32(header))
    return b"".join((_MAGIC, lengths, header, encode_batch(salt, 0, image_records(image))))


def replay(content: bytes, where: str, identity: Identity) -> Replayed:
    """Rebuilds the log from a segment's bytes.

    Raises StorageCorrupt, naming `where` and the offset, for damage that a crash cannot explain.
    """
    header, start = _decode_header(content, where)
    owner = header.identity
    if (owner.cluster_id, owner.name) != (identity.cluster_id, identity.name):
        raise StorageCorrupt(
            f"{where} belongs to node {owner.name!r} of cluster {owner.cluster_id!r}, not to node "
            f"{identity.name!r} of cluster {identity.cluster_id!r}; give each node its own data directory"
        )
    refuse_other_voters(owner.voters, identity, where)
    image, offset, sequence = blank_image(), start, 0
    while (batch := _batch_at(content, offset, header.salt, sequence)) is not None:
        payload, end = batch
        try:
            records = _decoder.decode(payload)
            if sequence == 0 and not (records and isinstance(records[0], AnchorRecord)):
                raise StorageCorrupt("the segment does not begin with an anchor")
            for record in records:
                apply_record(image, record)
        except (*UNDECODABLE, StorageCorrupt) as error:
            raise _damage(where, offset, f"batch {sequence} is unreadable: {error}") from error
        offset, sequence = end, sequence + 1
    if sequence == 0:
        raise _damage(where, offset, "its first batch is damaged")
    later = _later_batch(content, offset + 1, header.salt, sequence)
    if later is not None:
        raise _damage(where, offset, f"batch {sequence} is damaged, {later}")
    return Replayed(image, sequence, offset, len(content) - offset)


def refuse_other_voters(recorded: Iterable[str], identity: Identity, where: str) -> None:
    """Raises StorageCorrupt where a voter's log was written under other voters; nothing recorded suits all.

    Majorities of two voter sets need not meet: each could elect a leader and acknowledge without the other.
    """
    before, now = sorted(recorded), list(identity.voters)
    if before and now and before != now:
        raise StorageCorrupt(
            f"{where} is of a cluster with the voters {', '.join(before)}, but this node was given the "
            f"voters {', '.join(now)}. The voters of a cluster are fixed when it is founded: list the "
            "former in --peers again. Further hosts join as learners (--join); for other voters, found "
            "a cluster with empty data directories under another --cluster-id"
        )


def _damage(where: str, offset: int, what: str) -> StorageCorrupt:
    return StorageCorrupt(
        f"{where} is damaged at byte {offset}: {what}. These records had been acknowledged, so this "
        "node must not vote on what is left. Restore the file, or move the node's whole raft "
        "directory away: the node then starts empty and catches up from the others before it votes"
    )


def _decode_header(content: bytes, where: str) -> tuple[_Header, int]:
    prefix = len(_MAGIC) + _HEADER_LENGTHS.size
    if len(content) < prefix or not content.startswith(_MAGIC):
        raise _damage(where, 0, "it is not a log segment")
    length, checksum = _HEADER_LENGTHS.unpack_from(content, len(_MAGIC))
    raw = content[prefix : prefix + min(length, _MAX_HEADER_BYTES)]
    if len(raw) != length or zlib.crc32(raw) != checksum:
        raise _damage(where, 0, "its header is damaged")
    try:
        header = msgspec.msgpack.decode(raw, type=_Header)
    except UNDECODABLE as error:
        raise _damage(where, 0, f"its header is unreadable: {error}") from error
    if header.format != FORMAT:
        raise StorageCorrupt(f"{where} has format {header.format}; this program reads {FORMAT}")
    return header, prefix + length


def _batch_at(
    content: bytes, offset: int, salt: int, sequence: int | None
) -> tuple[bytes, int] | None:
    """(payload, end) of the intact batch at `offset`, or None."""
    if len(content) - offset < _BATCH.size:
        return None
    magic, found, length, checksum = _BATCH.unpack_from(content, offset)
    start = offset + _BATCH.size
    if magic != _BATCH_MAGIC or length > len(content) - start:
        return None
    if sequence is not None and found != sequence:
        return None
    payload = content[start : start + length]
    if _checksum(salt, found, payload) != checksum:
        return None
    return payload, start + length


def _later_batch(content: bytes, offset: int, salt: int, sequence: int) -> str | None:
    """What speaks for an intact batch behind a bad one, which no unfinished write can leave there."""
    left_bytes = _SEARCH_SHARE * len(content)
    while (offset := content.find(_BATCH_MAGIC, offset)) >= 0:
        if left_bytes < 0:
            # Bytes that were made to look like batches could keep us here for hours: refuse, never guess.
            return "and what follows looks like a batch in too many places to be searched"
        if _batch_at(content, offset, salt, None) is not None:
            found: int = _BATCH.unpack_from(content, offset)[1]
            if found >= sequence:
                return "yet an intact one follows"
        if len(content) - offset >= _BATCH.size:
            length: int = _BATCH.unpack_from(content, offset)[2]
            left_bytes -= length if length <= len(content) - offset else 0
        offset += 1
    return None


class Wal:
    """The open segment of one node. Blocking; used by one thread at a time."""

    def __init__(self, directory: Path, identity: Identity, disk: Disk) -> None:
        self._directory = directory
        self.identity = identity
        self._disk = disk
        self._number = 0
        self._salt = 0
        self._sequence = 0
        self._good_bytes = 0
        self._descriptor: int | None = None
        self._clean = True

    def open(self) -> tuple[LogImage, int] | None:
        """Replays the newest segment: (image, bytes of an unfinished write), or None if there is none.

        `rewrite` must come next: nothing is ever appended to a segment of an earlier process.
        """
        numbers = [segment_number(name) for name in self._disk.names(self._directory)]
        found = sorted(number for number in numbers if number is not None)
        if not found:
            return None
        self._number = found[-1]
        path = self._path
        replayed = replay(self._disk.read(path), str(path), self.identity)
        return replayed.image, replayed.cut_bytes

    def append(self, records: list[Record]) -> None:
        """Makes one batch durable. After an OSError nothing of it counts; call again to retry."""
        assert self._sequence > 0, "rewrite comes first"
        self._make_clean()
        content = encode_batch(self._salt, self._sequence, records)
        descriptor = self._open_descriptor()
        self._clean = False
        self._disk.write(descriptor, content)
        self._disk.sync(descriptor)
        self._clean = True
        self._good_bytes += len(content)
        self._sequence += 1

    def rewrite(self, image: LogImage) -> None:
        """Replaces the log by `image` in a new segment. After an OSError the old one still holds."""
        number = self._number + 1
        salt = int.from_bytes(os.urandom(8), "little")
        content = encode_segment(self.identity, number, salt, image)
        write_atomically(self._disk, self._directory / segment_name(number), content)
        self._close_descriptor()
        self._number, self._salt, self._sequence = number, salt, 1
        self._good_bytes, self._clean = len(content), True
        self._remove_older()

    def close(self) -> None:
        self._close_descriptor()

    @property
    def _path(self) -> Path:
        return self._directory / segment_name(self._number)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            self._descriptor = self._disk.open_append(self._path)
        return self._descriptor

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            self._disk.close(descriptor)

    def _make_clean(self) -> None:
        """Cuts what a failed or unfinished write left behind the last good batch.

        The file is reopened too: after a failed fsync the kernel may have dropped the pages, and
        reports the error only once per descriptor. The retry writes the same bytes afresh.
        """
        if self._clean:
            return
        self._close_descriptor()
        descriptor = self._open_descriptor()
        self._disk.truncate(descriptor, self._good_bytes)
        self._disk.sync(descriptor)
        self._clean = True

    def _remove_older(self) -> None:
        for name in self._disk.names(self._directory):
            number = segment_number(name)
            stale = number is not None and number < self._number
            if stale or (name.startswith("log-") and name.endswith(".tmp")):
                self._disk.remove(self._directory / name)
