"""A closed loop of HTTP clients that costs little itself: what both sides of a comparison are driven with.

Each client keeps one connection alive, sends a request, waits for its answer, and sends the next. Requests are made
beforehand or by a function, and of an answer only status and length are read, so that on a machine with few cores
the driver takes as little as can be from those that it measures.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec import Struct

from bench.processes import OUTPUT_TAIL_CHARACTERS, Broken, within
from bench.table import percentile

ANSWER_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 1024 * 1024

Endpoint = tuple[str, int]
"""Host and port."""


class Load(Struct, frozen=True):
    """What one closed loop measured."""

    latencies_s: list[float]
    wall_s: float

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies_s) / self.wall_s

    def ms(self, share: float) -> float:
        """A percentile of the latencies, in milliseconds."""
        return 1000 * percentile(self.latencies_s, share)


def post(path: str, body: bytes) -> bytes:
    """The bytes of one request with a JSON body."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def closed_loop(
    endpoints: Sequence[Endpoint], request: Callable[[], bytes], clients: int, seconds: float
) -> Load:
    """``clients`` connections, spread evenly over the endpoints, for ``seconds``.

    Args:
        request: makes the next request, whoever sends it.

    Raises:
        Broken: an answer was no 2xx, a connection ended, or an answer took longer than ``ANSWER_TIMEOUT_S``.
    """
    loop = asyncio.get_running_loop()
    latencies_s: list[float] = []
    run: list[_Client] = []
    try:
        async with within(seconds + ANSWER_TIMEOUT_S, f"the answers to {clients} clients"):
            for number in range(clients):
                client = _Client(request, latencies_s)
                run.append(client)
                host, port = endpoints[number % len(endpoints)]
                await loop.create_connection(partial(_itself, client), host, port)
            began = time.perf_counter()
            for client in run:
                client.start(until=began + seconds)
            await asyncio.gather(*(client.done for client in run))
    finally:
        for client in run:
            client.close()
    return Load(latencies_s, time.perf_counter() - began)


def _itself(client: _Client) -> _Client:
    return client


class _Client(asyncio.Protocol):
    def __init__(self, request: Callable[[], bytes], latencies_s: list[float]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._latencies_s = latencies_s
        self._transport: asyncio.Transport | None = None
        self._answer = b""
        self._until = 0.0
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self, until: float) -> None:
        self._until = until
        self._send()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        try:
            if not complete(self._answer):
                return
        except ValueError as error:
            self._fail(str(error))
            return
        now = time.perf_counter()
        self._latencies_s.append(now - self._sent_at)
        self._answer = b""
        if now < self._until:
            self._send()
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"a connection ended: {error or 'closed by the server'}")

    def _send(self) -> None:
        if self._transport is None or self._transport.is_closing():
            self._fail("a connection ended before its first request")
            return
        self._sent_at = time.perf_counter()
        self._transport.write(self._request())

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(Broken(why))


def complete(answer: bytes) -> bool:
    """Whether these bytes are one whole answer.

    Raises:
        ValueError: it is no 2xx, gives no length, or is longer than ``MAX_ANSWER_BYTES``.
    """
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        if len(answer) > MAX_ANSWER_BYTES:
            raise ValueError("an answer's head has no end")
        return False
    head = answer[:end].lower()
    at = head.find(b"\r\ncontent-length:")
    length = head[at + 17 :].split(b"\r\n", 1)[0].strip() if at >= 0 else b""
    if not length.isdigit() or int(length) > MAX_ANSWER_BYTES:
        raise ValueError(f"an answer gives no usable length: {_shown(answer)}")
    if len(answer) < end + 4 + int(length):
        return False
    if not head.startswith(b"http/1.1 2"):
        raise ValueError(f"a request was refused: {_shown(answer)}")
    return True


def _shown(answer: bytes) -> str:
    return answer[:OUTPUT_TAIL_CHARACTERS].decode(errors="replace")
