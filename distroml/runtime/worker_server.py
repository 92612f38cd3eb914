"""The agent's Unix socket that its workers connect to: frames in, frames out, nothing decided here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from distroml.runtime.control import FromWorker, Hello, ToWorker, encode_frame
from distroml.runtime.framing import BadFrame, read_messages
from distroml.runtime.spawner import WorkerId

HELLO_TIMEOUT_S = 10.0
MAX_WRITE_BACKLOG_BYTES = 8 * 1024 * 1024
"""A worker that does not read this much is cut off (it then exits and is replaced)."""
MAX_SOCKET_PATH_BYTES = 100
"""Linux takes 108 bytes; for a longer path a short one in the temporary directory is used."""

_log = logging.getLogger(__name__)


def socket_path(data_dir: Path, name: str = "agent") -> Path:
    """Where the agent with this data directory listens, or its forkserver; the same after each restart."""
    path = data_dir / f"{name}.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"distroml-{os.getuid()}-{digest}-{name}.sock"


class WorkerLink:
    """The connection with one worker."""

    def __init__(self, hello: Hello, writer: asyncio.StreamWriter) -> None:
        self.worker: WorkerId = (hello.run_id, hello.worker)
        self.hello = hello
        self.pid = hello.pid
        self._writer = writer

    def send(self, message: ToWorker) -> None:
        """Queue a message; a worker that has stopped reading is cut off."""
        if self._writer.is_closing():
            return
        self._writer.write(encode_frame(message))
        if self._writer.transport.get_write_buffer_size() > MAX_WRITE_BACKLOG_BYTES:
            _log.warning("worker %s does not read its control socket; cutting it off", self.worker)
            self._writer.transport.abort()

    def close(self) -> None:
        """Hang up; the worker exits when it notices."""
        self._writer.close()


class WorkerServer:
    """Accepts workers and hands their messages on.

    Args:
        path: of the socket; made anew at start.
        connected: called with each worker's link after its ``Hello``; returns False to refuse it.
        received: called with each later message; an exception closes the connection.
        closed: called in the end with the link of each worker that was not refused, and why the connection was
            closed; "" where the worker did it, mostly by ending.
    """

    def __init__(
        self,
        path: Path,
        *,
        connected: Callable[[WorkerLink], bool],
        received: Callable[[WorkerId, FromWorker], None],
        closed: Callable[[WorkerLink, str], None],
    ) -> None:
        self.path = path
        self._connected = connected
        self._received = received
        self._closed = closed
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on the socket, which only this user can open."""
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, path=self.path)
        os.chmod(self.path, 0o600)

    async def stop(self) -> None:
        """Hang up on everyone."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link: WorkerLink | None = None
        reason = ""
        try:
            messages = read_messages(reader, FromWorker)
            link = await self._meet(messages, writer)
            if link is None:
                return
            async for message in messages:
                self._received(link.worker, message)
        except (BadFrame, TimeoutError, StopAsyncIteration) as error:
            reason = str(error) or "no Hello came"
            _log.warning("a worker's control connection was closed: %s", reason)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            _log.exception("a worker's message could not be taken")
        finally:
            if link is not None:
                self._closed(link, reason)

    async def _meet(
        self, messages: AsyncIterator[FromWorker], writer: asyncio.StreamWriter
    ) -> WorkerLink | None:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = await anext(messages)
        if not isinstance(hello, Hello):
            raise BadFrame(f"expected Hello, got {type(hello).__name__}")
        link = WorkerLink(hello, writer)
        if self._connected(link):
            return link
        _log.info("worker %s (pid %d) is not wanted here any more", link.worker, link.pid)
        return None
