"""One dedicated thread that performs a node's disk operations, and the story of a disk in trouble.

The event loop awaits it and runs no turn meanwhile. An operation that fails is tried again until it
succeeds or the node stops: nothing behind it may be acknowledged, so there is nothing else to do.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from distroml.consensus.disk import Disk
from distroml.consensus.raft_log import DiskOp
from distroml.consensus.storage import Recovered, Storage, open_storage
from distroml.consensus.wal import Identity

logger = logging.getLogger(__name__)

RETRY_MIN_S: Final = 0.05
RETRY_MAX_S: Final = 1.0
CLOSE_LIMIT_S: Final = 5.0
"""A disk that hangs does not keep the process from leaving: nothing unsynced was promised."""


class SyncThread:
    """`on_trouble` is called in the loop when the disk begins to fail or to hang."""

    def __init__(
        self,
        name: str,
        *,
        hang_s: float,
        rng: random.Random,
        on_trouble: Callable[[], None],
    ) -> None:
        self._name = name
        self._hang_s = hang_s
        self._rng = rng
        self._on_trouble = on_trouble
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"raft-sync-{name}")
        self._storage: Storage | None = None
        self._stopping = asyncio.Event()
        self.busy = False
        """A turn's operations are under way: what it changed is not yet durable."""
        self.trouble = ""
        """What is wrong with the disk now; empty when nothing is."""
        self.last_sync_ms = 0.0
        self.syncs = 0

    async def open(self, directory: Path, identity: Identity, disk: Disk) -> Recovered:
        """Raises StorageCorrupt or OSError."""
        loop = asyncio.get_running_loop()
        self._storage, recovered = await loop.run_in_executor(
            self._executor, open_storage, directory, identity, disk
        )
        return recovered

    async def persist(self, ops: list[DiskOp]) -> bool:
        """Performs the operations in order. False if the node stopped before all were durable."""
        loop = asyncio.get_running_loop()
        waiting = deque(ops)
        retry_s = RETRY_MIN_S
        self.busy = True  # for good, where the node stops before they are durable
        while not self._stopping.is_set():
            alarm = loop.call_later(self._hang_s, self._hangs)
            started = time.perf_counter()
            try:
                await loop.run_in_executor(self._executor, self._perform, waiting)
            except OSError as error:
                self._set_trouble(f"disk: {error}; nothing is acknowledged until it works")
                await self._pause(self._rng.uniform(0.5, 1.0) * retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
            else:
                self.last_sync_ms = (time.perf_counter() - started) * 1e3
                self.syncs += 1
                self._set_trouble("")
                self.busy = False
                return True
            finally:
                alarm.cancel()
        return False

    def stop(self) -> None:
        """Ends all retries; an operation in progress runs to its end."""
        self._stopping.set()

    async def close(self) -> None:
        self.stop()
        storage, self._storage = self._storage, None
        if storage is not None:
            loop = asyncio.get_running_loop()
            closing = loop.run_in_executor(self._executor, storage.close)
            await asyncio.wait({closing}, timeout=CLOSE_LIMIT_S)
        self._executor.shutdown(wait=False)

    def _perform(self, waiting: deque[DiskOp]) -> None:
        """Runs in the thread; leaves in `waiting` what is not yet durable."""
        storage = self._storage
        if storage is None:
            return
        while waiting:
            storage.perform(waiting[0])
            waiting.popleft()

    def _hangs(self) -> None:
        self._set_trouble(f"disk: a write takes longer than {self._hang_s:g} s")

    def _set_trouble(self, trouble: str) -> None:
        if bool(trouble) != bool(self.trouble):
            logger.warning("raft node %s: %s", self._name, trouble or "the disk works again")
        self.trouble = trouble
        if trouble:
            self._on_trouble()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
