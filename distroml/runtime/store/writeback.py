"""Gets pending records to disk: one task, one thread, one batch at a time.

A batch is taken from the dirty streams in the event loop, written by the thread, and committed in the event loop,
so streams change in one thread only and a disk that stalls never stalls the node. Files that are to go are removed
by the same thread, after the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.segments import write_at
from distroml.runtime.store.streams import Stream, StreamWrite

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause after the disk refused a write."""


class Writeback:
    """Writes dirty streams and removes doomed files.

    Args:
        committed: called in the event loop with what has just become readable.
        segment_bytes: size at which a stream goes on in a new file.
        flush_s: how long a record may wait for a write to start.
    """

    def __init__(
        self, committed: Callable[[list[StreamWrite]], None], *, segment_bytes: int, flush_s: float
    ) -> None:
        self.pending_bytes = 0
        """Accepted and not yet written, of all streams that live."""
        self._committed = committed
        self._segment_bytes = segment_bytes
        self._flush_s = flush_s
        self._dirty: dict[StreamKey, Stream] = {}
        self._doomed: list[Path] = []
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread: ThreadPoolExecutor | None = None
        self._task: asyncio.Task[None] | None = None

    def mark(self, stream: Stream) -> None:
        """Have a stream written if it has something to write."""
        if stream.dirty:
            self._dirty[stream.key] = stream
            self._awaken()

    def doom(self, paths: Iterable[Path]) -> None:
        """Have files or directories removed."""
        self._doomed += paths
        if self._doomed:
            self._awaken()

    def forget(self, stream: Stream) -> None:
        """Do not write what is pending of a stream; what is in flight is ignored when it is done."""
        stream.dead = True
        self.pending_bytes -= stream.pending_bytes
        if self._dirty.get(stream.key) is stream:
            del self._dirty[stream.key]

    def start(self) -> None:
        """Write in the background from now on."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._task = asyncio.create_task(self._run(), name="history-writeback")

    async def close(self) -> None:
        """Stop the background task, then write what is pending."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
            self._thread = None
        self.flush()

    def hurry(self) -> None:
        """Begin to write what waits, without waiting for more."""
        if self._dirty:
            self._hurry.set()

    async def settled(self) -> None:
        """Return once everything accepted and doomed so far is dealt with."""
        await self._idle.wait()

    def flush(self) -> None:
        """Write all that is pending, now and in this thread.

        Raises:
            RuntimeError: the background task is running.
        """
        if self._task is not None:
            raise RuntimeError("flush() is for a store whose background task is not running")
        batch = self._take()
        self._commit(batch, _write(batch, self._take_doomed()))
        _write([], self._take_doomed())
        self._rest()

    def _awaken(self) -> None:
        self._idle.clear()
        self._wake.set()

    def _rest(self) -> None:
        if not self._dirty and not self._doomed:
            self._idle.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._flush_s):
                    await self._hurry.wait()
            self._wake.clear()
            self._hurry.clear()
            batch, doomed = self._take(), self._take_doomed()
            loop = asyncio.get_running_loop()
            write = loop.run_in_executor(self._thread, _write, batch, doomed)
            try:
                failed = await asyncio.shield(write)
            except asyncio.CancelledError:
                # the thread goes on regardless, and close() must know what it wrote
                self._commit(batch, await write)
                raise
            self._commit(batch, failed)
            self._rest()
            if failed:
                await asyncio.sleep(RETRY_S)

    def _take(self) -> list[StreamWrite]:
        dirty, self._dirty = self._dirty, {}
        return [stream.take(self._segment_bytes) for stream in dirty.values()]

    def _take_doomed(self) -> list[Path]:
        doomed, self._doomed = self._doomed, []
        return doomed

    def _commit(self, batch: list[StreamWrite], failed: dict[StreamKey, OSError]) -> None:
        done: list[StreamWrite] = []
        for write in batch:
            stream = write.stream
            error = failed.get(stream.key)
            if stream.dead or error is None:
                self.pending_bytes -= sum(map(len, write.records))
            if stream.dead:
                continue
            if error is not None:
                log.error("history: cannot write %s: %s; trying again", stream.key, error)
                stream.abort(write)
                with contextlib.suppress(OSError):
                    stream.directory.mkdir(parents=True, exist_ok=True)
            else:
                stream.commit(write)
                done.append(write)
            self.mark(stream)
        self._committed(done)


def _write(batch: list[StreamWrite], doomed: list[Path]) -> dict[StreamKey, OSError]:
    """Runs on the thread; touches files only. Returns the streams that could not be written."""
    failed: dict[StreamKey, OSError] = {}
    for write in batch:
        try:
            for path, offset, data in write.writes:
                write_at(path, offset, data)
        except OSError as error:
            failed[write.stream.key] = error
    for path in doomed:
        # a file that stays is found again when the job is next opened or removed
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return failed
