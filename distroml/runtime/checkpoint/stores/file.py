"""A directory as a checkpoint store: a file system that all nodes see, or the disk of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.interface import (
    ORPHAN_AGE_S,
    Buffer,
    MissingFile,
    Staged,
    Stored,
    check_path,
)

TEMPORARY_PREFIX = ".tmp-"
HASH_CHUNK_BYTES = 4 * 1024 * 1024


class FileStore:
    """A directory; on several hosts a file system that all of them mount.

    Args:
        must_exist: never make the directory: where it is missing, something is not mounted.
    """

    def __init__(self, root: str | Path, *, must_exist: bool = False) -> None:
        self.root = Path(root).absolute()
        self._must_exist = must_exist

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> Stored:
        target = self._place(path)
        with _store_errors("write", path):
            if not target.exists():
                _make_directory(target.parent)
                temporary = _temporary_in(target.parent)
                try:
                    stored = _write_file(temporary, parts)
                    if _publish(temporary, target):
                        return stored
                finally:
                    temporary.unlink(missing_ok=True)
            return _stored_file(target)

    @contextmanager
    def stage(self, path: str, size_bytes: int) -> Iterator[Staged]:
        target = self._place(path)
        with _store_errors("write", path):
            _make_directory(target.parent)
            staged = _StagedFile(_temporary_in(target.parent), path, target)
        try:
            yield staged
        finally:
            staged.close()

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
        start = self._place(directory) if directory else self._checked_root()
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
            temporary = _temporary_in(target.parent)
            try:
                _write_file(temporary, [data])
                temporary.replace(target)
                _sync_directory(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def health(self) -> None:
        probe = _temporary_in(self._checked_root())
        with _store_errors("write", "."):
            _make_directory(self.root)
            try:
                _write_file(probe, [b"probe"])
            finally:
                probe.unlink(missing_ok=True)

    def remove_orphans(self, directory: str, now: float, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Remove what writers that died left below ``directory``, and the folders of which it was all; the number of files.

        Args:
            now: Unix seconds.
        """
        removed = 0
        with _store_errors("clean", directory):
            for file in list(self._place(directory).rglob(f"{TEMPORARY_PREFIX}*")):
                with contextlib.suppress(FileNotFoundError):
                    if now - file.stat().st_mtime < min_age_s:
                        continue
                    file.unlink()
                    removed += 1
                with contextlib.suppress(OSError):  # there are other files
                    file.parent.rmdir()
        return removed

    def _place(self, path: str) -> Path:
        return self._checked_root().joinpath(*check_path(path).split("/"))

    def _checked_root(self) -> Path:
        # A checkpoint "is missing" only in a store that is there: else it would count as damaged.
        if self._must_exist and not self.root.is_dir():
            raise StoreError(
                f"The checkpoint store's directory {self.root} is not there on this node; "
                "mount or make it on every node.",
                path=str(self.root),
            )
        return self.root


class _StagedFile:
    """A temporary file until it is published."""

    def __init__(self, temporary: Path, path: str, target: Path) -> None:
        self._temporary, self._path, self._target = temporary, path, target
        self._file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, offset: int, data: Buffer) -> None:
        view, at = memoryview(data).cast("B"), offset
        with _store_errors("write", self._path):
            while view:
                count = os.pwrite(self._file, view, at)
                view, at = view[count:], at + count
        # The disk begins at once (the pages are dirty, so none is dropped), and ``sync`` has little left to wait for.
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fadvise(self._file, offset, at - offset, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        with _store_errors("write", self._path):
            os.fsync(self._file)

    def publish(self) -> bool:
        with _store_errors("write", self._path):
            return _publish(self._temporary, self._target)

    def close(self) -> None:
        """Remove what was not published."""
        os.close(self._file)
        with _store_errors("clean", self._path):
            self._temporary.unlink(missing_ok=True)


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


def _temporary_in(folder: Path) -> Path:
    """A name that no other writer takes, and ``remove_orphans`` knows."""
    return folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def _publish(temporary: Path, target: Path) -> bool:
    """Give a durable file its name, durably; False where that is taken."""
    try:
        # link, not rename: it fails where the name exists, so two writers cannot both win
        os.link(temporary, target)
    except FileExistsError:
        return False
    _sync_directory(target.parent)
    return True


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
