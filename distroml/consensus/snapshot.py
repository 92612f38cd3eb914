"""Snapshots of the state machine: their file format, and how they travel to a follower.

A snapshot is named by (index, term, sha256). A stream of chunks is bound to that name and to byte
offsets, so chunks of two snapshots, or of two attempts, can never be joined; nothing is handed to
the state machine before the whole has the announced hash.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Final

import msgspec

from distroml.consensus.messages import SnapshotChunk
from distroml.consensus.raft_types import MAX_SNAPSHOT_BYTES, StorageCorrupt
from distroml.errors import UNDECODABLE

FORMAT: Final = 1
_MAGIC: Final = b"DMLSNAP\x01"
_LENGTHS: Final = struct.Struct("<II")
_MAX_HEADER_BYTES: Final = 64 * 1024
STALL_S: Final = 0.5
"""Without progress for this long, the chunks in flight are taken for lost and sent again."""
ABANDONED_S: Final = 5.0
"""A transfer without progress for this long no longer keeps entries from being compacted."""


class Snapshot(msgspec.Struct, frozen=True):
    """The state after entry `index`. `voters` is the static configuration it was taken under."""

    index: int
    term: int
    voters: list[str]
    sha256: bytes
    blob: bytes

    @classmethod
    def take(cls, index: int, term: int, voters: list[str], blob: bytes) -> Snapshot:
        if len(blob) > MAX_SNAPSHOT_BYTES:
            raise ValueError(
                f"the state machine's snapshot has {len(blob)} bytes; "
                f"the limit is {MAX_SNAPSHOT_BYTES} bytes"
            )
        return cls(index, term, voters, hashlib.sha256(blob).digest(), blob)


class _Header(msgspec.Struct, frozen=True):
    format: int
    index: int
    term: int
    voters: list[str]
    sha256: bytes
    size_bytes: int


def encode_file(snapshot: Snapshot) -> bytes:
    header = msgspec.msgpack.encode(
        _Header(
            FORMAT,
            snapshot.index,
            snapshot.term,
            snapshot.voters,
            snapshot.sha256,
            len(snapshot.blob),
        )
    )
    lengths = _LENGTHS.pack(len(header), zlib.crc32(header))
    return b"".join((_MAGIC, lengths, header, snapshot.blob))


def decode_file(content: bytes, where: str) -> Snapshot:
    """Raises StorageCorrupt, naming `where`, unless every byte is as it was written."""
    prefix = len(_MAGIC) + _LENGTHS.size
    if len(content) < prefix or not content.startswith(_MAGIC):
        raise StorageCorrupt(f"{where} is not a snapshot file")
    length, checksum = _LENGTHS.unpack_from(content, len(_MAGIC))
    raw = content[prefix : prefix + min(length, _MAX_HEADER_BYTES)]
    if len(raw) != length or zlib.crc32(raw) != checksum:
        raise StorageCorrupt(f"{where} has a damaged header")
    try:
        header = msgspec.msgpack.decode(raw, type=_Header)
    except UNDECODABLE as error:
        raise StorageCorrupt(f"{where} has an unreadable header: {error}") from error
    if header.format != FORMAT:
        raise StorageCorrupt(f"{where} has format {header.format}; this program reads {FORMAT}")
    blob = content[prefix + length :]
    if len(blob) != header.size_bytes or hashlib.sha256(blob).digest() != header.sha256:
        raise StorageCorrupt(f"{where} is damaged: its content does not have the recorded hash")
    return Snapshot(header.index, header.term, header.voters, header.sha256, blob)


class OutgoingSnapshot:
    """The leader's side of one transfer to one follower: go-back-N with a window of chunks."""

    def __init__(
        self, snapshot: Snapshot, chunk_bytes: int, window_chunks: int, now: float
    ) -> None:
        self.snapshot = snapshot
        self._chunk_bytes = chunk_bytes
        self._window_chunks = window_chunks
        self._acked = 0
        self._sent = 0
        self._patient = False
        self._progress_at = self._rewound_at = now

    def acknowledged(self, next_offset: int, now: float) -> None:
        """The follower wants the byte `next_offset` next.

        Wanting the same byte once more means that this chunk is lost; that is believed once until there
        is progress, for each chunk behind the lost one is answered so. Where the follower lost what it
        had, or refused the whole, sending again waits until the transfer counts as stalled: a follower
        that can not use the snapshot must not be flooded with it.
        """
        next_offset = min(next_offset, len(self.snapshot.blob))
        repeated, progress = next_offset == self._acked, next_offset > self._acked
        self._acked = next_offset
        self._sent = max(self._sent, next_offset)
        if progress:
            self._progress_at, self._patient = now, False
        elif repeated and not self._patient:
            self.rewind(now)
        else:
            self._patient = True

    def progressing(self, now: float) -> bool:
        """The follower took bytes of it lately."""
        return now - self._progress_at <= ABANDONED_S

    def rewind(self, now: float) -> None:
        """What was sent and not acknowledged is lost."""
        self._sent, self._rewound_at, self._patient = self._acked, now, True

    def rewind_if_stalled(self, now: float) -> None:
        if now - max(self._progress_at, self._rewound_at) > STALL_S:
            self.rewind(now)

    def next_chunk(self, term: int) -> SnapshotChunk | None:
        """The next chunk inside the window, or None."""
        blob, start = self.snapshot.blob, self._sent
        if start >= len(blob) or start - self._acked >= self._window_chunks * self._chunk_bytes:
            return None
        data = blob[start : start + self._chunk_bytes]
        self._sent = start + len(data)
        return self._chunk(term, start, data)

    def keepalive(self, term: int) -> SnapshotChunk:
        """A chunk without data: keeps the follower loyal, asks what it needs, ends an empty blob."""
        return self._chunk(term, min(self._sent, len(self.snapshot.blob)), b"")

    def _chunk(self, term: int, offset: int, data: bytes) -> SnapshotChunk:
        return SnapshotChunk(
            term=term,
            index=self.snapshot.index,
            snapshot_term=self.snapshot.term,
            sha256=self.snapshot.sha256,
            size_bytes=len(self.snapshot.blob),
            offset=offset,
            data=data,
        )


class IncomingSnapshot:
    """The follower's side: joins chunks of exactly one (index, term, hash)."""

    def __init__(self) -> None:
        self._name: tuple[int, int, bytes, int] | None = None
        self._parts = bytearray()
        self.refused = 0
        """Transfers whose joined bytes did not have the announced hash."""

    def receive(self, chunk: SnapshotChunk, voters: list[str]) -> Snapshot | None:
        """Takes a chunk; returns the snapshot once it is whole and has the announced hash."""
        name = (chunk.index, chunk.snapshot_term, chunk.sha256, chunk.size_bytes)
        if name != self._name:
            self._name, self._parts = name, bytearray()
        if chunk.offset == len(self._parts):
            self._parts += chunk.data
        if len(self._parts) < chunk.size_bytes:
            return None
        blob = bytes(self._parts)
        self.discard()
        if hashlib.sha256(blob).digest() != chunk.sha256:
            self.refused += 1
            return None
        return Snapshot(chunk.index, chunk.snapshot_term, voters, chunk.sha256, blob)

    @property
    def next_offset(self) -> int:
        return len(self._parts)

    def discard(self) -> None:
        self._name, self._parts = None, bytearray()
