"""What nodes say to each other about history, and the pure decision of what to ask of whom.

Streams have one writer and no holes, so "I have n of S, you have m > n: send me n..m" is the whole protocol; every
message may be lost, doubled or late. ``replication`` sends and receives these, ``plan_pulls`` decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE
from distroml.runtime.store.records import MAX_RECORD_BYTES, Id, StreamKey

MAX_BODY_BYTES = 256 * 1024
"""Records in one message; a single record may lie above it, never above ``MAX_RECORD_BYTES`` more."""
MAX_DIGESTS = 128
MAX_SPANS = 1024
MAX_WANTS = 64
MAX_CHUNKS = 1024

Seq = Annotated[int, Meta(ge=0, le=2**62)]


class Span(Struct, frozen=True, array_like=True):
    """What a node holds of a stream: records ``first`` up to, not including, ``next``."""

    key: StreamKey
    first: Seq
    next: Seq


class Want(Struct, frozen=True, array_like=True):
    """Records of one stream are wanted from ``from_seq`` on."""

    key: StreamKey
    from_seq: Seq
    skip: bool = False
    """``from_seq`` is not what comes next: what lies before is given up (nobody has it)."""


class Chunk(Struct, frozen=True, array_like=True):
    """Records of one stream, and what the sender holds of it in all."""

    span: Span
    from_seq: Seq
    records: list[Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]]


class Digests(Struct, frozen=True, array_like=True, tag=1):
    """How much the sender has of some jobs, as one hash each."""

    jobs: Annotated[tuple[tuple[Id, bytes], ...], Meta(max_length=MAX_DIGESTS)]


class AskHeads(Struct, frozen=True, array_like=True, tag=2):
    """Tell the sender all heads of these jobs."""

    jobs: Annotated[tuple[Id, ...], Meta(max_length=MAX_DIGESTS)]
    digests: Annotated[tuple[bytes, ...], Meta(max_length=MAX_DIGESTS)] = ()
    """What the sender has of each, or nothing: where it is the same, no heads are wanted."""
    number: Seq = 0
    """Comes back with the answer."""


class Heads(Struct, frozen=True, array_like=True, tag=3):
    """What the sender holds of some streams."""

    spans: Annotated[tuple[Span, ...], Meta(max_length=MAX_SPANS)]
    complete: Annotated[tuple[Id, ...], Meta(max_length=MAX_DIGESTS)] = ()
    """Jobs of which it has told all by now."""
    number: Seq = 0
    """Of the question."""


class Pull(Struct, frozen=True, array_like=True, tag=4):
    """Send records; answered by one ``Records`` with the same number."""

    number: int
    wants: Annotated[tuple[Want, ...], Meta(max_length=MAX_WANTS)]


class Records(Struct, frozen=True, array_like=True, tag=5):
    """Records: the answer to a ``Pull``, or (number 0) what the sender has just written itself."""

    number: int
    chunks: Annotated[tuple[Chunk, ...], Meta(max_length=MAX_CHUNKS)]


class AskHeadsOf(Struct, frozen=True, array_like=True, tag=6):
    """The sender wants to know what is kept of its streams: tell it these heads."""

    keys: Annotated[tuple[StreamKey, ...], Meta(max_length=MAX_SPANS)]


Message = Digests | AskHeads | Heads | Pull | Records | AskHeadsOf

Undecodable = UNDECODABLE
"""Raised by ``decode``."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The body of a frame."""
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """Raises Undecodable for a body that is none of the messages."""
    return _decoder.decode(body)


class Offer(Struct, frozen=True):
    """A peer has told that it holds more of a stream than this node."""

    first: int
    next: int
    since: float
    """When it first did, in seconds of the caller's clock."""


def choose(
    wanted: int, offers: Mapping[str, Offer], skip_before: float
) -> tuple[str, int, bool] | None:
    """From whom to ask for a stream, from where, and whether that gives up older records.

    A peer that has what comes next is preferred, of those the one that has most. Only when all who have newer
    records have dropped what comes next, and one has said so since before ``skip_before``, are those records given up.

    Args:
        wanted: this node's next sequence number of the stream.
        offers: what each reachable peer said of it.
    """
    newer = {peer: offer for peer, offer in offers.items() if offer.next > wanted}
    whole = {peer: offer for peer, offer in newer.items() if offer.first <= wanted}
    if whole:
        return max(whole, key=lambda peer: (whole[peer].next, peer)), wanted, False
    told = {peer: offer for peer, offer in newer.items() if offer.since <= skip_before}
    if told:
        peer = min(told, key=lambda peer: (told[peer].first, peer))
        return peer, told[peer].first, True
    return None


def plan_pulls(
    mine: Mapping[StreamKey, int],
    offers: Mapping[str, Mapping[StreamKey, Offer]],
    in_flight: Collection[StreamKey],
    slots: Mapping[str, int],
    skip_before: float,
    first: Collection[str] = (),
) -> list[tuple[str, tuple[Want, ...]]]:
    """The pulls to send now: ``(peer, wants)``, never two at once for one stream.

    Args:
        mine: the next sequence number wanted of each stream that this node keeps; others are not asked for.
        slots: how many more pulls each reachable peer may have in flight.
        first: jobs that somebody waits for.
    """
    by_key: dict[StreamKey, dict[str, Offer]] = {}
    for peer in sorted(slots):
        for key, offer in offers.get(peer, {}).items():
            if key in mine and key not in in_flight:
                by_key.setdefault(key, {})[peer] = offer
    chosen: dict[str, list[Want]] = {}
    for key in sorted(by_key, key=lambda key: (key.job_id not in first, key)):
        if choice := choose(mine[key], by_key[key], skip_before):
            peer, from_seq, skip = choice
            chosen.setdefault(peer, []).append(Want(key, from_seq, skip))
    return [
        (peer, tuple(wants[start : start + MAX_WANTS]))
        for peer, wants in sorted(chosen.items())
        for start in range(0, min(len(wants), slots[peer] * MAX_WANTS), MAX_WANTS)
    ]


def differing(mine: Iterable[tuple[str, bytes]], theirs: Mapping[str, bytes]) -> tuple[str, ...]:
    """Jobs of which a peer's digest tells that it holds something else than this node."""
    own = dict(mine)
    return tuple(job_id for job_id, digest in theirs.items() if own.get(job_id, b"") != digest)
