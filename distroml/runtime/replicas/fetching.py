"""Brings one file from whoever has it to this node, verified, durable, under its name; or says why it cannot.

A holder that breaks off is followed by the next one, from the byte on that is still needed. One that sends wrong bytes
is named in the log, asked to look at its copy, and not asked again for this file.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

from distroml.errors import StoreError
from distroml.runtime.checkpoint.manifest import MAX_MANIFEST_BYTES
from distroml.runtime.checkpoint.stores.interface import Staged
from distroml.runtime.replicas.arriving import Arriving, Differs
from distroml.runtime.replicas.exchange import Exchange, NotAnswered
from distroml.runtime.replicas.own_copies import OwnCopies
from distroml.runtime.replicas.wire import ABSENT, CHUNK_BYTES, MAX_FILES, File

FETCHES = 4
"""Files that come at a time."""
WINDOW = 4
"""Parts of one file that are asked for ahead: with ``FETCHES``, all that stands before a report on a peer's lane."""
ROUNDS = 2
"""Through all holders that broke off, without a byte gained, before a file is given up."""
ENOUGH_S = 2.0
"""After which it is enough that some say that they have a file: others' disks may hang."""
RETRY_S = 1.0
MAX_TOLD = 4
"""Problems that an error names, the last ones."""
MAX_FETCHING = 4096
"""Files that come or wait to."""

_log = logging.getLogger(__name__)


class NoGoodCopy(StoreError):
    """No node that can be reached has the file whole.

    Args:
        without: nodes that said that they have it not, or sent wrong bytes. Any other one may have it.
    """

    def __init__(self, detail: str, path: str, without: Iterable[str] = ()) -> None:
        super().__init__(detail, path=path)
        self.without = frozenset(without)


class Fetcher:
    """Fetches files; asked twice for one, it fetches it once."""

    def __init__(self, own: OwnCopies, exchange: Exchange) -> None:
        self._own, self._exchange = own, exchange
        self._places = asyncio.Semaphore(FETCHES)
        self._under_way: dict[tuple[File, bool], asyncio.Task[None]] = {}
        self.counts = {"fetched": 0, "failed": 0, "broken": 0}
        """Files: brought here, not to be had, and copies of peers that had wrong bytes."""

    async def stop(self) -> None:
        """Break off."""
        for task in tuple(self._under_way.values()):
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    async def sizes(
        self,
        files: Iterable[File],
        sources: Collection[str] = (),
        *,
        enough_s: float | None = None,
    ) -> dict[File, dict[str, int]]:
        """Its size at each peer that says, ``ABSENT`` where it has not this very file; by file.

        Args:
            sources: whom to ask; empty: all.
            enough_s: after so long, who has not answered is not waited for if others have all files; None: all are.
        """
        wanted = tuple(files)
        found: dict[File, dict[str, int]] = {file: {} for file in wanted}

        async def ask(peer: str) -> None:
            for begin in range(0, len(wanted), MAX_FILES):
                part = wanted[begin : begin + MAX_FILES]
                try:
                    sizes = await self._exchange.holds(peer, part)
                except NotAnswered as error:
                    _log.debug("copies: %s", error)
                    return
                for file, size in zip(part, sizes, strict=True):
                    found[file][peer] = size

        waiting = {
            asyncio.create_task(ask(peer))
            for peer in self._exchange.connected()
            if not sources or peer in sources
        }
        try:
            if waiting:
                _, waiting = await asyncio.wait(waiting, timeout=enough_s)
            while waiting and not all(map(_is_somewhere, found.values())):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return found

    async def fetch(
        self, file: File, sources: Collection[str] = (), *, replace: bool = False
    ) -> None:
        """Have ``file`` here when this returns.

        Args:
            sources: who has it; empty: all peers are asked.
            replace: as of ``OwnCopies.publish``; also what is here is not looked at before, since it is known to be broken.

        Raises:
            NoGoodCopy: nobody gave it whole; names each and why.
            StoreError: it cannot be written here.
        """
        key = (file, replace)
        task = self._under_way.get(key)
        if task is None:
            if len(self._under_way) >= MAX_FETCHING:
                raise NoGoodCopy(
                    f"{file.path} is not fetched: {MAX_FETCHING} others are.", file.path
                )
            task = asyncio.create_task(self._fetch(file, tuple(sources), replace))
            self._under_way[key] = task
            task.add_done_callback(partial(self._ended, key))
        await asyncio.shield(task)

    def _ended(self, key: tuple[File, bool], task: asyncio.Task[None]) -> None:
        del self._under_way[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.counts["failed"] += 1
            _log.debug("copies: %s", error)

    async def _fetch(self, file: File, sources: tuple[str, ...], replace: bool) -> None:
        async with self._places:
            if not replace and await self._own.run(partial(self._own.size, file)) != ABSENT:
                return
            told = dict.fromkeys(sources, file.size_bytes)
            if not sources or file.size_bytes is None:
                told = dict((await self.sizes([file], sources, enough_s=ENOUGH_S))[file])
            without = {peer for peer, size in told.items() if size == ABSENT}
            there = [peer for peer in told if peer in set(self._exchange.connected()) - without]
            random.shuffle(there)
            if not there:
                raise NoGoodCopy(
                    f"No node that can be reached has {file.path}.", file.path, without
                )
            size_bytes = told[there[0]]
            assert size_bytes is not None
            if not file.is_shard and size_bytes > MAX_MANIFEST_BYTES:
                raise NoGoodCopy(f"{file.path} is told to have {size_bytes} bytes.", file.path)
            await self._from_any(Arriving(file, size_bytes), there, without, replace)
            self.counts["fetched"] += 1

    async def _from_any(
        self, arriving: Arriving, there: list[str], without: set[str], replace: bool
    ) -> None:
        """Take it from ``there``; who turns out to have a broken copy moves to ``without``."""
        file = arriving.file
        problems: list[str] = []
        arrival = self._own.arrival(arriving)
        staged = await self._own.run(arrival.__enter__)
        try:
            fruitless = 0
            while there and fruitless < ROUNDS:
                if fruitless:
                    await asyncio.sleep(RETRY_S)  # a link that broke comes back
                before = arriving.at
                if await self._from_each(there, without, arriving, staged, problems):
                    break
                fruitless = 0 if arriving.at > before else fruitless + 1
            if not arriving.whole:
                raise NoGoodCopy(
                    f"No node has a good copy of {file.path}: {'; '.join(problems[-MAX_TOLD:])}",
                    file.path,
                    without,
                )
            await self._own.run(partial(self._own.publish, arriving, staged, replace=replace))
        finally:
            await asyncio.shield(self._own.run(partial(arrival.__exit__, None, None, None)))

    async def _from_each(
        self,
        there: list[str],
        without: set[str],
        arriving: Arriving,
        staged: Staged,
        problems: list[str],
    ) -> bool:
        """Ask one after the other until the file is whole; who sends wrong bytes is asked no more."""
        for peer in [*there]:
            try:
                await self._from(peer, arriving, staged)
            except Differs as error:
                self._on_broken(peer, arriving.file, error)
                problems.append(f"'{peer}' has a broken copy: {error}")
                there.remove(peer)
                without.add(peer)
                arriving.rewind()
            except NotAnswered as error:
                problems.append(error.detail)
            if arriving.whole:
                return True
        return False

    async def _from(self, peer: str, arriving: Arriving, staged: Staged) -> None:
        """Take from ``peer`` what is still missing, some parts asked for ahead."""
        at, path, size_bytes = arriving.at, arriving.file.path, arriving.size_bytes
        asked: deque[asyncio.Task[bytes]] = deque()

        def ask_ahead() -> None:
            nonlocal at
            while at < size_bytes and len(asked) < WINDOW:
                length = min(CHUNK_BYTES, size_bytes - at)
                asked.append(asyncio.create_task(self._part(peer, path, at, length)))
                at += length

        try:
            ask_ahead()
            while asked:
                parts = [await asked.popleft()]
                while asked and asked[0].done():
                    parts.append(asked.popleft().result())
                ask_ahead()  # they come while these are written
                await self._own.run(partial(_take, arriving, staged, parts))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _part(self, peer: str, path: str, offset: int, length: int) -> bytes:
        part = await self._exchange.read(peer, path, offset, length)
        if len(part.data) != length:
            raise Differs(f"it ends after {offset + len(part.data)} bytes")
        return part.data

    def _on_broken(self, peer: str, file: File, error: Differs) -> None:
        self.counts["broken"] += 1
        _log.error("copies: node %s has a broken copy of %s: %s", peer, file.path, error)
        self._exchange.doubt(peer, file)


def _is_somewhere(sizes: Mapping[str, int]) -> bool:
    return any(size != ABSENT for size in sizes.values())


def _take(arriving: Arriving, staged: Staged, parts: Sequence[bytes]) -> None:
    for data in parts:
        staged.write(arriving.at, data)
        arriving.feed(data)
