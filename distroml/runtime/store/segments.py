"""The files of one stream: frames of records, and the names of segment files.

A segment is a file of frames; a frame is a header (payload length, CRC, sequence of its first record, number
of records) and the MessagePack array of its records. Sequence numbers are in the frames and in the file's name,
so that no file needs another one to be understood. Functions here are pure except ``write_at``.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from distroml.errors import UNDECODABLE
from distroml.runtime.store.records import ID_PATTERN, KINDS, Kind, StreamKey

FRAME_BYTES = 64 * 1024
"""Payload after which the next record starts a new frame."""
MAX_PAYLOAD_BYTES = 4 * FRAME_BYTES
_HEADER = struct.Struct(">IIQI")
_ID = ID_PATTERN.removeprefix("^").removesuffix(r"\Z")
_NAME = re.compile(
    rf"(?P<kind>{'|'.join(KINDS)})\.(?P<run>{_ID})\.(?P<generation>\d{{1,10}})"
    r"\.(?P<rank>\d{1,5})\.(?P<first>\d{20})\.seg\Z"
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[bytes])


class Segment(Struct, frozen=True):
    """One file of a stream; ``size_bytes`` of it are whole frames."""

    first_seq: int
    size_bytes: int


class Frame(Struct, frozen=True):
    """Where one frame lies in its segment; ``payload`` is the undecoded array of its records."""

    first_seq: int
    count: int
    offset: int
    end: int
    payload: memoryview


def segment_name(key: StreamKey, first_seq: int) -> str:
    """File name of the segment of ``key`` that starts with record ``first_seq``."""
    return f"{key.kind}.{key.run_id}.{key.generation}.{key.rank}.{first_seq:020d}.seg"


def parse_name(job_id: str, name: str) -> tuple[StreamKey, int] | None:
    """Inverse of ``segment_name``; None for a file that is not a segment."""
    match = _NAME.match(name)
    if match is None:
        return None
    kind: Kind = "logs" if match["kind"] == "logs" else "metrics"
    key = StreamKey(job_id, match["run"], int(match["generation"]), int(match["rank"]), kind)
    return key, int(match["first"])


def encode_frames(first_seq: int, records: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield ``(number of records, frame)`` that together hold ``records``."""
    start = 0
    while start < len(records):
        end, size = start, 0
        while end < len(records) and (end == start or size + len(records[end]) <= FRAME_BYTES):
            size += len(records[end])
            end += 1
        payload = _encoder.encode(list(records[start:end]))
        header = _HEADER.pack(len(payload), 0, first_seq + start, end - start)
        checksum = zlib.crc32(payload, zlib.crc32(header))
        yield (
            end - start,
            _HEADER.pack(len(payload), checksum, first_seq + start, end - start) + payload,
        )
        start = end


def frames(data: bytes, first_seq: int, base: int = 0) -> Iterator[Frame]:
    """Yield the whole, contiguous frames of ``data``, which begins at a frame boundary.

    Stops silently at the first byte that is not a good frame that continues at ``first_seq``: a torn tail.

    Args:
        base: offset of ``data`` within its segment, added to the offsets of the frames.
    """
    view, offset = memoryview(data), 0
    while offset + _HEADER.size <= len(data):
        length, checksum, first, count = _HEADER.unpack_from(data, offset)
        body = offset + _HEADER.size
        end = body + length
        if first != first_seq or not count or length > MAX_PAYLOAD_BYTES or end > len(data):
            return
        header = _HEADER.pack(length, 0, first, count)
        if zlib.crc32(view[body:end], zlib.crc32(header)) != checksum:
            return
        yield Frame(first, count, base + offset, base + end, view[body:end])
        first_seq, offset = first_seq + count, end


def records_of(frame: Frame) -> list[bytes]:
    """The records of a frame whose checksum was good; [] if its count does not match (never written so)."""
    try:
        records = _decoder.decode(frame.payload)
    except UNDECODABLE:
        return []
    return records if len(records) == frame.count else []


def scan(path: Path, first_seq: int) -> tuple[int, int]:
    """``(next sequence, bytes of whole frames)`` of a segment file."""
    next_seq, size = first_seq, 0
    for frame in frames(path.read_bytes(), first_seq):
        next_seq, size = frame.first_seq + frame.count, frame.end
    return next_seq, size


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Make ``data`` the content of ``path`` from ``offset`` on; creates the file, not its directory.

    What a failed earlier attempt left behind ``offset`` is cut, so a retry never mixes with it.

    Raises:
        OSError: the disk is full or broken; the file may hold a torn frame behind ``offset``.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(handle, offset)
        view = memoryview(data)
        while view:
            written = os.pwrite(handle, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(handle)
