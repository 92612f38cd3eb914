"""Targets: all that reads bytes of a connection between nodes, from the stream up to a decoded message."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from distroml.consensus import messages
from distroml.consensus.authentication import TAG_BYTES, FrameTags, LinkSecurity
from distroml.consensus.connections import Inbound, Outbound
from distroml.consensus.frames import (
    HEADER_BYTES,
    LINK_CHANNEL,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    BadFrame,
    Confirm,
    FrameReader,
    LinkMessage,
    Ping,
    Refused,
    Welcome,
    decode_link_message,
    encode_frame,
    encode_link_message,
    encode_tagged_frame,
)
from distroml.errors import UNDECODABLE
from distroml.reports import NodeReport
from distroml.runtime.observations import Observations
from distroml.runtime.replicas import wire
from distroml.runtime.store import sync
from tests.consensus.memory_links import WITH_KEY, End, Memory, Wire
from tests.fuzz.target import Target, caught
from tests.fuzz.typed import encoded

ANSWERS_BYTES: Final = 4 * 1024
"""What a stranger may make a node say on one connection, at most."""
_HELLO: Final = Wire().hello()
_WELCOME: Final = Welcome(PROTOCOL_VERSION, "b", 3, b"w" * NONCE_BYTES, b"")


def pieces(data: bytes) -> Iterator[bytes]:
    """The bytes in pieces, as a network may hand them over: the first byte chooses the size, the rest is the stream."""
    size = (data[0] % 64 + 1) * (1 + len(data) // 512) if data else 1
    for start in range(1, len(data), size):
        yield data[start : start + size]


# --- frames ----------------------------------------------------------------------------------------------------


def frame_reader(data: bytes) -> None:
    """However the stream is cut, the frames are the same; what waits is never more than one frame."""
    reader, found, refused = FrameReader(MAX_HANDSHAKE_BYTES), [], False
    for piece in pieces(data):
        try:
            for frame in reader.feed(piece):
                found.append(frame)
        except BadFrame:
            refused = True
            break
        assert len(reader._buffer) < HEADER_BYTES + MAX_HANDSHAKE_BYTES
    expected, oversize = _frames_of(data[1:])
    assert refused == oversize
    assert found == expected
    assert refused or reader.partial == bool(_rest(data[1:], expected))


def _frames_of(stream: bytes) -> tuple[list[tuple[int, bytes]], bool]:
    """The frames by the format's description, and whether an oversize one follows them."""
    frames, at = [], 0
    while len(stream) - at >= 5:
        length, channel = struct.unpack_from(">IB", stream, at)
        if length > MAX_HANDSHAKE_BYTES:
            return frames, True
        if len(stream) - at - 5 < length:
            break
        frames.append((channel, stream[at + 5 : at + 5 + length]))
        at += 5 + length
    return frames, False


def _rest(stream: bytes, frames: list[tuple[int, bytes]]) -> bytes:
    return stream[sum(5 + len(body) for _, body in frames) :]


def _streams() -> list[bytes]:
    bodies = [b"", b"x", b"ping" * 9, bytes(300), bytes(MAX_HANDSHAKE_BYTES)]
    frames = [encode_frame(channel, body) for channel, body in enumerate(bodies)]
    return [bytes([size]) + b"".join(frames[:4]) for size in (0, 3, 4, 63)] + [
        b"\x20" + frames[4],
        b"\x00" + struct.pack(">IB", MAX_HANDSHAKE_BYTES + 1, 1),
    ]


_TAG_KEY: Final = bytes(range(32))
_SENT: Final = ((1, b"first"), (2, b""), (1, b"third" * 20), (3, b"first"))


def tagged_frames(data: bytes) -> None:
    """Without the key nobody makes a frame that is taken: only what was sent arrives, in its order."""
    reader, found = FrameReader(MAX_HANDSHAKE_BYTES), []
    reader.expect_tags(FrameTags(_TAG_KEY).next, TAG_BYTES)
    for piece in pieces(data):
        try:
            for frame in reader.feed(piece):
                found.append(frame)
        except BadFrame:
            break
    assert found == list(_SENT[: len(found)])


def _tagged_streams() -> list[bytes]:
    tag_of = FrameTags(_TAG_KEY).next
    frames = [encode_tagged_frame(channel, body, tag_of) for channel, body in _SENT]
    whole = b"".join(frames)
    return [b"\x00" + whole, b"\x07" + whole, b"\x3f" + frames[0] + frames[2] + frames[1]]


# --- the handshake ---------------------------------------------------------------------------------------------


class _StillLoop:
    """The little of an event loop that a connection asks for, with its timers standing still."""

    class _Timer:
        def cancel(self) -> None: ...

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()  # futures want a real one

    def time(self) -> float:
        return 0.0

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def call_later(self, *_: object) -> _Timer:
        return self._Timer()


_LOOP: Final = _StillLoop()


@contextmanager
def _in_loop() -> Iterator[None]:
    asyncio._set_running_loop(_LOOP)  # type: ignore[arg-type]
    try:
        yield
    finally:
        asyncio._set_running_loop(None)


def _stranger_speaks(connection: Inbound | Outbound, data: bytes) -> None:
    transport = Memory()
    connection.connection_made(transport)
    for piece in pieces(data):
        if transport.closed:
            break
        was_established = connection.established
        connection.data_received(piece)
        limit = connection._reader.limit_bytes
        assert len(connection._reader._buffer) < HEADER_BYTES + limit + TAG_BYTES
        assert was_established or connection.established or limit == MAX_HANDSHAKE_BYTES
    connection.eof_received()
    connection.connection_lost(None)
    assert sum(map(len, transport.written)) <= ANSWERS_BYTES
    refusals = connection.owner.refusals - {"refused_truncated"}  # type: ignore[attr-defined]
    assert transport.closed or not refusals


def inbound(data: bytes) -> None:
    """Whatever a dialer says: it is let in by a right Hello and Confirm or not at all, and never breaks anything."""
    owner = End("b", LinkSecurity())
    with _in_loop():
        connection = Inbound(owner)  # type: ignore[arg-type]
        _stranger_speaks(connection, data)
    assert not owner.delivered or owner.established
    if owner.established:
        hello = connection.hello
        assert hello is not None
        assert (hello.cluster_id, hello.target) == ("test", "b")
        assert hello.learner_at or (hello.name, hello.voters) == ("a", _HELLO.voters)


def inbound_with_key(data: bytes) -> None:
    """Nobody who lacks the key is let in, nor heard."""
    owner = End("b", WITH_KEY)
    with _in_loop():
        _stranger_speaks(Inbound(owner), data)  # type: ignore[arg-type]
    assert not owner.established
    assert not owner.delivered


def outbound(data: bytes) -> None:
    """Whatever an acceptor answers: the dialer stays only with whom it meant."""
    _dial(data, LinkSecurity())


def outbound_with_key(data: bytes) -> None:
    """An acceptor that lacks the key gets nothing but the Hello."""
    assert not _dial(data, WITH_KEY)


def _dial(data: bytes, security: LinkSecurity) -> bool:
    owner = End("a", security)
    with _in_loop():
        connection = Outbound(owner, _HELLO)  # type: ignore[arg-type]
        _stranger_speaks(connection, data)
    ready = connection.ready.result()
    assert ready == connection.established
    return ready


def _dialers() -> list[bytes]:
    spoken: list[list[LinkMessage]] = [
        [_HELLO, Confirm(b"")],
        [_HELLO, Confirm(b""), Ping()],
        [_HELLO, Confirm(bytes(32))],
        [_HELLO, _HELLO],
        [msgspec.structs.replace(_HELLO, learner_at="h:1", name="z")],
        [_HELLO, Refused("wrong_key")],
        [Confirm(b"")],
        [_WELCOME],
    ]
    opened = [b"".join(map(encode_link_message, said)) for said in spoken]
    opened[1] += encode_frame(1, b"raft") + encode_frame(3, bytes(5000)) + encode_frame(9, b"")
    return [bytes([size]) + said for said in opened for size in (0, 31)]


def _acceptors() -> list[bytes]:
    spoken: list[list[LinkMessage]] = [
        [_WELCOME],
        [_WELCOME, Refused("stale_epoch")],
        [_WELCOME, _WELCOME],
        [msgspec.structs.replace(_WELCOME, proof=bytes(32))],
        [Refused("cluster")],
        [Ping()],
    ]
    return [b"\x1f" + b"".join(map(encode_link_message, said)) for said in spoken]


def link_message(data: bytes) -> None:
    """Refused by BadFrame, or read as it was written, with names and numbers within their limits."""
    message = caught(decode_link_message, data, BadFrame)
    if message is not None:
        (channel, body), *more = FrameReader(2**20).feed(encode_link_message(message))
        assert (channel, more) == (LINK_CHANNEL, [])
        assert decode_link_message(body) == message


# --- what frames carry -----------------------------------------------------------------------------------------


def raft_message(data: bytes) -> None:
    """Refused by BadMessage, or a message whose numbers can be counted on, and which is written as it was read."""
    message = caught(messages.decode, data, messages.BadMessage)
    if message is None:
        return
    assert messages.decode(messages.encode(message)) == message
    if isinstance(message, messages.Append):
        indexes = [index for _, index, _ in message.entries]
        assert indexes == list(range(message.prev_index + 1, message.prev_index + 1 + len(indexes)))
        terms = [message.prev_term, *(term for _, _, term in message.entries)]
        assert terms == sorted(terms)
        assert not message.entries or terms[-1] <= message.term
    if isinstance(message, messages.SnapshotChunk):
        assert message.offset + len(message.data) <= message.size_bytes


def _raft_messages() -> list[bytes]:
    entries = [(b"\x00x", 5, 2), (b"\x01", 6, 3)]
    return [*encoded(messages.Message, 4), messages.encode(messages.Append(3, 4, 2, 4, entries))]


def node_report(data: bytes) -> None:
    """Reports are taken from the node they speak of, or from a voter that passes them on; nothing is raised."""
    seen = Observations(name="a", monotonic=lambda: 1.0, relays=frozenset({"b"}))
    reports = seen.receive("b", data).reports
    for report in reports:
        assert report.node != "a"
    newest = {report.node: report for report in reports}
    for name, report in newest.items():
        assert seen.report(name) is report
        again = msgspec.msgpack.encode(report)
        assert not seen.receive("b", again).reports, "the same report is not news"


def _reports() -> list[bytes]:
    rng = random.Random(2)
    made = encoded(NodeReport, 30)
    named = [msgspec.msgpack.decode(one, type=NodeReport) for one in made]
    return made + [
        msgspec.msgpack.encode(msgspec.structs.replace(one, node=rng.choice("abc")))
        for one in named
    ]


def history_message(data: bytes) -> None:
    message = caught(sync.decode, data, UNDECODABLE)
    if message is not None:
        assert sync.encode(sync.decode(sync.encode(message))) == sync.encode(message)


_SHARD: Final = wire.File("j/r/checkpoints/ckpt_step_00000010/worker_0.safetensors", "a" * 64, 700)
_MANIFEST: Final = wire.File("j/r/checkpoints/ckpt_step_00000010/manifest.g2.json", "b" * 64)


def copies_message(data: bytes) -> None:
    """No file outside of a checkpoint's directory can be named to be fetched, shown or dropped."""
    message = caught(wire.decode, data, (ValueError,))
    if message is None:
        return
    assert wire.encode(wire.decode(wire.encode(message))) == wire.encode(message)
    match message:
        case wire.Have(files=files):
            named = files
        case wire.Keep(file=file) | wire.Doubt(file=file):
            named = (file,)
        case _:
            named = ()
    for file in named:
        job, run, checkpoints, step, _ = file.path.split("/")
        assert checkpoints == "checkpoints"
        assert step.startswith("ckpt_step_")
        assert not {job, run} & {"", ".", ".."}
        assert file.size_bytes is not None or not file.is_shard


def _copies_messages() -> list[bytes]:
    made = (
        wire.Have(1, (_SHARD, _MANIFEST)),
        wire.Keep(2, _SHARD, ("a", "b")),
        wire.Keep(2, _MANIFEST, ()),
        wire.Doubt(_SHARD),
        wire.Read(3, _SHARD.path, 0, 4096),
        wire.Part(3, b"data", 700),
        wire.List(4, "", _SHARD.path),
    )
    return [wire.encode(one) for one in made] + encoded(wire.Message, 4)


TARGETS: Final = (
    Target("frame_reader", frame_reader, _streams, 1),
    Target("tagged_frames", tagged_frames, _tagged_streams, 1),
    Target("inbound", inbound, _dialers),
    Target("inbound_with_key", inbound_with_key, _dialers, 1),
    Target("outbound", outbound, _acceptors),
    Target("outbound_with_key", outbound_with_key, _acceptors, 1),
    Target("link_message", link_message, lambda: encoded(LinkMessage, 8)),
    Target("raft_message", raft_message, _raft_messages, 4),
    Target("node_report", node_report, _reports, 4),
    Target("history_message", history_message, lambda: encoded(sync.Message, 6)),
    Target("copies_message", copies_message, _copies_messages, 2),
)
