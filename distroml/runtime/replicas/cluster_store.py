"""The store ``local`` as the whole cluster has it: this node's directory, and behind it those of all others.

What is written goes here, and to as many others as the job wants, before it counts as written. What is read comes from here or,
if it is not here, from whoever has it, as it is: readers verify what they read. Deleting and cleaning is each node's
own business.

The methods block, as all stores' do; the event loop does the asking. They must not be called in its thread.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.interface import (
    ORPHAN_AGE_S,
    Buffer,
    MissingFile,
    Stored,
)
from distroml.runtime.replicas import placement
from distroml.runtime.replicas.exchange import Exchange, NotAnswered
from distroml.runtime.replicas.keeping import Keeper
from distroml.runtime.replicas.own_copies import OwnCopies
from distroml.runtime.replicas.wire import (
    ABSENT,
    CHUNK_BYTES,
    MAX_PATHS,
    File,
    check_file,
    job_of,
)

MAX_KNOWN = 1024
"""Files whose holder is remembered."""
MAX_FAILURES = 8
"""Of one read of a file, by holders that break off."""
MAX_LISTED = 1_000_000
"""Paths that one peer may tell."""

_T = TypeVar("_T")


class ClusterStore:
    """``CheckpointStore`` over the copies of all nodes that can be reached. ``start`` it in the event loop."""

    def __init__(self, own: OwnCopies, exchange: Exchange, keeper: Keeper) -> None:
        self._own, self._exchange, self._keeper = own, exchange, keeper
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: dict[str, tuple[str, int]] = {}
        """Who was found to have a file, and its size there."""

    def start(self) -> None:
        """Take questions from threads from now on."""
        self._loop = asyncio.get_running_loop()

    # --- here first --------------------------------------------------------------------------------------------

    def put_if_absent(self, path: str, parts: Sequence[Buffer]) -> Stored:
        stored = self._own.store.put_if_absent(path, parts)
        if stored.created or stored.sha256 == _sha256(parts):
            file = check_file(File(path, stored.sha256, stored.size_bytes))
            self._in_loop(self._keeper.keep(file, job_of(path)))
        return stored

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return self._own.store.read(path, offset, length)
        except MissingFile:
            return self._in_loop(self._read(path, offset, length))

    def read_into(self, path: str, target: memoryview, offset: int = 0) -> int:
        try:
            return self._own.store.read_into(path, target, offset)
        except MissingFile:
            data = self._in_loop(self._read(path, offset, len(target)))
        target[: len(data)] = data
        return len(data)

    def size(self, path: str) -> int:
        try:
            return self._own.store.size(path)
        except MissingFile:
            return self._in_loop(self._holder(path))[1]

    def list(self, directory: str) -> list[str]:
        """What any node has that can be reached."""
        own = self._own.store.list(directory)
        return sorted({*own, *self._in_loop(self._listings(directory))})

    # --- here only ---------------------------------------------------------------------------------------------

    def delete(self, path: str) -> None:
        self._own.store.delete(path)

    def put_latest(self, path: str, data: bytes) -> None:
        self._own.store.put_latest(path, data)

    def health(self) -> None:
        self._own.store.health()

    def remove_orphans(self, directory: str, now: float, min_age_s: float = ORPHAN_AGE_S) -> int:
        return self._own.store.remove_orphans(directory, now, min_age_s)

    # --- elsewhere ---------------------------------------------------------------------------------------------

    def _in_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None:
            work.close()
            raise StoreError("The checkpoint store is not open yet.")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _holder(self, path: str) -> tuple[str, int]:
        """A peer that has the file, and its size.

        Raises:
            MissingFile: none that can be reached.
        """
        problems: list[str] = []
        peers = placement.order(path, self._exchange.connected())
        if path in self._known:
            known = self._known[path][0]
            peers.sort(key=lambda peer: peer != known)
        for peer in peers:
            try:
                part = await self._exchange.read(peer, path, 0, 0)
            except NotAnswered as error:
                problems.append(error.detail)
                continue
            if part.size_bytes != ABSENT:
                self._known.pop(path, None)
                self._known[path] = (peer, part.size_bytes)
                if len(self._known) > MAX_KNOWN:
                    del self._known[next(iter(self._known))]
                return self._known[path]
        why = f" ({'; '.join(problems)})" if problems else ""
        raise MissingFile(
            f"The checkpoint store has no file {path!r} on any node that can be reached{why}.",
            path=path,
        )

    async def _read(self, path: str, offset: int, length: int | None) -> bytes:
        peer, size_bytes = self._known.get(path) or await self._holder(path)
        end = size_bytes if length is None else min(offset + length, size_bytes)
        parts, failures = [], 0
        while offset < end:
            try:
                part = await self._exchange.read(peer, path, offset, min(CHUNK_BYTES, end - offset))
                if part.size_bytes == ABSENT:
                    raise NotAnswered(f"Node '{peer}' has no {path} any more.")
            except NotAnswered as error:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise StoreError(f"{path} cannot be read: {error.detail}", path=path) from None
                self._known.pop(path, None)
                peer, size_bytes = await self._holder(path)
                end = min(end, size_bytes)
                continue
            if not part.data:
                self._known.pop(path, None)
                break  # it is shorter by now; the reader sees that something is missing
            parts.append(part.data)
            offset += len(part.data)
        return b"".join(parts)

    async def _listings(self, directory: str) -> set[str]:
        listed = await asyncio.gather(
            *(self._listing(peer, directory) for peer in self._exchange.connected())
        )
        return {path for paths in listed for path in paths}

    async def _listing(self, peer: str, directory: str) -> Sequence[str]:
        paths: list[str] = []
        try:
            while len(paths) < MAX_LISTED:
                page = await self._exchange.listing(peer, directory, paths[-1] if paths else "")
                paths += page
                if len(page) < MAX_PATHS or page[-1] <= page[0]:
                    break
        except NotAnswered as error:
            raise StoreError(f"The store cannot be listed: {error.detail}") from None
        return paths


def _sha256(parts: Sequence[Buffer]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
