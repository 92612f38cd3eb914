"""The closed set of messages that Raft nodes exchange, as msgpack.

A message is decoded into one of these frozen shapes or refused; nothing on the wire can name a
type, a function or a file. Indexes and terms are bounded so that no arithmetic can overflow a
record on disk.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from distroml.consensus.raft_types import MAX_SNAPSHOT_BYTES

REGULAR: Final = b"\x00"
NO_OP: Final = b"\x01"
"""First byte of a log entry: the library's command types that we admit (membership and code
version changes are its types 2 and 3; they do not exist here)."""

Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=MAX_SNAPSHOT_BYTES)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Command = Annotated[bytes, msgspec.Meta(min_length=1)]
Entry = tuple[Command, Number, Number]
"""(command, index, term): the order that the library uses in its log."""


class PreVote(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Would you vote for me in `term`? Changes nobody's term (Raft dissertation, 9.6)."""

    term: Number
    last_index: Number
    last_term: Number
    founded: Number = 0
    """The nonce of the asked voter's directory in the entry that founded the cluster; 0 where that is unknown."""


class VoteReply(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Answer to PreVote, and the refusal of any vote. Carries the answerer's own term."""

    term: Number
    granted: bool
    current_term: Number
    unproven: Number = 0
    """The nonce of a directory that is not proven (see `proofs`); 0 where it is. So in all answers."""


class RequestVote(msgspec.Struct, frozen=True, array_like=True, tag=3):
    term: Number
    last_index: Number
    last_term: Number
    transfer: bool
    """The leader itself asked for this election, so loyalty to it is no ground to refuse."""
    founded: Number = 0


class VoteGranted(msgspec.Struct, frozen=True, array_like=True, tag=4):
    term: Number
    unproven: Number = 0


class Append(msgspec.Struct, frozen=True, array_like=True, tag=5):
    term: Number
    prev_index: Number
    prev_term: Number
    commit_index: Number
    entries: list[Entry]


class AppendReply(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """`accepted`: the follower's log equals the leader's below `next_index`, durably.

    Otherwise `next_index` is where the leader should try next."""

    term: Number
    accepted: bool
    next_index: Number
    unproven: Number = 0


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True, tag=7):
    term: Number
    index: Number
    snapshot_term: Number
    sha256: Digest
    size_bytes: Offset
    offset: Offset
    data: bytes


class SnapshotReply(msgspec.Struct, frozen=True, array_like=True, tag=8):
    term: Number
    index: Number
    sha256: Digest
    next_offset: Offset
    unproven: Number = 0


class TimeoutNow(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The leader asks its successor to campaign at once (Raft dissertation, 3.10)."""

    term: Number


class ReadProbe(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Am I still the leader of `term`? (ReadIndex, Raft dissertation, 6.4)."""

    term: Number
    nonce: Number


class ReadEcho(msgspec.Struct, frozen=True, array_like=True, tag=11):
    term: Number
    nonce: Number


class ReadRequest(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """A follower asks the leader for a read index."""

    token: Number


class ReadReply(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """`index` is 0 where the asked node does not lead."""

    token: Number
    index: Number


class TransferRequest(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Another voter asks the leader to hand leadership to `target`, or to whom it likes."""

    target: str | None


Message = (
    PreVote
    | VoteReply
    | RequestVote
    | VoteGranted
    | Append
    | AppendReply
    | SnapshotChunk
    | SnapshotReply
    | TimeoutNow
    | ReadProbe
    | ReadEcho
    | ReadRequest
    | ReadReply
    | TransferRequest
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class BadMessage(ValueError):
    """Bytes from a peer that are not one of the messages above."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """Raises BadMessage for anything that is not exactly one well-formed message."""
    try:
        message = _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadMessage(f"not a Raft message: {error}") from error
    if isinstance(message, Append):
        _check_entries(message)
    if isinstance(message, SnapshotChunk) and message.size_bytes < message.offset + len(
        message.data
    ):
        raise BadMessage("snapshot chunk reaches beyond the snapshot's size")
    return message


def _check_entries(message: Append) -> None:
    index, term = message.prev_index, message.prev_term
    for command, entry_index, entry_term in message.entries:
        if entry_index != index + 1 or not term <= entry_term <= message.term:
            raise BadMessage(f"entry {entry_index}/{entry_term} does not follow {index}/{term}")
        if command[:1] != REGULAR and command[:1] != NO_OP:
            raise BadMessage(f"entry {entry_index} has an unknown command type {command[0]}")
        index, term = entry_index, entry_term
