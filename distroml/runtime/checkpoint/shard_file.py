"""The bytes of a shard: a safetensors file whose metadata says what it belongs to.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length N, N bytes of JSON naming dtype,
shape and offsets of each tensor, then the data without gaps. Our metadata is one JSON string under the key
``distroml``. It leaves out the generation on purpose: a step that is trained again by a later generation gives
the same bytes, and then its shard is already there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from distroml.errors import UNDECODABLE
from distroml.reports import DataCursor

FORMAT = 1
METADATA_KEY = "distroml"
LENGTH = struct.Struct("<Q")
ALIGNMENT = 8
MAX_HEADER_BYTES = 64 * 1024 * 1024

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of each dtype that a shard can hold."""


Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**62)], ...], Meta(max_length=64)]
"""Dimensions as read from a file; bounded, since their product is taken."""


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, or -1 where no shard holds such a dtype."""
    item_bytes = ITEM_BYTES.get(dtype)
    return -1 if item_bytes is None else item_bytes * prod(shape)


class TensorBytes(Struct, frozen=True):
    """One tensor as bytes, little-endian, row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


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
    digests: dict[str, str]
    """SHA-256 of each tensor's bytes."""
    values: dict[str, Any] | None = None
    """JSON-able state; in rank 0's shard only."""


class TensorPlace(Struct, frozen=True):
    """Where one tensor lies in its shard file; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class ShardHeader(Struct, frozen=True):
    """A shard's header, read and checked."""

    note: ShardNote
    tensors: tuple[TensorPlace, ...]
    file_bytes: int
    """Size that the whole file must have."""


class _Entry(Struct, frozen=True):
    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


def encode_header(tensors: Sequence[TensorBytes], note: ShardNote) -> bytes:
    """Everything that comes before the data of ``tensors``, which follow in this order."""
    header: dict[str, Any] = {
        "__metadata__": {METADATA_KEY: msgspec.json.encode(note, order="sorted").decode()}
    }
    at = 0
    for tensor in tensors:
        end = at + tensor.data.nbytes
        header[tensor.name] = _Entry(tensor.dtype, tensor.shape, (at, end))
        at = end
    body = msgspec.json.encode(header)
    body += b" " * (-len(body) % ALIGNMENT)
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
        raw = msgspec.json.decode(data[LENGTH.size : size], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        note = msgspec.json.decode(metadata.get(METADATA_KEY, ""), type=ShardNote)
        entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
    except UNDECODABLE as error:
        raise ValueError(f"the header is not that of a shard: {error}") from None
    if note.format != FORMAT:
        raise ValueError(f"shard format {note.format} is not known; this version reads {FORMAT}")
    if set(entries) != set(note.digests):
        raise ValueError("the header's tensors and digests do not name the same tensors")
    places, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        if begin != end or stop - begin != size_of(entry.dtype, entry.shape):
            raise ValueError(f"tensor '{name}' has a wrong size, type or place")
        places.append(TensorPlace(name, entry.dtype, entry.shape, size + begin, stop - begin))
        end = stop
    return ShardHeader(note, tuple(places), size + end)
