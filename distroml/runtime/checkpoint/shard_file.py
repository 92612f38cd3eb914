"""The bytes of a shard: a safetensors file whose metadata says what it belongs to.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length N, N bytes of JSON naming dtype,
shape and offsets of each tensor, then the data without gaps. Our metadata is one JSON string under the key
``distroml``. It leaves out the generation on purpose: a step that is trained again by a later generation gives
the same bytes, and then its shard is already there.

A tensor is cut into pieces of ``PIECE_BYTES``; each has a BLAKE3 hash in the header, and the header's own SHA-256 goes
into the manifest. So every byte is hashed exactly once, in parallel, and any tool can check any piece by itself. Of the
bulk a core hashes several times as much per second with BLAKE3 (O'Connor et al., 2020) as with SHA-256; for the small
rest there is the hash that every tool has. A compressed tensor is one Zstandard frame per piece; other tools see it as a
tensor of bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE
from distroml.reports import DataCursor

FORMAT = 3
METADATA_KEY = "distroml"
LENGTH = struct.Struct("<Q")
ALIGNMENT = 64
MAX_HEADER_BYTES = 64 * 1024 * 1024
PIECE_BYTES = 16 * 1024 * 1024
"""What is hashed, read, compressed and written as one; a multiple of every element's size."""
MAX_EXPANSION = 1 << 16
"""Bytes that one byte of a Zstandard frame may stand for; a piece of zeros has about 30,000."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of each dtype that a shard can hold."""


Size = Annotated[int, Meta(ge=0, le=2**62)]
Shape = Annotated[tuple[Size, ...], Meta(max_length=64)]
"""Dimensions as read from a file; bounded, since their product is taken."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Blake3 = Sha256
"""Of 256 bits too, and written alike."""
Codec = Literal["none", "zstd"]
SHARD_FILE = r"worker_\d{1,6}(\.g\d{1,12})?\.safetensors"
ShardFile = Annotated[str, Meta(pattern=rf"^{SHARD_FILE}\Z")]
Reference = Annotated[str, Meta(pattern=rf"^ckpt_step_\d{{8,12}}/{SHARD_FILE}\Z")]
"""A file of another checkpoint of the run, relative to the run's ``checkpoints`` directory."""
TensorName = Annotated[str, Meta(min_length=1, max_length=1024)]


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, or -1 where no shard holds such a dtype."""
    item_bytes = ITEM_BYTES.get(dtype)
    return -1 if item_bytes is None else item_bytes * prod(shape)


def cuts(length: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of ``length`` bytes."""
    for begin in range(0, length, PIECE_BYTES):
        yield begin, min(begin + PIECE_BYTES, length)


def piece_count(length: int) -> int:
    """How many pieces ``length`` bytes are."""
    return -(-length // PIECE_BYTES)


class TensorBytes(Struct, frozen=True):
    """One tensor as bytes, little-endian, row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def size_bytes(self) -> int:
        """Of ``data``."""
        return self.data.nbytes


class BytesEntry(Struct, frozen=True):
    """How a compressed tensor is listed in a shard: as one of bytes."""

    name: str
    size_bytes: int
    dtype: str = "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        """It has one dimension."""
        return (self.size_bytes,)


class Piece(Struct, frozen=True):
    """A part of a tensor that is read, verified and unpacked by itself."""

    offset: int
    """From the start of its file."""
    length: int
    """Bytes in the file."""
    begin: int
    """Where it belongs in the tensor."""
    content_bytes: int
    """Bytes of the tensor; more than ``length`` where it is compressed."""
    blake3: str
    """Of the bytes in the file."""


class TensorPlace(Struct, frozen=True, kw_only=True):
    """Where one tensor lies in its shard file, and what its bytes are."""

    name: TensorName
    dtype: str
    """As in safetensors: F32, BF16, I64, ..."""
    shape: Shape
    offset: Size
    """From the start of the file, in bytes."""
    length: Size
    """Bytes in the file."""
    blake3: tuple[Blake3, ...]
    """Of each piece, as it is in the file."""
    codec: Codec = "none"
    frames: tuple[Size, ...] = ()
    """Compressed: bytes of each piece in the file."""
    content_blake3: tuple[Blake3, ...] = ()
    """Compressed, and checkpoints are deltas: of each piece of the tensor itself."""

    @property
    def content(self) -> tuple[str, str, tuple[int, ...], tuple[str, ...]]:
        """What makes it the same tensor as another one."""
        digests = self.blake3 if self.codec == "none" else self.content_blake3
        return self.name, self.dtype, self.shape, digests

    def pieces(self) -> Iterator[Piece]:
        """Its pieces in order; for a place that ``check_place`` has passed."""
        at = self.offset
        size = size_of(self.dtype, self.shape)
        for number, (begin, end) in enumerate(cuts(size)):
            length = self.frames[number] if self.frames else end - begin
            yield Piece(at, length, begin, end - begin, self.blake3[number])
            at += length


class TensorRecord(TensorPlace, frozen=True, kw_only=True):
    """One tensor of a checkpoint and the file that has its bytes."""

    file: str
    """Of this checkpoint's directory, or (``Reference``) of an earlier one's."""


def check_place(place: TensorPlace) -> None:
    """Check that a place is consistent in itself; says nothing about the file that it is in.

    Raises:
        ValueError: it is not; names the tensor.
    """
    size = size_of(place.dtype, place.shape)
    if size < 0:
        raise ValueError(f"tensor '{place.name}' has a wrong size or type")
    if place.codec == "none":
        if place.length != size or place.frames or place.content_blake3:
            raise ValueError(f"tensor '{place.name}' has a wrong size or type")
    else:
        _check_frames(place, size)
    if len(place.blake3) != piece_count(size):
        raise ValueError(f"tensor '{place.name}' has {len(place.blake3)} hashes for {size} bytes")


def _check_frames(place: TensorPlace, size: int) -> None:
    name, frames = place.name, place.frames
    if len(frames) != piece_count(size) or sum(frames) != place.length:
        raise ValueError(f"tensor '{name}' has frames that do not add up to it")
    if len(place.content_blake3) not in (0, len(frames)):
        raise ValueError(f"tensor '{name}' has {len(place.content_blake3)} hashes of its content")
    for frame, (begin, end) in zip(frames, cuts(size), strict=True):
        if not (end - begin) / MAX_EXPANSION <= frame <= 2 * PIECE_BYTES:
            raise ValueError(f"tensor '{name}' claims {end - begin} bytes in a frame of {frame}")


class Packed(Struct, frozen=True):
    """What a compressed tensor is, which other tools see as bytes."""

    codec: Codec
    dtype: str
    shape: Shape
    frames: tuple[Size, ...]
    content_blake3: tuple[Blake3, ...] = ()


class ShardNote(Struct, frozen=True, kw_only=True):
    """What a shard says of itself."""

    format: int = FORMAT
    job_id: str
    run_id: str
    step: int
    cursor: DataCursor
    rank: int
    world_size: int
    strategy: str
    backend: str
    digests: dict[str, tuple[Blake3, ...]]
    """BLAKE3 of each tensor's pieces."""
    packed: dict[str, Packed] = {}
    """Its compressed tensors."""
    references: tuple[TensorRecord, ...] = ()
    """Tensors of this rank's share that did not change: in which earlier file they are."""
    values: dict[str, Any] | None = None
    """JSON-able state; in rank 0's shard only."""


class ShardHeader(Struct, frozen=True):
    """A shard's header, read and checked."""

    note: ShardNote
    tensors: tuple[TensorPlace, ...]
    """In the order of the file."""
    header_bytes: int
    """Where the data begin."""
    file_bytes: int
    """Size that the whole file must have."""
    sha256: str
    """Of the header."""


class _Entry(Struct, frozen=True):
    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


def encode_header(tensors: Sequence[TensorBytes | BytesEntry], note: ShardNote) -> bytes:
    """Everything that comes before the data of ``tensors``, which follow in this order.

    Its length depends on the digests' number only, not on their values.
    """
    header: dict[str, Any] = {
        "__metadata__": {METADATA_KEY: msgspec.json.encode(note, order="sorted").decode()}
    }
    at = 0
    for tensor in tensors:
        if tensor.name in header:
            raise ValueError(f"a shard cannot hold a tensor called '{tensor.name}' (twice)")
        end = at + tensor.size_bytes
        header[tensor.name] = _Entry(tensor.dtype, tensor.shape, (at, end))
        at = end
    body = msgspec.json.encode(header)
    body += b" " * (-(LENGTH.size + len(body)) % ALIGNMENT)
    if len(body) > MAX_HEADER_BYTES:
        raise ValueError(f"a shard's header of {len(body)} bytes is over {MAX_HEADER_BYTES}")
    return LENGTH.pack(len(body)) + body


def header_length(prefix: bytes) -> int:
    """Bytes of the whole header, told by the first ``LENGTH.size`` bytes of the file.

    Raises:
        ValueError: too short, or a length no shard has.
    """
    if len(prefix) < LENGTH.size:
        raise ValueError(f"the file has only {len(prefix)} bytes")
    length: int = LENGTH.unpack_from(prefix)[0]
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    return LENGTH.size + length


def parse_safetensors_header(data: bytes) -> ShardHeader:
    """Read the first ``header_length`` bytes of a shard.

    Raises:
        ValueError: it is not a header that ``encode_header`` could have written; says why.
    """
    size = header_length(data)
    if len(data) < size:
        raise ValueError(f"the header is cut: {len(data)} of {size} bytes")
    try:
        raw = _header_decoder.decode(data[LENGTH.size : size])
        metadata = _metadata_decoder.decode(raw.pop("__metadata__", b"{}"))
        told = metadata.get(METADATA_KEY, "")
        check_format(told.encode(), FORMAT, "shard format")
        note = _note_decoder.decode(told)
        entries = {name: _entry_decoder.decode(value) for name, value in raw.items()}
    except UNDECODABLE as error:
        raise ValueError(f"the header is not that of a shard: {error}") from None
    if set(entries) != set(note.digests):
        raise ValueError("the header's tensors and digests do not name the same tensors")
    if len({record.name for record in note.references} | set(entries)) != len(entries) + len(
        note.references
    ):
        raise ValueError("the header names a tensor twice")
    places, end = _places(entries, note, size)
    return ShardHeader(note, places, size, size + end, hashlib.sha256(data[:size]).hexdigest())


def _places(
    entries: Mapping[str, _Entry], note: ShardNote, size: int
) -> tuple[tuple[TensorPlace, ...], int]:
    places, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        if begin != end or stop - begin != size_of(entry.dtype, entry.shape):
            raise ValueError(f"tensor '{name}' has a wrong size, type or place")
        packed = note.packed.get(name)
        place = TensorPlace(
            name=name,
            dtype=packed.dtype if packed else entry.dtype,
            shape=packed.shape if packed else entry.shape,
            offset=size + begin,
            length=stop - begin,
            blake3=note.digests[name],
            codec=packed.codec if packed else "none",
            frames=packed.frames if packed else (),
            content_blake3=packed.content_blake3 if packed else (),
        )
        check_place(place)
        places.append(place)
        end = stop
    return tuple(places), end


class UnknownFormat(ValueError):
    """Of another version; says nothing against the bytes."""


class _Format(Struct, frozen=True):
    format: int


# Made here, once: threads read headers side by side, and two that first meet a Struct of Structs at the same time can crash in msgspec.
_header_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_metadata_decoder = msgspec.json.Decoder(dict[str, str])
_note_decoder = msgspec.json.Decoder(ShardNote)
_entry_decoder = msgspec.json.Decoder(_Entry)
_format_decoder = msgspec.json.Decoder(_Format)


def check_format(data: bytes, expected: int, what: str) -> None:
    """Check the field ``format`` before anything else of a JSON object is believed.

    Raises:
        UnknownFormat: it is another one.
        ValueError: the JSON is none; msgspec's errors are ValueErrors too.
        RecursionError: it is nested too deeply.
    """
    told = _format_decoder.decode(data).format
    if told != expected:
        raise UnknownFormat(f"{what} {told} is not known; this version reads {expected}")
