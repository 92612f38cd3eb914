"""Where checkpoints are kept: the interface, and a directory that all nodes see.

Paths are relative to the store's root, with "/" between their parts. A file is created once, whole and durable,
or not at all; it never changes afterwards. Only ``LATEST`` is replaced, atomically, and nothing trusts it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from distroml.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"
HASH_CHUNK_BYTES = 4 * 1024 * 1024
ORPHAN_AGE_S = 3600.0
"""A temporary file older than this belongs to a writer that died."""

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
        """Paths of all files below ``directory``, sorted; [] where it does not exist."""
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


class MissingFile(StoreError):
    """There is no such file in the store."""


class LocalStore:
    """A directory; on several hosts a file system that all of them mount."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> Stored:
        target = self._place(path)
        with _store_errors("write", path):
            if not target.exists():
                _make_directory(target.parent)
                temporary = (
                    target.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
                )
                try:
                    stored = _write_file(temporary, parts)
                    # link, not rename: it fails where the name exists, so two writers cannot both win
                    os.link(temporary, target)
                    _sync_directory(target.parent)
                    return stored
                except FileExistsError:
                    pass
                finally:
                    temporary.unlink(missing_ok=True)
            return _stored_file(target)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        with _store_errors("read", path), self._place(path).open("rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)

    def read_into(self, path: str, target: memoryview, offset: int = 0) -> int:
        count = 0
        with _store_errors("read", path), self._place(path).open("rb", buffering=0) as file:
            file.seek(offset)
            while count < len(target):
                step = file.readinto(target[count : count + HASH_CHUNK_BYTES])
                if not step:
                    break
                count += step
        return count

    def size(self, path: str) -> int:
        with _store_errors("read", path):
            return self._place(path).stat().st_size

    def list(self, directory: str) -> list[str]:
        start = self._place(directory)
        with _store_errors("list", directory):
            return sorted(
                file.relative_to(self.root).as_posix()
                for file in start.rglob("*")
                if file.is_file() and not file.name.startswith(TEMPORARY_PREFIX)
            )

    def delete(self, path: str) -> None:
        target = self._place(path)
        with _store_errors("delete", path):
            if not target.is_dir():
                target.unlink(missing_ok=True)
                return
            for folder, folders, names in os.walk(target, topdown=False):
                for name in names:
                    Path(folder, name).unlink(missing_ok=True)
                for name in folders:
                    Path(folder, name).rmdir()
            target.rmdir()

    def put_latest(self, path: str, data: bytes) -> None:
        target = self._place(path)
        with _store_errors("write", path):
            _make_directory(target.parent)
            temporary = target.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
            try:
                _write_file(temporary, [data])
                temporary.replace(target)
                _sync_directory(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def health(self) -> None:
        probe = self.root / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        with _store_errors("write", "."):
            _make_directory(self.root)
            try:
                _write_file(probe, [b"probe"])
            finally:
                probe.unlink(missing_ok=True)

    def remove_orphans(self, directory: str, now: float, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Remove what writers that died left below ``directory``; the number of files removed.

        Args:
            now: Unix seconds.
        """
        removed = 0
        with _store_errors("clean", directory):
            for file in self._place(directory).rglob(f"{TEMPORARY_PREFIX}*"):
                with contextlib.suppress(FileNotFoundError):
                    if now - file.stat().st_mtime >= min_age_s:
                        file.unlink()
                        removed += 1
        return removed

    def _place(self, path: str) -> Path:
        parts = path.split("/")
        if path.startswith("/") or "\0" in path or any(part in ("", "..") for part in parts):
            raise StoreError(f"{path!r} is not a path inside the checkpoint store.")
        return self.root.joinpath(*parts)


@contextmanager
def _store_errors(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFile(f"The checkpoint store has no file {path!r}.", path=path) from error
    except OSError as error:
        raise StoreError(
            f"The checkpoint store cannot {action} {path!r}: {error.strerror or error}.", path=path
        ) from error


def _write_file(path: Path, parts: Sequence[Buffer]) -> Stored:
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for part in parts:
            view = memoryview(part).cast("B")
            for begin in range(0, len(view), HASH_CHUNK_BYTES):
                chunk = view[begin : begin + HASH_CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            size += len(view)
        os.fsync(file.fileno())
    return Stored(size, digest.hexdigest(), created=True)


def _stored_file(path: Path) -> Stored:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Stored(file.tell(), digest.hexdigest(), created=False)


def _make_directory(path: Path) -> None:
    """Make ``path`` and its parents, each durable in its own parent."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _sync_directory(folder.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
