"""Whether a file is a certain shard, whole, told by that shard's header or by its hash alone.

For whoever has a shard without its checkpoint's manifest: a writer that finds one under its name, a node that keeps a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from blake3 import blake3

from distroml.runtime.checkpoint.shard_file import (
    ShardHeader,
    header_length,
    parse_safetensors_header,
)
from distroml.runtime.checkpoint.stores.interface import CheckpointStore

LIKELY_BYTES = 64 * 1024
"""Most headers end before that: one question to a store that is far away instead of two."""


def header_of(store: CheckpointStore, path: str) -> ShardHeader:
    """The header of the shard under ``path``.

    Raises:
        ValueError: it is not a shard; says why.
        StoreError: the store cannot be read.
    """
    data = store.read(path, 0, LIKELY_BYTES)
    size = header_length(data)
    if size > len(data) == LIKELY_BYTES:
        data += store.read(path, LIKELY_BYTES, size - LIKELY_BYTES)
    return parse_safetensors_header(data[:size])


def is_shard(store: CheckpointStore, path: str, header: bytes) -> bool:
    """Whether ``path`` is the shard that begins with ``header``; all its bytes are read.

    Raises:
        StoreError: the store cannot be read.
    """
    if store.read(path, 0, len(header)) != header:
        return False
    return not damage(store, path, hashlib.sha256(header).hexdigest())


def damage(
    store: CheckpointStore,
    path: str,
    header_sha256: str,
    go_on: Callable[[], None] = lambda: None,
) -> str:
    """What is wrong with the shard under ``path``, "" if nothing is.

    Args:
        header_sha256: as reported (``ShardFact.sha256``) or committed (``ShardRecord.header_sha256``).
        go_on: called before each piece is read; what it raises ends the work.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        header = header_of(store, path)
    except ValueError as error:
        return f"it is not a usable shard: {error}"
    if header.sha256 != header_sha256:
        return f"its header has SHA-256 {header.sha256} instead of {header_sha256}"
    found = store.size(path)
    if found != header.file_bytes:
        return f"it has {found} bytes instead of {header.file_bytes}"
    for place in header.tensors:
        for piece in place.pieces():
            go_on()
            data = store.read(path, piece.offset, piece.length)
            actual = blake3(data).hexdigest()
            if actual != piece.blake3:
                end = piece.offset + piece.length
                return (
                    f"bytes {piece.offset} to {end} have BLAKE3 {actual} instead of {piece.blake3}"
                )
    return ""
