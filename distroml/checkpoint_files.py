"""What the API does with the files of checkpoints: show, verify, export, survey. I/O in threads, few at once.

Implements ``http.services.CheckpointFiles`` over this node's stores.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from distroml.errors import CorruptCheckpoint, StoreError, TooManyRequests, Unavailable
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.examination import FileCheck, Stop, Survey, survey, verify
from distroml.runtime.checkpoint.manifest import Manifest
from distroml.runtime.checkpoint.plain_file import write_plain
from distroml.runtime.checkpoint.reader import read_manifest
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.replicas.bringing import Bringer

MAX_AT_ONCE = 2
"""Verifications, exports and surveys; each reads at the speed of the store."""
DESCRIBE_THREADS = 4
DESCRIBE_TIMEOUT_S = 5.0
"""How long a manifest may take to be read; less than a client waits for the first byte."""

_T = TypeVar("_T")


class CheckpointFiles:
    """The files of checkpoints, through one node's stores.

    Args:
        spool: directory for exports under way; what an earlier process left there is removed.
        bringer: replaces what is broken in the store ``local`` here by another node's copy; None: there is no other node.
    """

    def __init__(self, stores: Stores, spool: Path, bringer: Bringer | None = None) -> None:
        self._stores, self._spool, self._bringer = stores, spool, bringer
        self._readers = ThreadPoolExecutor(DESCRIBE_THREADS, thread_name_prefix="manifest")
        self._workers = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="checkpoint-files")
        self._busy = 0

    def close(self) -> None:
        """Wait for nothing; work under way ends with the process."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def describe(self, checkpoint: Checkpoint) -> Manifest:
        """The verified manifest.

        Raises:
            CorruptCheckpoint, StoreError: see ``read_manifest``.
            Unavailable: the store did not answer in time.
        """
        work = partial(read_manifest, self._stores.of(checkpoint.store), checkpoint)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                try:
                    return await loop.run_in_executor(self._readers, work)
                except CorruptCheckpoint:
                    if not await self._mend(checkpoint, (), ()):
                        raise
                return await loop.run_in_executor(self._readers, work)
        except TimeoutError:
            raise Unavailable(
                f"The checkpoint store did not answer within {DESCRIBE_TIMEOUT_S:g} s."
            ) from None

    async def verify(
        self, checkpoint: Checkpoint, others: Collection[Checkpoint]
    ) -> list[FileCheck]:
        """Every byte of a checkpoint compared; see ``examination.verify``.

        What is broken is looked for on other nodes first, where they keep copies.
        """
        store = self._stores.of(checkpoint.store)

        def work(stopped: Callable[[], bool]) -> list[FileCheck]:
            return verify(store, checkpoint, others, stopped)

        checks = await self._bounded(work)
        broken = [check.path for check in checks if check.problem]
        if broken and await self._mend(checkpoint, others, broken):
            checks = await self._bounded(work)
        return checks

    async def _mend(
        self, checkpoint: Checkpoint, others: Collection[Checkpoint], broken: Collection[str]
    ) -> bool:
        """Whether there are good copies of ``broken`` files now; all of them are here then."""
        bringer = self._bringer
        if bringer is None or checkpoint.store != LOCAL:
            return False
        needed = [checkpoint, *(one for one in others if one.directory in checkpoint.refers_to)]
        return all([await bringer.mend(one, broken) for one in needed])

    async def survey(self, store: str, *, thorough: bool) -> Survey:
        """What a store has; see ``examination.survey``."""
        opened = self._stores.of(store)
        return await self._bounded(
            lambda stopped: survey(opened, store, thorough=thorough, stopped=stopped)
        )

    @asynccontextmanager
    async def export(self, checkpoint: Checkpoint, *, everything: bool) -> AsyncIterator[Path]:
        """One verified safetensors file, there for as long as the context; see ``plain_file``."""
        store = self._stores.of(checkpoint.store)
        target = self._spool / f"{secrets.token_hex(8)}.safetensors"

        def write(stopped: Callable[[], bool]) -> None:
            def go_on() -> None:
                if stopped():
                    raise Stop

            try:
                self._spool.mkdir(parents=True, exist_ok=True)
                write_plain(store, checkpoint, target, everything=everything, checkpoint_time=go_on)
            except OSError as error:
                raise StoreError(
                    f"The export cannot be written to {self._spool} of this node: "
                    f"{error.strerror or error}."
                ) from error

        try:
            try:
                await self._bounded(write)
            except CorruptCheckpoint as error:
                broken = error.extra.get("path")
                if not await self._mend(checkpoint, (), [str(broken)]):
                    raise
                target.unlink(missing_ok=True)
                await self._bounded(write)
            yield target
        finally:
            target.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Exports that a process which died was writing."""
        for file in self._spool.glob("*.safetensors"):
            file.unlink(missing_ok=True)

    async def _bounded(self, work: Callable[[Callable[[], bool]], _T]) -> _T:
        """``work`` in a thread; it is told to stop when its caller is cancelled."""
        stop = threading.Event()
        with self._place():
            doing = asyncio.get_running_loop().run_in_executor(self._workers, work, stop.is_set)
            try:
                return await asyncio.shield(doing)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([doing])
                raise

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._busy >= MAX_AT_ONCE:
            raise TooManyRequests(
                f"This node verifies, exports or surveys {MAX_AT_ONCE} checkpoints at once and is at it; "
                "try again later or at another node."
            )
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
