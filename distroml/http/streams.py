"""WebSocket and Server-Sent Events over the one source of ``messages``.

A reader that does not take what was sent within ``stream_send_timeout_s`` is dropped (WebSocket close code 1013)
and may resume with its cursor; nobody waits for it. At the node's shutdown streams close with 1001.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import aclosing, suppress

from aiohttp import WSCloseCode, WSMsgType, web

from distroml.errors import InvalidRequest, NotFound
from distroml.http.limits import Read
from distroml.http.messages import HEARTBEAT, Message, MessageType, Reader
from distroml.http.table import Call

MAX_CLIENT_MESSAGE_BYTES = 4096
MAX_CLIENT_MESSAGES = 1000
"""A stream goes one way; what a client says is ignored, up to this many messages."""
CLOSE_GRACE_S = 1.0
"""How long a client may take to answer the close frame."""
DROP_GRACE_S = 5.0
"""How long a dropped reader may take to fetch its close frame before the connection is reset."""
SSE_RETRY_MS = 1000

_log = logging.getLogger(__name__)


class StreamQuery(Read, frozen=True, kw_only=True):
    """Parameters of a stream."""

    cursor: str | None = None
    """From a message seen before: resume right after it, at any node. ``now``: only what is new, after the present state."""
    types: tuple[str, ...] = ()
    """Comma list of message types; all by default. ``end`` is always sent, and with ``cursor=now`` the first state."""


class SlowReader(Exception):
    """The client did not take what was sent in time."""


async def stream(call: Call, query: StreamQuery) -> web.StreamResponse:
    """A WebSocket where the client asks for an upgrade, Server-Sent Events otherwise."""
    if call.request.headers.get("Upgrade", "").lower() == "websocket":
        return await _websocket(call, query)
    return await events(call, query)


async def events(call: Call, query: StreamQuery) -> web.StreamResponse:
    """Server-Sent Events; ``Last-Event-ID`` resumes like ``cursor``."""
    last = call.request.headers.get("Last-Event-ID")
    reader = await _open(call, last or query.cursor, query.types)
    with call.streams.enter():
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(call.request)
        sending = asyncio.create_task(_send_events(call, response, reader))
        code, reason = await _until_over(call, sending)
        if code in (WSCloseCode.OK, WSCloseCode.GOING_AWAY):
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE_S):
                    await response.write_eof(f": {reason}\n\n".encode())
        else:
            _drop(call.request)
    return response


async def _websocket(call: Call, query: StreamQuery) -> web.StreamResponse:
    reader = await _open(call, query.cursor, query.types)
    socket = web.WebSocketResponse(
        heartbeat=call.settings.stream_heartbeat_s,
        timeout=CLOSE_GRACE_S,
        max_msg_size=MAX_CLIENT_MESSAGE_BYTES,
        compress=False,
    )
    if not socket.can_prepare(call.request).ok:
        raise InvalidRequest("This is not a valid WebSocket handshake.", field="Upgrade")
    with call.streams.enter():
        await socket.prepare(call.request)
        sending = asyncio.create_task(_send_frames(call, socket, reader))
        code, reason = await _until_over(call, sending, asyncio.create_task(_listen(socket)))
        with suppress(ConnectionError):
            await socket.close(code=code, message=reason.encode(), drain=False)
        if code == WSCloseCode.TRY_AGAIN_LATER:
            _drop(call.request)
    return socket


async def _send_frames(call: Call, socket: web.WebSocketResponse, reader: Reader) -> None:
    async with aclosing(reader.follow()) as messages:
        async for message in messages:
            if message is not HEARTBEAT:
                await _sent(call, socket.send_str(message.data.decode()))


async def _send_events(call: Call, response: web.StreamResponse, reader: Reader) -> None:
    await _sent(call, response.write(f"retry: {SSE_RETRY_MS}\n\n".encode()))
    async with aclosing(reader.follow()) as messages:
        async for message in messages:
            await _sent(call, response.write(_sse(message)))


async def _until_over(
    call: Call, sending: asyncio.Task[None], listening: asyncio.Task[None] | None = None
) -> tuple[int, str]:
    """Waits for the first end of a stream; says which as a WebSocket close code and reason."""
    closing = asyncio.create_task(call.closing.wait())
    tasks = {sending, closing, *((listening,) if listening else ())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if closing.done():
            return WSCloseCode.GOING_AWAY, "the node is shutting down; resume at another one"
        if not sending.done():
            return WSCloseCode.OK, "closed by the client"
        await sending
    except SlowReader:
        return WSCloseCode.TRY_AGAIN_LATER, "slow reader"
    except ConnectionError:
        return WSCloseCode.ABNORMAL_CLOSURE, ""
    except Exception:
        _log.exception("stream of job %s failed", call.request.match_info["job_id"])
        return WSCloseCode.INTERNAL_ERROR, "a defect of this node"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return WSCloseCode.OK, "end of stream"


async def _listen(socket: web.WebSocketResponse) -> None:
    """Until the client closes or says too much; control frames are answered on the way."""
    for _ in range(MAX_CLIENT_MESSAGES):
        message = await socket.receive()
        if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
            return


async def _open(call: Call, cursor: str | None, types: tuple[str, ...]) -> Reader:
    job_id = call.job_id
    job = call.services.state().jobs.get(job_id)
    if job is None:
        raise NotFound(f"There is no job '{job_id}'.", field="job_id")
    return await Reader.open(call.services, job, cursor, _types(types))


def _types(given: tuple[str, ...]) -> frozenset[MessageType]:
    names = [name for part in given for name in part.split(",")]
    try:
        return frozenset(MessageType(name) for name in names) or frozenset(MessageType)
    except ValueError:
        known = ", ".join(MessageType)
        raise InvalidRequest(
            f"types must be a comma list of: {known}; {','.join(names)[:100]!r} was given.",
            field="types",
        ) from None


async def _sent(call: Call, sent: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(call.settings.stream_send_timeout_s):
            await sent
    except TimeoutError:
        raise SlowReader from None


def _sse(message: Message) -> bytes:
    if message is HEARTBEAT:
        return b":\n\n"
    head = f"event: {message.type}\n"
    if message.cursor:
        head += f"id: {message.cursor}\n"
    return head.encode() + b"data: " + message.data + b"\n\n"


def _drop(request: web.Request) -> None:
    """Close the connection even if the client never reads what is on its way."""
    transport = request.transport
    if transport is not None:
        transport.close()
        asyncio.get_running_loop().call_later(DROP_GRACE_S, transport.abort)
