"""Answers that take longer than a client waits for the first byte.

JSON may begin with white space: while the work goes on, a space is sent now and then, so that the client knows that this
node lives. Once that has begun the status is 200; an error that comes later is a problem document in the body, and its
``status`` member is what counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
from aiohttp import web

from distroml.errors import DistroMLError
from distroml.http import limits, problems
from distroml.http.table import Call, json_response

FIRST_WORD_S = 1.0
"""Until then an answer is an ordinary one."""
BEAT_S = 2.0
MAX_WORK_S = 4 * 3600.0


async def patient_answer(call: Call, work: Coroutine[Any, Any, Any]) -> web.StreamResponse:
    """The JSON of what ``work`` returns, however long that takes within ``MAX_WORK_S``."""
    doing = asyncio.create_task(work)
    try:
        await asyncio.wait([doing], timeout=FIRST_WORD_S)
        if doing.done():
            return json_response(doing.result())
        return await _beating(call, doing)
    finally:
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)


async def _beating(call: Call, doing: asyncio.Task[Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": limits.JSON_TYPE})
    await response.prepare(call.request)
    closing = asyncio.create_task(call.closing.wait())
    try:
        async with asyncio.timeout(MAX_WORK_S):
            while not doing.done() and not closing.done():
                await response.write(b" ")
                await asyncio.wait(
                    [doing, closing], timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED
                )
        body = _body(call.request, doing)
    except TimeoutError:
        body = _problem(call.request, DistroMLError(f"It was not done within {MAX_WORK_S:g} s."))
    finally:
        closing.cancel()
    if body is not None:
        await response.write_eof(body)
    elif call.request.transport is not None:
        call.request.transport.close()  # the node stops: the client asks another one
    return response


def _body(request: web.Request, doing: asyncio.Task[Any]) -> bytes | None:
    if not doing.done():
        return None
    try:
        return msgspec.json.encode(doing.result())
    except DistroMLError as error:
        return _problem(request, error)
    except Exception as error:
        return bytes(problems.respond_defect(request, error).body or b"")  # type: ignore[arg-type]


def _problem(request: web.Request, error: DistroMLError) -> bytes:
    return bytes(problems.respond(request, error).body or b"")  # type: ignore[arg-type]
