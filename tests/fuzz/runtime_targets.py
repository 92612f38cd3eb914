"""Targets: what workers, forkserver and stores hand to an agent, and the positions that clients hand back."""

from __future__ import annotations

from types import UnionType
from typing import Any, Final

import msgspec

from distroml.errors import UNDECODABLE, InvalidRequest
from distroml.reports import DataCursor
from distroml.runtime import control
from distroml.runtime.checkpoint.manifest import (
    Manifest,
    ShardRecord,
    TensorRecord,
    decode_manifest,
    encode_manifest,
)
from distroml.runtime.checkpoint.shard_file import (
    LENGTH,
    ShardNote,
    TensorBytes,
    encode_header,
    parse_safetensors_header,
)
from distroml.runtime.control import MetricRecord
from distroml.runtime.store import records, segments
from distroml.runtime.store.cursors import Position, parse_token
from distroml.runtime.store.records import StreamKey
from tests.fuzz.link_targets import pieces
from tests.fuzz.target import Target, caught
from tests.fuzz.typed import encoded

# --- the worker's wire -----------------------------------------------------------------------------------------


def _read_control(kind: Any, data: bytes) -> None:
    """However the stream is cut, the messages are the same; what waits is never more than one frame."""
    reader: control.FrameReader[Any] = control.FrameReader(kind)
    found: list[Any] = []
    try:
        for piece in pieces(data):
            found += reader.feed(piece)
            assert len(reader._buffer) < control.HEADER.size + control.MAX_FRAME_BYTES
    except UNDECODABLE:
        return
    at_once: control.FrameReader[Any] = control.FrameReader(kind)
    assert _plain(at_once.feed(data[1:])) == _plain(found)
    for message in found:
        (again,) = control.FrameReader(kind).feed(control.encode_frame(message))
        assert _plain(again) == _plain(message)


def _plain(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)  # equal also where a number is NaN


def from_worker(data: bytes) -> None:
    _read_control(control.FromWorker, data)


def to_worker(data: bytes) -> None:
    _read_control(control.ToWorker, data)


def from_forkserver(data: bytes) -> None:
    _read_control(control.FromForkserver, data)


def spawn(data: bytes) -> None:
    _read_control(control.Spawn, data)


def _frames(kind: type | UnionType) -> list[bytes]:
    bodies = encoded(kind, 8)
    framed = [control.HEADER.pack(len(body)) + body for body in bodies]
    return [b"\x3f" + one for one in framed] + [b"\x05" + b"".join(framed[:3])]


# --- checkpoints -----------------------------------------------------------------------------------------------

_CURSOR: Final = DataCursor(epoch=1, batch=2)


def manifest(data: bytes) -> None:
    """Refused by ValueError, or a manifest of which every tensor lies within its file."""
    found = caught(decode_manifest, data, ValueError)
    if found is None:
        return
    again = decode_manifest(encode_manifest(found))
    assert encode_manifest(again) == encode_manifest(found)
    sizes = {shard.file: shard.size_bytes for shard in found.shards}
    assert all(size >= 0 for size in sizes.values())
    for tensor in found.tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.length <= sizes[tensor.file]
        assert all(dimension >= 0 for dimension in tensor.shape)


def _manifests() -> list[bytes]:
    shards = tuple(
        ShardRecord(rank=rank, file=f"worker_{rank}.safetensors", size_bytes=900, sha256="ab" * 32)
        for rank in range(2)
    )
    tensors = tuple(
        TensorRecord(
            name=name,
            dtype="F32",
            shape=shape,
            file=shards[rank].file,
            offset=100,
            length=24,
            sha256="cd" * 32,
        )
        for name, shape, rank in (("w", (2, 3), 0), ("b", (6,), 1))
    )
    made = Manifest(
        job_id="job-1",
        run_id="run-1",
        generation=1,
        step=5,
        epoch=1,
        cursor=_CURSOR,
        world_size=2,
        strategy="data_parallel",
        backend="gloo",
        has_optimizer=False,
        values={"loss": 0.5, "deep": {"list": [1, None, "x"]}},
        shards=shards,
        tensors=tensors,
    )
    return [encode_manifest(made), msgspec.json.encode(made)]


def shard_header(data: bytes) -> None:
    """Refused by ValueError, or tensors that lie one behind the other in a file of the told size."""
    found = caught(parse_safetensors_header, data, ValueError)
    if found is None:
        return
    end = LENGTH.size + LENGTH.unpack_from(data)[0]
    for place in found.tensors:
        assert place.offset == end
        assert place.length >= 0
        assert all(dimension >= 0 for dimension in place.shape)
        end += place.length
    assert end == found.file_bytes


def shard_header_body(data: bytes) -> None:
    """The same with a right length in front, so that more of it is read."""
    shard_header(LENGTH.pack(len(data)) + data)


def _shard_headers() -> list[bytes]:
    tensors = [
        TensorBytes("w", "F32", (2, 3), memoryview(bytes(24))),
        TensorBytes("e", "I64", (0,), memoryview(b"")),
        TensorBytes("s", "BF16", (), memoryview(bytes(2))),
    ]
    note = ShardNote(
        job_id="job-1",
        run_id="run-1",
        step=5,
        cursor=_CURSOR,
        rank=0,
        world_size=1,
        strategy="data_parallel",
        backend="gloo",
        digests={tensor.name: "ab" * 32 for tensor in tensors},
        values={"loss": 0.5},
    )
    return [
        encode_header(tensors, note),
        encode_header([], msgspec.structs.replace(note, digests={})),
    ]


# --- history ---------------------------------------------------------------------------------------------------


def history_segment(data: bytes) -> None:
    """Any file: whole frames that follow each other, and nothing is raised."""
    next_seq, end = 0, 0
    for frame in segments.frames(data, 0):
        assert (frame.first_seq, frame.offset) == (next_seq, end)
        assert frame.count > 0
        assert end < frame.end <= len(data)
        next_seq, end = frame.first_seq + frame.count, frame.end
        for record in segments.records_of(frame):
            history_record(record)


def history_record(data: bytes) -> None:
    caught(records.decode_metric, data, UNDECODABLE)
    caught(records.decode_log, data, UNDECODABLE)
    for kind in records.KINDS:
        assert isinstance(records.record_time(kind, data), float)


def _segments() -> list[bytes]:
    metric = records.encode_metric(MetricRecord(step=1, epoch=0, at=1.5, values={"loss": 0.25}))
    lines = [records.encode_log(float(at), f"line {at}") for at in range(5)]
    two = [frame for _, frame in segments.encode_frames(0, [metric, *lines])]
    return [
        b"".join(two),
        b"".join(frame for _, frame in segments.encode_frames(0, lines)) + two[0],
    ]


def history_cursor(data: bytes) -> None:
    """A client's cursor: refused by InvalidRequest, or a position whose own token is a cursor again."""
    position = caught(
        lambda text: parse_token(text, "job-1"), data.decode("latin-1"), InvalidRequest
    )  # type: ignore[arg-type]
    if position is not None:
        assert parse_token(position.token(), "job-1") == position
        position.fold({})


def _cursors() -> list[bytes]:
    position = Position("job-1")
    made = [position.token()]
    for generation in range(7):
        for kind in records.KINDS:
            key = StreamKey("job-1", "run-1", generation, generation % 3, kind)
            position.advance(key, 10 * generation + 1)
        made.append(position.token())
    position.fold({})
    return [token.encode() for token in [*made, position.token()]]


TARGETS: Final = (
    Target("from_worker", from_worker, lambda: _frames(control.FromWorker)),
    Target("to_worker", to_worker, lambda: _frames(control.ToWorker), 1),
    Target("from_forkserver", from_forkserver, lambda: _frames(control.FromForkserver), 1),
    Target("spawn", spawn, lambda: _frames(control.Spawn), 1),
    Target("manifest", manifest, _manifests, 4),
    Target("shard_header", shard_header, _shard_headers, 1),
    Target("shard_header_body", shard_header_body, lambda: [h[8:] for h in _shard_headers()], 2),
    Target("history_segment", history_segment, _segments, 1),
    Target("history_record", history_record, lambda: encoded(MetricRecord, 20), 2),
    Target("history_cursor", history_cursor, _cursors),
)
