"""Google Cloud Storage and Azure Blob Storage as checkpoint stores, through fsspec; its only importer.

Both create a file exclusively: Google where its generation is 0 (``ifGenerationMatch``), Azure with ``If-None-Match: *``; fsspec
calls that mode ``xb``. As with S3 an object of fixed content shows once per process that it works. Retries and parallel
transfers are those of gcsfs and adlfs. What a writer that died has left is not visible, and both services drop it by themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.interface import (
    ORPHAN_AGE_S,
    PROBE,
    PROBE_CONTENT,
    Buffer,
    MissingFile,
    Stored,
    check_path,
    read_stored,
)
from distroml.runtime.checkpoint.stores.redaction import redacted
from distroml.store_urls import StoreUrl

BLOCK_BYTES = 16 * 1024 * 1024
WRITE_BYTES = 4 * 1024 * 1024
READ_ATTEMPTS = 3
"""Of a range that arrived short."""

# scheme of the URL -> protocol of fsspec, extra that installs it, options that are not in the URL
_IMPLEMENTATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gs": ("gcs", "gcs", {}),
    "az": ("abfs", "azure", {"anon": False}),
}


class FsspecStore:
    """Part of a bucket or container; opening it asks nothing.

    Args:
        connect: makes the file system, in each process that uses it; None: the one of the URL's scheme.
    """

    def __init__(self, url: StoreUrl, connect: Callable[[], Any] | None = None) -> None:
        self._name = f"{url.scheme}://{url.place}/{url.prefix}".rstrip("/")
        self._place = url.place
        self._root = f"{url.place}/{url.prefix}".rstrip("/")
        self._connect = connect or (lambda: _connected(url))
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None
        """The process that it belongs to, and the file system."""
        self._proven = False

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> Stored:
        key = self._key(path)
        self._prove()
        digest, size = hashlib.sha256(), 0
        with self._errors("write", path):
            try:
                with _writing(self._files.open(key, "xb", block_size=BLOCK_BYTES)) as file:
                    for part in parts:
                        view = memoryview(part).cast("B")
                        for begin in range(0, len(view), WRITE_BYTES):
                            piece = view[begin : begin + WRITE_BYTES]
                            digest.update(piece)
                            file.write(piece)
                        size += len(view)
            except FileExistsError:
                return read_stored(self, path)
        return Stored(size, digest.hexdigest(), created=True)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        size = self.size(path)
        end = size if length is None else min(size, offset + length)
        if offset >= end:
            return b""
        with self._errors("read", path):
            for _ in range(READ_ATTEMPTS):
                data: bytes = self._files.cat_file(self._key(path), start=offset, end=end)
                if len(data) == end - offset:
                    return data
        raise StoreError(
            f"The checkpoint store {self._name} gave {len(data)} of {end - offset} bytes of {path!r}.",
            path=path,
        )

    def read_into(self, path: str, target: memoryview, offset: int = 0) -> int:
        view, count = target.cast("B"), 0
        for begin in range(0, len(view), BLOCK_BYTES):
            data = self.read(path, offset + begin, len(view[begin : begin + BLOCK_BYTES]))
            view[begin : begin + len(data)] = data
            count += len(data)
        return count

    def size(self, path: str) -> int:
        with self._errors("read", path):
            found = self._files.info(self._key(path))
            if found["type"] != "file":
                raise FileNotFoundError(path)
            return int(found["size"])

    def list(self, directory: str) -> list[str]:
        start = self._key(directory) if directory else self._root
        keys: Sequence[str] = ()
        with contextlib.suppress(MissingFile), self._errors("list", directory):
            keys = self._files.find(start)
        root = self._root.strip("/")  # implementations differ in whether a slash comes first
        paths = (key.strip("/").removeprefix(f"{root}/") for key in keys)
        return sorted(path for path in paths if path != PROBE)

    def delete(self, path: str) -> None:
        for one in self.list(path) or [path]:
            with contextlib.suppress(MissingFile), self._errors("delete", path):
                self._files.rm_file(self._key(one))

    def put_latest(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            self._files.pipe_file(self._key(path), data)

    def health(self) -> None:
        self.put_latest(PROBE, PROBE_CONTENT)
        self._proven = False
        self._prove()

    def remove_orphans(self, directory: str, now: float, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Nothing: the services drop unfinished uploads themselves, after seven days."""
        check_path(directory)
        return 0

    @property
    def _files(self) -> Any:
        """The file system, without what it remembers of listings: other nodes write too."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), self._connect())
            files = self._opened[1]
        files.invalidate_cache()
        return files

    def _prove(self) -> None:
        """Once per process: files are created exclusively."""
        for _ in range(0 if self._proven else 2):
            with self._errors("write", PROBE):
                try:
                    with _writing(self._files.open(self._key(PROBE), "xb")) as file:
                        file.write(PROBE_CONTENT)
                except FileExistsError:
                    self._proven = True
                    return
        if not self._proven:
            raise StoreError(
                f"{self._name} does not create files exclusively, so two writers could overwrite each "
                "other's checkpoints; install a current gcsfs or adlfs.",
                path=PROBE,
            )

    @contextmanager
    def _errors(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except FileNotFoundError:
            self._check_place(action, path)
            raise MissingFile(
                f"The checkpoint store {self._name} has no file {path!r}.", path=path
            ) from None
        except Exception as error:  # each library has errors of its own
            raise self._failed(action, path, error) from None

    def _check_place(self, action: str, path: str) -> None:
        """What is missing may be the bucket: then no file counts as missing."""
        try:
            there = self._files.exists(self._place)
        except Exception as error:
            raise self._failed(action, path, error) from None
        if not there:
            raise StoreError(
                f"The checkpoint store {self._name} cannot {action} {path!r}: there is no {self._place!r}, or "
                "this node's credentials do not show it; create it, or correct the URL of the store.",
                path=path,
            )

    def _failed(self, action: str, path: str, error: Exception) -> StoreError:
        return StoreError(
            f"The checkpoint store {self._name} cannot {action} {path!r}: "
            f"{type(error).__name__}: {redacted(str(error))}",
            path=path,
        )

    def _key(self, path: str) -> str:
        return f"{self._root}/{check_path(path)}"


@contextmanager
def _writing(file: Any) -> Iterator[Any]:
    """A file that becomes visible at the end, and never after an exception."""
    try:
        yield file
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        with contextlib.suppress(AttributeError):
            file.closed = True  # else its destructor finishes it
        raise
    file.close()


def _connected(url: StoreUrl) -> Any:
    protocol, extra, options = _IMPLEMENTATIONS[url.scheme]
    if "account" in url.options:
        options = {**options, "account_name": url.options["account"]}
    try:
        import fsspec

        return fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **options
        )
    except ImportError:
        raise StoreError(
            f"{url.scheme}:// needs a package that is not installed on this node: "
            f"pip install 'distroml[{extra}]'."
        ) from None
