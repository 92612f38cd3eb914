"""A shard on its way from the host buffer to a store: what is referred to, what is compressed, hashes, header.

All work is done piece by piece in the writer's threads. Where a store takes a file in any order, hashing and writing
are one pass: the header has the hashes, its length is known before, and it is written last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from blake3 import blake3
from msgspec.structs import replace

from distroml.runtime.checkpoint.codec import compress
from distroml.runtime.checkpoint.shard_file import (
    ITEM_BYTES,
    BytesEntry,
    Codec,
    Packed,
    ShardNote,
    TensorBytes,
    TensorRecord,
    cuts,
    encode_header,
)
from distroml.runtime.checkpoint.stores.interface import Buffer

BATCH_BYTES = 2 * 1024 * 1024
"""Smaller pieces that follow each other are written as one."""
_UNKNOWN = "0" * 64

_T = TypeVar("_T")

Base = Mapping[str, TensorRecord]
"""Tensors of an earlier checkpoint by name; ``file`` relative to the run's ``checkpoints`` directory."""


@dataclass
class Draft:
    """One tensor and what will be written of it."""

    tensor: TensorBytes
    pieces: list[memoryview]
    blake3: list[str] = field(default_factory=list)
    """Of the pieces; ``_UNKNOWN`` until they are hashed."""
    codec: Codec = "none"
    content_blake3: tuple[str, ...] = ()

    @property
    def entry(self) -> TensorBytes | BytesEntry:
        """As other tools see it."""
        if self.codec == "none":
            return self.tensor
        return BytesEntry(self.tensor.name, sum(map(len, self.pieces)))

    @property
    def packed(self) -> Packed:
        """What a compressed one is."""
        frames = tuple(map(len, self.pieces))
        return Packed(self.codec, self.tensor.dtype, self.tensor.shape, frames, self.content_blake3)


class Assembly:
    """One shard.

    Args:
        note: without digests, references and what is compressed.
        tensors: in the order of the file; their memory is this shard's until it is durable.
        base: tensors that may be referred to; None: all are written.
        threads: does the work.
    """

    def __init__(
        self,
        note: ShardNote,
        tensors: Sequence[TensorBytes],
        threads: Executor,
        *,
        base: Base | None = None,
        codec: Codec = "none",
    ) -> None:
        self._threads = threads
        self._references: list[TensorRecord] = []
        self._drafts = [_draft(tensor) for tensor in tensors]
        if base is not None:
            self._refer(base)
        if codec != "none":
            for draft in self._drafts:
                self._compress(draft, keep_digests=base is not None)
        self._note = replace(
            note,
            references=tuple(self._references),
            packed={d.tensor.name: d.packed for d in self._drafts if d.codec != "none"},
        )
        self.header_bytes = len(self.header())
        self.size_bytes = self.header_bytes + sum(
            len(piece) for draft in self._drafts for piece in draft.pieces
        )

    def header(self) -> bytes:
        """The file's beginning; final once all is hashed, of its final length from the start."""
        digests = {draft.tensor.name: tuple(draft.blake3) for draft in self._drafts}
        return encode_header(
            [draft.entry for draft in self._drafts], replace(self._note, digests=digests)
        )

    def header_sha256(self) -> str:
        """Of the final header; it stands for the whole shard."""
        return hashlib.sha256(self.header()).hexdigest()

    def hash(self) -> None:
        """Hash what is not hashed yet."""
        self._each(_hash, self._places())

    def write(self, write: Callable[[int, Buffer], None]) -> None:
        """Hash and write everything.

        Args:
            write: puts bytes at an offset of the file; called in any order from several threads.
        """
        self._each(partial(_hash_and_write, write), _batches(self._places()))
        write(0, self.header())

    def parts(self) -> list[Buffer]:
        """The whole file in order; for who has hashed it."""
        return [self.header(), *(piece for draft in self._drafts for piece in draft.pieces)]

    def _places(self) -> Iterator[_Place]:
        at = self.header_bytes
        for draft in self._drafts:
            for number, piece in enumerate(draft.pieces):
                yield _Place(draft, number, at)
                at += len(piece)

    def _refer(self, base: Base) -> None:
        """Leave out what ``base`` has already."""
        self._each(_hash, (_Place(d, n, 0) for d in self._drafts for n in range(len(d.pieces))))
        changed = []
        for draft in self._drafts:
            tensor, digests = draft.tensor, tuple(draft.blake3)
            known = base.get(tensor.name)
            if known and known.content == (tensor.name, tensor.dtype, tensor.shape, digests):
                self._references.append(known)
            else:
                changed.append(draft)
        self._drafts = changed

    def _compress(self, draft: Draft, *, keep_digests: bool) -> None:
        """Compress one tensor where that makes it smaller; the frames take the place of its bytes in memory."""
        item_bytes = ITEM_BYTES[draft.tensor.dtype]
        frames = list(self._threads.map(lambda piece: compress(piece, item_bytes), draft.pieces))
        if sum(map(len, frames)) >= draft.tensor.size_bytes:
            return
        draft.codec = "zstd"
        if keep_digests:
            draft.content_blake3 = tuple(draft.blake3)
        draft.blake3 = [_UNKNOWN] * len(frames)
        for number, (piece, frame) in enumerate(zip(draft.pieces, frames, strict=True)):
            if len(frame) <= len(piece):
                piece[: len(frame)] = frame
                draft.pieces[number] = piece[: len(frame)]
            else:
                draft.pieces[number] = memoryview(frame)

    def _each(self, work: Callable[[_T], None], items: Iterable[_T]) -> None:
        futures = [self._threads.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)  # none may still write once the caller closes its file
            raise


@dataclass(frozen=True)
class _Place:
    """A piece and where it lies in the file."""

    draft: Draft
    number: int
    offset: int

    @property
    def data(self) -> memoryview:
        return self.draft.pieces[self.number]


def _draft(tensor: TensorBytes) -> Draft:
    pieces = [tensor.data[begin:end] for begin, end in cuts(tensor.size_bytes)]
    return Draft(tensor, pieces, [_UNKNOWN] * len(pieces))


def _hash(place: _Place) -> None:
    if place.draft.blake3[place.number] == _UNKNOWN:
        place.draft.blake3[place.number] = blake3(place.data).hexdigest()


def _hash_and_write(write: Callable[[int, Buffer], None], batch: Sequence[_Place]) -> None:
    for place in batch:
        _hash(place)
    data = batch[0].data if len(batch) == 1 else b"".join(place.data for place in batch)
    write(batch[0].offset, data)


def _batches(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    """Neighbours of up to ``BATCH_BYTES`` together."""
    batch: list[_Place] = []
    size = 0
    for place in places:
        if batch and size + len(place.data) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += len(place.data)
    if batch:
        yield batch
