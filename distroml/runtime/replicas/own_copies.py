"""This node's own directory of the store ``local``, as seen by what moves copies: blocking work in a few threads.

The threads have a lower priority than everything else on the node: training must not pay for copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from distroml.errors import StoreError
from distroml.runtime.checkpoint.manifest import (
    LATEST_FILE,
    MAX_MANIFEST_BYTES,
    decode_manifest,
)
from distroml.runtime.checkpoint.priority import give_way
from distroml.runtime.checkpoint.shard_check import damage, header_of
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.interface import MissingFile, Staged, exists
from distroml.runtime.replicas.arriving import Arriving
from distroml.runtime.replicas.wire import ABSENT, MAX_PATHS, File, check_file

THREADS = 4

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class OwnCopies:
    """The files on this node.

    Args:
        directory: of the store ``local`` on this node, which no other node uses.
        landed: called with the path of each file that came from elsewhere.
    """

    def __init__(self, directory: Path, landed: Callable[[str], None] = lambda path: None) -> None:
        self.store = FileStore(directory)
        self._landed = landed
        self._threads = ThreadPoolExecutor(THREADS, "copies", initializer=give_way)

    def close(self) -> None:
        """Work under way ends with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], _T]) -> _T:
        """``work`` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # --- for threads -------------------------------------------------------------------------------------------

    def size(self, file: File) -> int:
        """Of this very file, by its hash; ``ABSENT`` where there is none, or another one. Its data are not read."""
        try:
            size = self.store.size(file.path)
            if file.size_bytes not in (None, size):
                return ABSENT
            if file.is_shard:
                return size if header_of(self.store, file.path).sha256 == file.sha256 else ABSENT
            if size > MAX_MANIFEST_BYTES:
                return ABSENT
            actual = hashlib.sha256(self.store.read(file.path)).hexdigest()
            return size if actual == file.sha256 else ABSENT
        except (MissingFile, ValueError):
            return ABSENT

    def sizes(self, files: Iterable[File]) -> tuple[int, ...]:
        """``size`` of each; a disk that fails has nothing."""
        found = []
        for file in files:
            try:
                found.append(self.size(file))
            except StoreError as error:
                _log.warning("copies: %s", error)
                found.append(ABSENT)
        return tuple(found)

    def damage(self, file: File) -> str:
        """What is wrong with the copy here, "" if nothing is; all its bytes are read.

        Raises:
            StoreError: the disk cannot be read.
        """
        try:
            if file.is_shard:
                return damage(self.store, file.path, file.sha256)
        except MissingFile:
            return "it is missing"
        return "" if self.size(file) != ABSENT else "it is missing, or has another SHA-256"

    def part(self, path: str, offset: int, length: int) -> tuple[bytes, int]:
        """Bytes of a file and its size, ``ABSENT`` where there is none."""
        if not path.endswith(f"/checkpoints/{LATEST_FILE}"):
            check_file(File(path, "0" * 64, 0))
        try:
            return self.store.read(path, offset, length), self.store.size(path)
        except MissingFile:
            return b"", ABSENT

    def listing(self, directory: str, after: str) -> tuple[str, ...]:
        """Files below ``directory`` that come behind ``after``, the first ``MAX_PATHS`` of them."""
        with contextlib.suppress(MissingFile):
            paths = self.store.list(directory)
            return tuple([path for path in paths if path > after][:MAX_PATHS])
        return ()

    @contextmanager
    def arrival(self, arriving: Arriving) -> Iterator[Staged]:
        """A new file for what comes; gone at the end unless it was published."""
        with self.store.stage(arriving.file.path, arriving.size_bytes) as staged:
            yield staged

    def publish(self, arriving: Arriving, staged: Staged, *, replace: bool) -> None:
        """Make durable what has come whole, under its name.

        Args:
            replace: the log or its manifest vouches for the file: whatever else has its name gives way. Otherwise that
                does only where it is broken.

        Raises:
            StoreError: the disk failed, or the name is taken by other bytes.
        """
        file = arriving.file
        staged.sync()
        if not staged.publish():
            if not self.damage(file):
                return  # somebody was faster
            if not replace and self._is_sound(file.path):
                raise StoreError(f"{file.path} is here with other bytes.", path=file.path)
            self.store.delete(file.path)
            if not staged.publish():
                raise StoreError(f"{file.path} is being written by somebody else.", path=file.path)
        self._landed(file.path)

    def _is_sound(self, path: str) -> bool:
        """Whether the file under this name is good in itself."""
        try:
            if path.endswith(".json"):
                decode_manifest(self.store.read(path))
                return True
            return not damage(self.store, path, header_of(self.store, path).sha256)
        except ValueError:
            return False

    def drop_if_broken(self, file: File) -> str:
        """Delete the copy here if it is broken; what is wrong with it, "" if nothing is or there is none."""
        if not exists(self.store, file.path):
            return ""
        problem = self.damage(file)
        if problem and not self._is_sound(file.path):
            self.store.delete(file.path)
            return problem
        return ""
