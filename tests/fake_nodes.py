"""Small HTTP servers that stand in for nodes: each answers by a function and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeNode:
    """One server; ``asked`` holds (method, path, query, Idempotency-Key, body) of each request."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, str, dict[str, str], str | None, bytes]] = []
        self._answer = answer
        self._server: TestServer | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return str(self._server.make_url("")).rstrip("/")

    @property
    def keys(self) -> list[str | None]:
        return [key for *_, key, _ in self.asked]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._server = TestServer(app)
        await self._server.start_server()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Idempotency-Key")
        body = await request.read()
        self.asked.append((request.method, request.path, dict(request.query), key, body))
        return await self._answer(request)


@asynccontextmanager
async def fake_nodes(*answers: Answer) -> AsyncIterator[list[FakeNode]]:
    """A running server per answer."""
    nodes = [FakeNode(answer) for answer in answers]
    try:
        for node in nodes:
            await node.start()
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


def says(document: Any, status: int = 200, **headers: str) -> Answer:
    """Always this JSON document."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(document, status=status, headers=headers)

    return answer


def problem(slug: str, status: int, detail: str, **extra: Any) -> Answer:
    """Always this problem document."""
    return says({"type": f"/problems/{slug}", "status": status, "detail": detail, **extra}, status)


async def dies(request: web.Request) -> web.StreamResponse:
    """Takes the request and closes the connection without a word."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@asynccontextmanager
async def dying_node() -> AsyncIterator[str]:
    """The URL of a node that answers one request and dies of the next one on the same connection, once it has read it."""
    server: asyncio.Server | None = None

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"\r\n\r\n")
        assert server is not None
        server.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.close()
