"""The agent's Unix socket that its workers connect to: frames in, frames out, nothing decided here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from distroml.errors import UNDECODABLE
from distroml.runtime.control import FrameReader, FromWorker, Hello, ToWorker, encode_frame
from distroml.runtime.spawner import WorkerId

HELLO_TIMEOUT_S = 10.0
READ_BYTES = 64 * 1024
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

    def __init__(self, hello: Hello, transport: asyncio.WriteTransport) -> None:
        self.worker: WorkerId = (hello.run_id, hello.worker)
        self.hello = hello
        self.pid = hello.pid
        self._transport = transport

    def send(self, message: ToWorker) -> None:
        """Queue a message; a worker that has stopped reading is cut off."""
        if self._transport.is_closing():
            return
        self._transport.write(encode_frame(message))
        if self._transport.get_write_buffer_size() > MAX_WRITE_BACKLOG_BYTES:
            _log.warning("worker %s does not read its control socket; cutting it off", self.worker)
            self._transport.abort()

    def close(self) -> None:
        """Hang up; the worker exits when it notices."""
        self._transport.close()


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
        self._connections: set[_Connection] = set()
        self._buffer = memoryview(bytearray(READ_BYTES))
        """For all connections: each takes what it has read before another one reads."""

    async def start(self) -> None:
        """Listen on the socket, which only this user can open."""
        self.path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self), path=self.path)
        os.chmod(self.path, 0o600)

    async def stop(self) -> None:
        """Hang up on everyone."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.end("")
        self.path.unlink(missing_ok=True)


class _Connection(asyncio.BufferedProtocol):
    """Reads into a buffer that is there: asyncio's streams take 256 KiB of fresh memory for each read of a few bytes."""

    def __init__(self, server: WorkerServer) -> None:
        self._server = server
        self._frames: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._link: WorkerLink | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._server._connections.add(self)
        loop = asyncio.get_running_loop()
        self._waiting = loop.call_later(HELLO_TIMEOUT_S, self._end_badly, "no Hello came")

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            messages = self._frames.feed(self._server._buffer[:nbytes])
            for message in messages:
                if self._transport is None:
                    return
                self._take(message)
        except UNDECODABLE as error:
            self._end_badly(str(error))
        except Exception as error:
            _log.exception("a worker's message could not be taken")
            self.end(f"{type(error).__name__}: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.end("")

    def end(self, reason: str) -> None:
        """Hang up, once, and say why; "" where the worker did it."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        if self._waiting is not None:
            self._waiting.cancel()
        transport.close()
        self._server._connections.discard(self)
        if self._link is not None:
            self._server._closed(self._link, reason)

    def _end_badly(self, reason: str) -> None:
        _log.warning("a worker's control connection was closed: %s", reason)
        self.end(reason)

    def _take(self, message: FromWorker) -> None:
        if self._link is not None:
            self._server._received(self._link.worker, message)
        elif isinstance(message, Hello):
            self._meet(message)
        else:
            self._end_badly(f"expected Hello, got {type(message).__name__}")

    def _meet(self, hello: Hello) -> None:
        assert self._transport is not None
        assert self._waiting is not None
        self._waiting.cancel()
        link = WorkerLink(hello, self._transport)
        if self._server._connected(link):
            self._link = link
        else:
            _log.info("worker %s (pid %d) is not wanted here any more", link.worker, link.pid)
            self.end("")
