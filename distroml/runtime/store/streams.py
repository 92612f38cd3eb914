"""One stream as a node holds it: what is accepted, what is written, and in which segments.

A record goes pending → in flight (in a write on the store's thread) → written. Only what is written is read,
announced and replicated: whatever another node or a client has seen survives SIGKILL of this process, so a
source that comes back never gives a sequence number twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distroml.runtime.store import segments
from distroml.runtime.store.records import MAX_RECORD_BYTES, StreamKey
from distroml.runtime.store.segments import Segment


@dataclass(frozen=True, slots=True)
class StreamWrite:
    """What the store's thread has to put on disk for one stream, and what is true once it is there."""

    stream: Stream
    writes: tuple[tuple[Path, int, bytes], ...]
    segments: tuple[Segment, ...]
    first_seq: int
    records: list[bytes]

    @property
    def added_bytes(self) -> int:
        return sum(len(data) for _, _, data in self.writes)


@dataclass(slots=True, eq=False)
class Stream:
    """State of one stream; made by ``open_stream`` or empty, changed only in the event loop."""

    key: StreamKey
    directory: Path
    segments: tuple[Segment, ...] = ()
    """Oldest first, contiguous; the last one is written to."""
    written: int = 0
    """Next sequence number on disk."""
    accepted: int = 0
    """Next sequence number wanted; ``accepted - written`` records are pending or in flight."""
    local: bool = False
    """Whether its records originate at this node."""
    pending: list[bytes] = field(default_factory=list)
    pending_bytes: int = 0
    in_flight: bool = False
    dead: bool = False
    """Its job was removed: nothing more is written."""
    unmarked: bool = False
    """The last segment is empty and its file may not exist yet; the file's name keeps ``written``."""
    hint: tuple[int, int, int] = (-1, -1, -1)
    """Sequence, segment's first sequence and offset where the last read ended."""

    @property
    def first_seq(self) -> int:
        """The oldest record still held (equal to ``written`` when there is none)."""
        return self.segments[0].first_seq if self.segments else self.written

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def dirty(self) -> bool:
        return bool(self.pending) or self.unmarked

    def path(self, segment: Segment) -> Path:
        return self.directory / segments.segment_name(self.key, segment.first_seq)

    def accept(self, first_seq: int, records: Sequence[bytes]) -> int:
        """Take those of ``records`` that come next; returns how many bytes that added."""
        skip = self.accepted - first_seq
        if skip < 0 or skip >= len(records):
            return 0
        fresh = records[skip:] if skip else records
        for record in fresh:
            if len(record) > MAX_RECORD_BYTES:
                raise ValueError(
                    f"a record of {len(record)} bytes for {self.key} is over {MAX_RECORD_BYTES}"
                )
        added = sum(map(len, fresh))
        self.pending.extend(fresh)
        self.pending_bytes += added
        self.accepted += len(fresh)
        return added

    def take(self, segment_bytes: int) -> StreamWrite:
        """Turn what is pending into writes; ``commit`` or ``abort`` must follow."""
        records, self.pending, self.pending_bytes = self.pending, [], 0
        held = list(self.segments) or [Segment(self.written, 0)]
        writes: list[tuple[Path, int, bytes]] = []
        if self.unmarked:
            writes.append((self.path(held[-1]), held[-1].size_bytes, b""))
        seq, chunk = self.written, bytearray()
        for count, frame in segments.encode_frames(self.written, records):
            if held[-1].size_bytes + len(chunk) >= segment_bytes:
                self._close_chunk(held, writes, chunk)
                held.append(Segment(seq, 0))
            chunk += frame
            seq += count
        self._close_chunk(held, writes, chunk)
        self.in_flight = True
        return StreamWrite(self, tuple(writes), tuple(held), self.written, records)

    def _close_chunk(
        self, held: list[Segment], writes: list[tuple[Path, int, bytes]], chunk: bytearray
    ) -> None:
        if chunk:
            last = held[-1]
            writes.append((self.path(last), last.size_bytes, bytes(chunk)))
            held[-1] = Segment(last.first_seq, last.size_bytes + len(chunk))
            chunk.clear()

    def commit(self, write: StreamWrite) -> None:
        """All of ``write`` is on disk."""
        self.in_flight = False
        self.unmarked = False
        self.segments = write.segments
        self.written = write.first_seq + len(write.records)

    def abort(self, write: StreamWrite) -> None:
        """The disk refused; the records wait for the next attempt at the same place."""
        self.in_flight = False
        self.pending = write.records + self.pending
        self.pending_bytes = sum(map(len, self.pending))

    def drop_through(self, first_seq: int) -> list[Path]:
        """Let go of all segments up to the one that starts at ``first_seq``; returns their files.

        When that is the last one, an empty segment remains, whose name remembers the next sequence.
        """
        dropped = [segment for segment in self.segments if segment.first_seq <= first_seq]
        kept = self.segments[len(dropped) :]
        if dropped and not kept:
            kept = (Segment(self.written, 0),)
            self.unmarked = True
        self.segments = kept
        return [self.path(segment) for segment in dropped if segment not in kept]

    def restart_at(self, seq: int) -> list[Path]:
        """Forget all that is held and continue with ``seq``; returns the files to remove."""
        gone = [self.path(segment) for segment in self.segments]
        self.segments = (Segment(seq, 0),)
        self.written = self.accepted = seq
        self.unmarked = True
        return gone

    def read(self, from_seq: int, max_bytes: int) -> tuple[list[bytes], Segment | None]:
        """Records from ``from_seq`` on, at least one if it is held, and a segment found damaged.

        Raises:
            OSError: a segment file cannot be read.
        """
        found: list[bytes] = []
        if not self.first_seq <= from_seq < self.written:
            return found, None
        starts = [segment.first_seq for segment in self.segments]
        index = bisect_right(starts, from_seq) - 1
        while index < len(self.segments) and max_bytes > 0:
            segment = self.segments[index]
            end = self.segments[index + 1].first_seq if index + 1 < len(starts) else self.written
            wanted = from_seq + len(found)
            try:
                records, whole = self._read_segment(segment, wanted, max_bytes)
            except FileNotFoundError:
                return found, segment
            found += records
            max_bytes -= sum(map(len, records))
            if not whole:
                return found, None
            if from_seq + len(found) < end:
                return found, segment
            index += 1
        return found, None

    def _read_segment(
        self, segment: Segment, from_seq: int, max_bytes: int
    ) -> tuple[list[bytes], bool]:
        """Records of one segment from ``from_seq`` on, and whether its end was reached."""
        seq, of_segment, offset = self.hint
        if of_segment != segment.first_seq or seq > from_seq:
            seq, offset = segment.first_seq, 0
        with self.path(segment).open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(segment.size_bytes - offset)
        found: list[bytes] = []
        for frame in segments.frames(data, seq, offset):
            if frame.first_seq + frame.count <= from_seq:
                continue
            records = segments.records_of(frame)
            if not records:
                break
            for record in records[max(0, from_seq - frame.first_seq) :]:
                if found and max_bytes < len(record):
                    self.hint = (frame.first_seq, segment.first_seq, frame.offset)
                    return found, False
                found.append(record)
                max_bytes -= len(record)
            self.hint = (frame.first_seq + frame.count, segment.first_seq, frame.end)
        return found, True


def open_stream(key: StreamKey, directory: Path, first_seqs: Sequence[int]) -> Stream:
    """Read a stream's state from its files: only the last segment is scanned, its torn tail cut.

    Raises:
        OSError: a file cannot be read or cut.
    """
    stream = Stream(key, directory)
    held: list[Segment] = []
    for first in sorted(first_seqs):
        try:
            size = stream.path(Segment(first, 0)).stat().st_size
        except FileNotFoundError:  # dropped, and removed while we look
            held.clear()
            continue
        held.append(Segment(first, size))
    if not held:
        return stream
    last = held[-1]
    path = stream.path(last)
    stream.written, size = segments.scan(path, last.first_seq)
    if size < last.size_bytes:
        with path.open("r+b") as file:
            file.truncate(size)
    held[-1] = Segment(last.first_seq, size)
    stream.segments = tuple(held)
    stream.accepted = stream.written
    return stream
