"""Targets: what workers, forkserver and stores hand to an agent, and the positions that clients hand back."""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from types import UnionType
from typing import Any, Final

import msgspec
from blake3 import blake3

from distroml.errors import UNDECODABLE, InvalidRequest
from distroml.reports import DataCursor
from distroml.runtime import control
from distroml.runtime.checkpoint.manifest import (
    Manifest,
    ReferredRecord,
    ShardRecord,
    decode_manifest,
    encode_manifest,
)
from distroml.runtime.checkpoint.shard_file import (
    LENGTH,
    BytesEntry,
    Packed,
    ShardNote,
    TensorBytes,
    TensorRecord,
    encode_header,
    parse_safetensors_header,
    size_of,
)
from distroml.runtime.control import MetricRecord
from distroml.runtime.replicas.arriving import Arriving, Differs
from distroml.runtime.replicas.wire import File
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
    """Refused by ValueError, or a manifest of which every piece of every tensor lies within its file, on no other."""
    found = caught(decode_manifest, data, ValueError)
    if found is None:
        return
    again = decode_manifest(encode_manifest(found))
    assert encode_manifest(again) == encode_manifest(found)
    files = {file.file: file for file in found.files}
    assert not any(".." in name or name.startswith("/") for name in files)
    taken: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
    for tensor in found.tensors:
        content = 0
        for piece in tensor.pieces():
            assert files[tensor.file].header_bytes <= piece.offset
            assert piece.offset + piece.length <= files[tensor.file].size_bytes
            assert piece.begin == content
            assert piece.content_bytes <= 65_536 * piece.length
            content += piece.content_bytes
            taken[tensor.file].append((piece.offset, piece.offset + piece.length))
        assert content == size_of(tensor.dtype, tensor.shape)
    for ranges in taken.values():
        ranges.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def _manifests() -> list[bytes]:
    shards = tuple(
        ShardRecord(
            rank=rank,
            file=f"worker_{rank}.safetensors",
            size_bytes=900,
            header_bytes=64,
            header_sha256="ab" * 32,
        )
        for rank in range(2)
    )
    referred = ReferredRecord(
        rank=0,
        file="ckpt_step_00000003/worker_0.g2.safetensors",
        size_bytes=700,
        header_bytes=64,
        header_sha256="ab" * 32,
    )
    plain = {"dtype": "F32", "offset": 100, "length": 24, "blake3": ("cd" * 32,)}
    tensors = (
        TensorRecord(name="w", shape=(2, 3), file=shards[0].file, **plain),
        TensorRecord(name="b", shape=(6,), file=shards[1].file, **plain),
        TensorRecord(name="f", shape=(6,), file=referred.file, **plain),
        TensorRecord(
            name="z",
            dtype="F32",
            shape=(100,),
            file=shards[1].file,
            offset=124,
            length=30,
            blake3=("ef" * 32,),
            codec="zstd",
            frames=(30,),
            content_blake3=("cd" * 32,),
        ),
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
        referred=(referred,),
        tensors=tensors,
    )
    bomb = msgspec.structs.replace(tensors[3], shape=(2**22,))
    hostile = msgspec.structs.replace(made, tensors=(*tensors[:3], bomb))
    return [encode_manifest(made), msgspec.json.encode(made), msgspec.json.encode(hostile)]


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


def _tensors_elsewhere() -> tuple[TensorRecord, ...]:
    return (
        TensorRecord(
            name="f",
            dtype="F32",
            shape=(6,),
            file="ckpt_step_00000003/worker_0.safetensors",
            offset=100,
            length=24,
            blake3=("cd" * 32,),
        ),
    )


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
        digests={tensor.name: ("ab" * 32,) * bool(tensor.size_bytes) for tensor in tensors},
        values={"loss": 0.5},
    )
    packed = Packed("zstd", "F32", (100,), (30,), ("cd" * 32,))
    delta = msgspec.structs.replace(
        note,
        digests={"z": ("ab" * 32,)},
        packed={"z": packed},
        references=_tensors_elsewhere(),
    )
    return [
        encode_header(tensors, note),
        encode_header([], msgspec.structs.replace(note, digests={})),
        encode_header([BytesEntry("z", 30)], delta),
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


def _whole_shard() -> bytes:
    data = bytes(range(26))
    tensors = [
        TensorBytes("w", "F32", (2, 3), memoryview(data[:24])),
        TensorBytes("s", "BF16", (), memoryview(data[24:])),
    ]
    digests = {one.name: (blake3(one.data).hexdigest(),) for one in tensors}
    note = ShardNote(
        job_id="j", run_id="r", step=5, cursor=_CURSOR, rank=0, world_size=1,
        strategy="data_parallel", backend="gloo", digests=digests,
    )  # fmt: skip
    return encode_header(tensors, note) + data


_SHARD: Final = _whole_shard()
_SHARD_HEADER: Final = _SHARD[:-26]


def arriving_shard(data: bytes) -> None:
    """Of all that another node may send for a file, only the file itself is taken."""
    path = "j/r/checkpoints/ckpt_step_00000005/worker_0.safetensors"
    file = File(path, sha256(_SHARD_HEADER).hexdigest(), len(_SHARD))
    arriving, taken = Arriving(file, len(_SHARD)), b""
    for piece in pieces(data):
        taken += piece
        try:
            arriving.feed(piece)
        except Differs:
            assert taken != _SHARD[: len(taken)]
            begin = arriving.rewind()
            assert taken[:begin] == _SHARD[:begin]
            arriving.feed(_SHARD[begin:])
            assert arriving.whole
            return
        assert len(taken) <= len(_SHARD)
    assert arriving.whole == (taken == _SHARD)


TARGETS: Final = (
    Target("from_worker", from_worker, lambda: _frames(control.FromWorker)),
    Target("to_worker", to_worker, lambda: _frames(control.ToWorker), 1),
    Target("from_forkserver", from_forkserver, lambda: _frames(control.FromForkserver), 1),
    Target("spawn", spawn, lambda: _frames(control.Spawn), 1),
    Target("manifest", manifest, _manifests, 4),
    Target("shard_header", shard_header, _shard_headers, 1),
    Target("shard_header_body", shard_header_body, lambda: [h[8:] for h in _shard_headers()], 2),
    Target("arriving_shard", arriving_shard, lambda: [b"\x3f" + _SHARD, b"\x05" + _SHARD]),
    Target("history_segment", history_segment, _segments, 1),
    Target("history_record", history_record, lambda: encoded(MetricRecord, 20), 2),
    Target("history_cursor", history_cursor, _cursors),
)
