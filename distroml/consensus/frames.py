"""What two nodes say on a connection: addresses, frames and the handshake. Pure.

A frame is a 4-byte big-endian body length, one channel byte, and the body; where a cluster key
protects the link, a tag follows (`authentication.py`). Channel 0 belongs to the link itself and
carries the handshake and pings; the others belong to whoever subscribed.

The handshake has three messages, so that both sides can prove a shared secret over fresh numbers of
both: dialer `Hello` → acceptor `Welcome` (with its proof) → dialer `Confirm` (with its own).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Final

import msgspec

PROTOCOL_VERSION: Final = 2
LINK_CHANNEL: Final = 0
NONCE_BYTES: Final = 32
_HEADER: Final = struct.Struct(">IB")
HEADER_BYTES: Final = _HEADER.size
MAX_HANDSHAKE_BYTES: Final = 4 * 1024
"""Before a peer is known it may send only this much."""

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
DigestBytes = Annotated[bytes, msgspec.Meta(max_length=64)]
Counter = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Channel(enum.IntEnum):
    """Who a frame is for. RAFT, PROPOSE and BARRIER travel on the control lane, the others on the bulk lane."""

    RAFT = 1
    PROPOSE = 2
    REPORT = 3
    STORE = 4
    BARRIER = 5
    COPIES = 6


class Lane(enum.IntEnum):
    """One TCP connection per lane and direction: bulk can not stand in the way of Raft."""

    CONTROL = 0
    BULK = 1


LANE_OF: Final[dict[int, Lane]] = {
    Channel.RAFT: Lane.CONTROL,
    Channel.PROPOSE: Lane.CONTROL,
    Channel.REPORT: Lane.BULK,
    Channel.STORE: Lane.BULK,
    Channel.BARRIER: Lane.CONTROL,
    Channel.COPIES: Lane.BULK,
}


class Address(msgspec.Struct, frozen=True):
    """Where a node listens. `host` is a name, an IPv4 or a bare IPv6 address."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `host:port` or `[ipv6]:port`. Raises ValueError that names what is wrong."""
        host, colon, port = text.strip().rpartition(":")
        hint = f"address {text!r} is not host:port, such as 127.0.0.1:7101 or [::1]:7101"
        if not colon or not host:
            raise ValueError(hint)
        if host.startswith("[") != host.endswith("]"):
            raise ValueError(f"{hint}: the brackets do not match")
        if host.startswith("["):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{hint}: put an IPv6 address in brackets")
        if not host or any(character.isspace() or character in "[]/" for character in host):
            raise ValueError(f"{hint}: the host is not usable")
        if not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
            raise ValueError(f"{hint}: the port must be a number from 0 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class LinkLimits(msgspec.Struct, frozen=True, kw_only=True):
    frame_bytes: int = 4 * 1024 * 1024
    """Body of one frame. A peer that announces more is disconnected."""
    control_queue_bytes: int = 16 * 1024 * 1024
    """Unsent bytes per peer on the control lane; what does not fit is dropped and counted."""
    bulk_queue_bytes: int = 32 * 1024 * 1024
    connect_timeout_s: float = 2.0
    handshake_timeout_s: float = 2.0
    backoff_min_s: float = 0.05
    backoff_max_s: float = 1.0
    ping_s: float = 1.0
    """A connection on which nothing was sent for this long carries a ping; no two such times pass in silence."""
    idle_timeout_s: float = 5.0
    """Silence after which a connection counts as dead, whatever TCP believes."""
    frame_timeout_s: float = 30.0
    """In which a whole frame must arrive; trickling bytes alone are no sign of life."""
    pending_handshakes: int = 1024
    """Accepted connections that have not yet said who they are. All learners may dial at once, on both lanes."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    version: Counter
    cluster_id: Text
    name: Text
    target: Text
    """Whom the dialer believes to have reached."""
    incarnation: Counter
    epoch: Counter
    """Grows with each connection that this process dials, so that an older one can be told."""
    lane: Lane
    nonce: Nonce
    learner_at: Text | None = None
    """Address at which a learner listens; None: the dialer is one of the known peers."""
    voters: DigestBytes = b""
    """A voter's `voters_digest`; empty from a learner, which need not know them all."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=2):
    version: Counter
    name: Text
    incarnation: Counter
    nonce: Nonce
    proof: DigestBytes


class Confirm(msgspec.Struct, frozen=True, array_like=True, tag=3):
    proof: DigestBytes


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=4):
    reason: Text


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=5):
    pass


LinkMessage = Hello | Welcome | Confirm | Refused | Ping
TagOf = Callable[[bytes, bytes], bytes]
"""The tag of the next frame of one direction, from its header and body."""
_decoder: msgspec.msgpack.Decoder[LinkMessage] = msgspec.msgpack.Decoder(LinkMessage)


class BadFrame(ValueError):
    """Bytes on a connection that no correct peer sends. `reason` is a counter's name."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def encode_frame(channel: int, body: bytes) -> bytes:
    return _HEADER.pack(len(body), channel) + body


def encode_tagged_frame(channel: int, body: bytes, tag_of: TagOf) -> bytes:
    header = _HEADER.pack(len(body), channel)
    return b"".join((header, body, tag_of(header, body)))


def encode_link_message(message: LinkMessage) -> bytes:
    return encode_frame(LINK_CHANNEL, msgspec.msgpack.encode(message))


def decode_link_message(body: bytes) -> LinkMessage:
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFrame("garbage", f"not a handshake message: {error}") from error


class FrameReader:
    """Cuts a byte stream into frames. `limit_bytes` may be raised once the peer is known."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._tag_of: TagOf | None = None
        self._tag_bytes = 0

    def expect_tags(self, tag_of: TagOf, tag_bytes: int) -> None:
        """From the next frame on each must carry its tag."""
        self._tag_of = tag_of
        self._tag_bytes = tag_bytes

    @property
    def partial(self) -> bool:
        """Whether the stream so far ends within a frame."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Cuts each (channel, body) completed by `data` when it is asked for.

        What follows a handshake message in the same bytes is thus read by the rules that the
        message has set. Raises BadFrame for an oversize frame and for one whose tag is wrong.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER_BYTES:
                length, channel = _HEADER.unpack_from(buffer, start)
                if length > self.limit_bytes:
                    raise BadFrame("oversize", f"a frame announces {length} bytes")
                end = start + HEADER_BYTES + length
                if len(buffer) < end + self._tag_bytes:
                    break
                body = bytes(buffer[start + HEADER_BYTES : end])
                if self._tag_of is not None:
                    self._check_tag(bytes(buffer[start : start + HEADER_BYTES]), body, end)
                start = end + self._tag_bytes
                yield channel, body
        finally:
            del buffer[:start]

    def _check_tag(self, header: bytes, body: bytes, end: int) -> None:
        assert self._tag_of is not None
        tag = bytes(self._buffer[end : end + self._tag_bytes])
        if not hmac.compare_digest(tag, self._tag_of(header, body)):
            raise BadFrame("tampered", "a frame's tag is wrong: someone else wrote or changed it")


def transcript(hello: Hello, welcome: Welcome) -> bytes:
    """What both sides prove knowledge over: every field of both, the acceptor's proof excepted."""
    unproved = msgspec.structs.replace(welcome, proof=b"")
    return msgspec.msgpack.encode((hello, unproved))


def voters_digest(voters: Iterable[str]) -> bytes:
    """The same on all nodes that were given the same voters, and on no other."""
    return hashlib.sha256(msgspec.msgpack.encode(sorted(voters))).digest()


def hello_refusal(
    hello: Hello, *, name: str, cluster_id: str, peers: frozenset[str], voters: bytes
) -> str | None:
    """Why a dialer is not let in, as a counter's name, or None.

    `peers`: who may dial, learners aside. `voters`: as in this node's own hello.
    """
    if hello.version != PROTOCOL_VERSION:
        return "version"
    if hello.cluster_id != cluster_id:
        return "cluster"
    if hello.learner_at and (hello.name in peers or hello.name == name):
        return "name_taken"
    if hello.name not in peers and not hello.learner_at:
        return "unknown_peer"
    if hello.target != name:
        return "wrong_target"
    if voters and not hello.learner_at and hello.voters != voters:
        return "other_voters"
    return None


def welcome_refusal(welcome: Welcome, *, expected: str) -> str | None:
    """Why a dialer does not stay, as a counter's name, or None."""
    if welcome.version != PROTOCOL_VERSION:
        return "version"
    if welcome.name != expected:
        return "wrong_target"
    return None
