"""Read a committed checkpoint back and verify every byte against what the log and the manifest say.

The manifest's tensors become a list of ranges of files, which threads read side by side, large ones straight to where
they belong; each piece is hashed by the thread that read it. Nothing is handed out before it was verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from blake3 import blake3
from msgspec import Struct

from distroml.errors import CorruptCheckpoint, StoreError
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.codec import decompress_into
from distroml.runtime.checkpoint.concurrently import for_each
from distroml.runtime.checkpoint.host_memory import allocate
from distroml.runtime.checkpoint.manifest import (
    Manifest,
    ShardRecord,
    decode_manifest,
    of_another_version,
    path_of,
)
from distroml.runtime.checkpoint.shard_file import (
    ITEM_BYTES,
    Piece,
    TensorBytes,
    TensorRecord,
    UnknownFormat,
    size_of,
)
from distroml.runtime.checkpoint.stores.interface import CheckpointStore, MissingFile

JOINED_BYTES = 2 * 1024 * 1024
"""Smaller pieces that lie side by side are read as one range of up to this size."""
WINDOW_BYTES = 256 * 1024 * 1024
"""What ``read_tensors`` reads ahead of its caller."""

Targets = Mapping[str, memoryview]


class Span(Struct, frozen=True):
    """A range of a file that is read at once, and the pieces of tensors in it, in order and without gaps."""

    file: str
    offset: int
    length: int
    pieces: tuple[tuple[TensorRecord, Piece], ...]


def read_manifest(store: CheckpointStore, checkpoint: Checkpoint) -> Manifest:
    """The manifest that ``checkpoint`` committed.

    Raises:
        CorruptCheckpoint: missing, or other bytes than those committed; names file and hashes.
        StoreError: the store cannot be read, or another version wrote it.
    """
    path = f"{checkpoint.directory}/{checkpoint.manifest}"
    try:
        data = store.read(path)
    except MissingFile:
        raise _corrupt(checkpoint, path, "is missing") from None
    _verify(checkpoint, path, 0, data, checkpoint.manifest_sha256)
    return decode_committed(checkpoint, path, data)


def decode_committed(checkpoint: Checkpoint, path: str, data: bytes) -> Manifest:
    """The manifest in bytes that have the hash which was committed.

    Raises:
        CorruptCheckpoint: they are no manifest of it.
        StoreError: another version wrote it.
    """
    try:
        manifest = decode_manifest(data)
    except UnknownFormat as error:
        raise of_another_version(path, error, checkpoint_step=checkpoint.step) from None
    except ValueError as error:
        raise _corrupt(checkpoint, path, f"is not usable: {error}") from None
    if manifest.step != checkpoint.step:
        raise _corrupt(checkpoint, path, f"is of step {manifest.step}, not {checkpoint.step}")
    return manifest


def read_into(
    store: CheckpointStore, checkpoint: Checkpoint, manifest: Manifest, targets: Targets
) -> None:
    """Fill ``targets`` with the bytes of the tensors that they name, and verify all of those.

    Args:
        targets: writable memory of exactly each tensor's size. What is in it counts only if nothing was raised.

    Raises:
        CorruptCheckpoint: a file is missing, short, long or altered; names file, place and hashes.
        StoreError: the store cannot be read.
    """
    _check_files(store, checkpoint, manifest)
    chosen = [tensor for tensor in manifest.tensors if tensor.name in targets]
    for_each(partial(_read_span, store, checkpoint, targets), spans(chosen))


def read_tensors(
    store: CheckpointStore, checkpoint: Checkpoint, manifest: Manifest
) -> Iterator[TensorBytes]:
    """All tensors in the order of their files, each verified before it is handed out.

    Their memory is their own and may be kept; about ``WINDOW_BYTES`` are read ahead.

    Raises:
        CorruptCheckpoint: a file is missing, short, long or altered; names file, place and hashes.
        StoreError: the store cannot be read.
    """
    _check_files(store, checkpoint, manifest)
    window: list[TensorRecord] = []
    room = WINDOW_BYTES
    for tensor in sorted(manifest.tensors, key=_place_of):
        window.append(tensor)
        room -= size_of(tensor.dtype, tensor.shape)
        if room <= 0:
            yield from _read_window(store, checkpoint, window)
            window, room = [], WINDOW_BYTES
    yield from _read_window(store, checkpoint, window)


def allocate_for(tensor: TensorRecord) -> memoryview:
    """Memory for its bytes."""
    return allocate(size_of(tensor.dtype, tensor.shape))


def spans(tensors: Iterable[TensorRecord]) -> list[Span]:
    """The ranges to be read for ``tensors``, in the order of files."""
    found: list[Span] = []
    pending: list[tuple[TensorRecord, Piece]] = []

    def close() -> None:
        if pending:
            record, piece = pending[0]
            length = sum(piece.length for _, piece in pending)
            found.append(Span(record.file, piece.offset, length, tuple(pending)))
            pending.clear()

    end = 0
    for record in sorted(tensors, key=_place_of):
        for piece in record.pieces():
            begin = pending[0][1].offset if pending else 0
            apart = bool(pending) and (pending[0][0].file, end) != (record.file, piece.offset)
            if apart or piece.offset + piece.length - begin > JOINED_BYTES:
                close()
            pending.append((record, piece))
            end = piece.offset + piece.length
    close()
    return found


def _place_of(record: TensorRecord) -> tuple[str, int]:
    return record.file, record.offset


def _check_files(store: CheckpointStore, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Sizes and headers of all files, before any memory is taken for what they hold."""
    for_each(partial(_check_file, store, checkpoint), manifest.files)


def _check_file(store: CheckpointStore, checkpoint: Checkpoint, file: ShardRecord) -> None:
    path = path_of(checkpoint.directory, file.file)
    try:
        size = store.size(path)
        if size != file.size_bytes:
            raise _corrupt(
                checkpoint, path, f"has {size} bytes instead of {file.size_bytes}", offset=size
            )
        header = store.read(path, 0, file.header_bytes)
    except MissingFile:
        raise _corrupt(checkpoint, path, "is missing") from None
    _verify(checkpoint, path, 0, header, file.header_sha256)


def _read_window(
    store: CheckpointStore, checkpoint: Checkpoint, window: Sequence[TensorRecord]
) -> Iterator[TensorBytes]:
    targets = {tensor.name: allocate_for(tensor) for tensor in window}
    for_each(partial(_read_span, store, checkpoint, targets), spans(window))
    for tensor in window:
        yield TensorBytes(tensor.name, tensor.dtype, tensor.shape, targets[tensor.name])


def _read_span(
    store: CheckpointStore, checkpoint: Checkpoint, targets: Targets, span: Span
) -> None:
    record, piece = span.pieces[0]
    if len(span.pieces) == 1 and record.codec == "none":
        target = targets[record.name][piece.begin : piece.begin + piece.content_bytes]
        _fill(store, checkpoint, span, target)
        return
    data = _read_verified(store, checkpoint, span)
    for record, piece in span.pieces:
        begin = piece.offset - span.offset
        part = data[begin : begin + piece.length]
        target = targets[record.name][piece.begin : piece.begin + piece.content_bytes]
        if record.codec == "none":
            target[:] = part
            continue
        try:
            decompress_into(target, part, ITEM_BYTES[record.dtype])
        except ValueError as error:
            path = path_of(checkpoint.directory, span.file)
            what = f"(tensor '{record.name}', from byte {piece.offset}) is not usable: {error}"
            raise _corrupt(checkpoint, path, what, offset=piece.offset) from None


def _read_verified(store: CheckpointStore, checkpoint: Checkpoint, span: Span) -> memoryview:
    data = memoryview(bytearray(span.length))
    _fill(store, checkpoint, span, data)
    return data


def _fill(store: CheckpointStore, checkpoint: Checkpoint, span: Span, target: memoryview) -> None:
    """Read a span and verify its pieces; once more before it counts as damaged, since the way here may have been at fault."""
    try:
        _fill_once(store, checkpoint, span, target)
    except CorruptCheckpoint:
        _fill_once(store, checkpoint, span, target)


def _fill_once(
    store: CheckpointStore, checkpoint: Checkpoint, span: Span, target: memoryview
) -> None:
    path = path_of(checkpoint.directory, span.file)
    try:
        count = store.read_into(path, target, span.offset)
    except MissingFile:
        raise _corrupt(checkpoint, path, "is missing") from None
    if count != span.length:
        end = span.offset + count
        raise _corrupt(
            checkpoint, path, f"ends after {end} bytes, in the middle of its data", offset=end
        )
    for _, piece in span.pieces:
        begin = piece.offset - span.offset
        data = target[begin : begin + piece.length]
        _verify(checkpoint, path, piece.offset, data, piece.blake3, "BLAKE3")


def _verify(
    checkpoint: Checkpoint,
    path: str,
    offset: int,
    data: bytes | memoryview,
    expected: str,
    by: Literal["SHA-256", "BLAKE3"] = "SHA-256",
) -> None:
    actual = (blake3 if by == "BLAKE3" else hashlib.sha256)(data).hexdigest()
    if actual != expected:
        raise _corrupt(
            checkpoint,
            path,
            f"(bytes {offset} to {offset + len(data)}) has {by} {actual}, committed was {expected}",
            offset=offset,
            hash=by,
            expected_hash=expected,
            actual_hash=actual,
        )


def _corrupt(checkpoint: Checkpoint, path: str, what: str, **extra: str | int) -> StoreError:
    return CorruptCheckpoint(
        f"Checkpoint of step {checkpoint.step}: {path} {what}. It will not be restored again.",
        path=path,
        checkpoint_step=checkpoint.step,
        **extra,  # type: ignore[arg-type]
    )
