"""A file that comes in parts, in order, and is verified while it comes. No I/O.

A shard's header has the hash of each piece that follows, and is itself what the log's manifest vouches for: so a wrong
byte is noticed at the end of its piece, and only from the beginning of that piece must be asked anew, of somebody else.
"""

from __future__ import annotations

import hashlib
from collections import deque

from blake3 import blake3

from distroml.runtime.checkpoint.shard_file import (
    LENGTH,
    header_length,
    parse_safetensors_header,
)
from distroml.runtime.replicas.wire import File


class Differs(Exception):
    """Bytes are others than those that were committed; says which, and the hashes."""


class Arriving:
    """What has come of ``file``.

    Args:
        size_bytes: of the whole file.
    """

    def __init__(self, file: File, size_bytes: int) -> None:
        self.file, self.size_bytes = file, size_bytes
        self.at = 0
        """The next byte that is needed."""
        self._safe = 0
        """All before it is verified."""
        self._header: bytearray | None = bytearray() if file.is_shard else None
        """What has come of a shard's header; None once that is verified."""
        self._pieces: deque[tuple[int, str]] = deque()
        """End and hash of each piece that is not verified yet, in order."""
        if not file.is_shard:
            self._pieces.append((size_bytes, file.sha256))
        self._digest = self._new_digest()

    @property
    def whole(self) -> bool:
        """Whether all has come, and is as it should be."""
        return self._safe == self.size_bytes and not self._pieces and self._header is None

    def feed(self, data: bytes | memoryview) -> None:
        """Take what follows.

        Raises:
            Differs: it is not what should be there; ``rewind`` before the next.
        """
        view = memoryview(data)
        while view:
            taken = self._feed_header(view) if self._header is not None else self._feed_piece(view)
            view = view[taken:]

    def rewind(self) -> int:
        """Forget what is not verified; the byte from which on it must be sent again."""
        self.at = self._safe
        self._digest = self._new_digest()
        if self._header is not None:
            self._header.clear()
        return self.at

    def _feed_header(self, view: memoryview) -> int:
        assert self._header is not None
        begun = len(self._header)
        if begun < LENGTH.size:
            taken = min(LENGTH.size - begun, len(view))
        else:
            try:
                length = header_length(bytes(self._header[: LENGTH.size]))
            except ValueError as error:
                raise Differs(f"it is not a shard: {error}") from None
            if length > self.size_bytes:
                raise Differs(f"its header claims {length} of {self.size_bytes} bytes")
            taken = min(length - begun, len(view))
        self._header += view[:taken]
        self.at += taken
        if len(self._header) > LENGTH.size:
            self._end_header(bytes(self._header))
        return taken

    def _end_header(self, data: bytes) -> None:
        """Verify the header if it is complete."""
        if len(data) < header_length(data):
            return
        actual = hashlib.sha256(data).hexdigest()
        if actual != self.file.sha256:
            raise Differs(f"its header has SHA-256 {actual} instead of {self.file.sha256}")
        try:
            header = parse_safetensors_header(data)
        except ValueError as error:
            raise Differs(f"it is not a usable shard: {error}") from None
        if header.file_bytes != self.size_bytes:
            raise Differs(f"it should have {header.file_bytes} bytes and has {self.size_bytes}")
        self._pieces.extend(
            (piece.offset + piece.length, piece.blake3)
            for place in header.tensors
            for piece in place.pieces()
        )
        self._header, self._safe = None, self.at

    def _feed_piece(self, view: memoryview) -> int:
        if not self._pieces:
            raise Differs(f"it goes on behind its {self.size_bytes} bytes")
        end, expected = self._pieces[0]
        taken = min(end - self.at, len(view))
        self._digest.update(view[:taken])
        self.at += taken
        if self.at == end:
            actual = self._digest.hexdigest()
            if actual != expected:
                by = "BLAKE3" if self.file.is_shard else "SHA-256"
                raise Differs(
                    f"bytes {self._safe} to {end} have {by} {actual} instead of {expected}"
                )
            self._pieces.popleft()
            self._digest, self._safe = self._new_digest(), end
        return taken

    def _new_digest(self) -> blake3 | hashlib._Hash:
        """For the next piece of a shard, or the whole of a manifest."""
        return blake3() if self.file.is_shard else hashlib.sha256()
