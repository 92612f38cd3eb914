"""All that checkpoints ask of a store.

Paths are relative to the store's root, with "/" between their parts. A file is created once, whole and durable,
or not at all; it never changes afterwards. Only ``LATEST`` is replaced, atomically, and nothing that restores a run trusts it. Every
method blocks: the agent calls them in threads, a worker in its writer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from msgspec import Struct

from distroml.errors import StoreError

READ_BYTES = 16 * 1024 * 1024
"""Of a file that is read from its beginning to its end, so much at a time."""
ORPHAN_AGE_S = 3600.0
"""What was left unfinished for longer than this belongs to a writer that died."""

PROBE = ".distroml-store"
"""A file at the root by which an object store shows that it never overwrites where it should not; no listing has it."""
PROBE_CONTENT = (
    b"DistroML keeps checkpoints here; with this file it asks whether a name can be taken twice.\n"
)

Buffer = bytes | bytearray | memoryview


class Stored(Struct, frozen=True):
    """What is under a name now."""

    size_bytes: int
    sha256: str
    created: bool
    """False where the name was taken already; size and hash are then those of what is there."""


class CheckpointStore(Protocol):
    """All that checkpoints ask of a store. Each method raises ``StoreError`` where the store fails."""

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> Stored:
        """Make ``path`` of ``parts`` joined, durable on return; never overwrites."""
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``offset`` (fewer at the end); None: the rest."""
        ...

    def read_into(self, path: str, target: memoryview, offset: int = 0) -> int:
        """Fill ``target`` from ``offset``; the number of bytes there were."""
        ...

    def size(self, path: str) -> int:
        """Bytes of the file."""
        ...

    def list(self, directory: str) -> list[str]:
        """Paths of all files below ``directory`` ("": the root), sorted; [] where it does not exist."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file or a whole directory; fine where it does not exist."""
        ...

    def put_latest(self, path: str, data: bytes) -> None:
        """Replace ``path`` by ``data`` atomically."""
        ...

    def health(self) -> None:
        """Return if the store can be written to."""
        ...

    def remove_orphans(self, directory: str, now: float, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Remove what writers that died left unfinished below ``directory``; how many.

        Args:
            now: Unix seconds.
        """
        ...


class Staged(Protocol):
    """A file that is being written; each method raises ``StoreError`` where the store fails."""

    def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at ``offset``; any order, any thread, each byte once. It must not change before ``sync``."""
        ...

    def sync(self) -> None:
        """Return when all that was written is durable."""
        ...

    def publish(self) -> bool:
        """Give it its name, durably, after ``sync``; False where the name is taken."""
        ...


@runtime_checkable
class StagingStore(Protocol):
    """A store that can also take a file piece by piece: its beginning may be known only after the rest."""

    def stage(self, path: str, size_bytes: int) -> AbstractContextManager[Staged]:
        """A new file for ``path``, which vanishes at the end unless it was published.

        Args:
            size_bytes: of the whole file.
        """
        ...


class MissingFile(StoreError):
    """There is no such file in the store."""


def exists(store: CheckpointStore, path: str) -> bool:
    """Whether the store has a file of this name.

    Raises:
        StoreError: the store cannot tell.
    """
    try:
        store.size(path)
    except MissingFile:
        return False
    return True


def read_stored(store: CheckpointStore, path: str) -> Stored:
    """What is under a name that was taken already, by reading all of it."""
    digest, size = hashlib.sha256(), store.size(path)
    for begin in range(0, size, READ_BYTES):
        digest.update(store.read(path, begin, READ_BYTES))
    return Stored(size, digest.hexdigest(), created=False)


def check_path(path: str) -> str:
    """``path``, if it is one inside a store.

    Raises:
        StoreError: it is absolute, empty or leads out of the store.
    """
    parts = path.split("/")
    if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{path!r} is not a path inside the checkpoint store.")
    return path
