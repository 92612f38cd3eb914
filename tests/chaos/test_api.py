"""What a client knows after one request: surely done, surely not, or neither."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from aiohttp import web

from chaos.api import Api
from chaos.records import Outcome
from tests.fake_nodes import dying_node

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _hang_up(request: web.Request) -> web.StreamResponse:
    await request.read()
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _status(request: web.Request) -> web.StreamResponse:
    status = int(request.match_info["status"])
    body = {"type": "/problems/x", "detail": "told"} if status >= 400 else {"fine": True}
    return web.json_response(body, status=status, headers={"X-DistroML-Index": "7"})


async def _slow_problem(request: web.Request) -> web.StreamResponse:
    return web.json_response({"type": "/problems/store-error", "status": 502, "detail": "told"})


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/status/{status}", _status)
    app.router.add_route("*", "/hang-up", _hang_up)
    app.router.add_route("*", "/slow", _slow_problem)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/status/200", Outcome.OK),
        ("/status/202", Outcome.OK),
        ("/status/404", Outcome.FAILED),
        ("/status/409", Outcome.FAILED),
        ("/status/503", Outcome.FAILED),
        ("/status/500", Outcome.UNKNOWN),
        ("/status/504", Outcome.UNKNOWN),
        ("/hang-up", Outcome.UNKNOWN),
        ("/slow", Outcome.FAILED),
    ],
)
async def test_outcomes(url: str, path: str, outcome: Outcome) -> None:
    async with Api() as api:
        answer = await api.ask("POST", url, path, key="k", body={})
    assert answer.outcome is outcome, answer
    assert bool(answer.error) is (outcome is not Outcome.OK)
    if path.startswith("/status"):
        assert answer.index == 7


async def test_nobody_who_listens_was_not_asked() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with Api() as api:
            answer = await api.get(f"http://127.0.0.1:{taken.getsockname()[1]}", "/")
    assert answer.outcome is Outcome.FAILED


async def test_no_answer_in_time_says_nothing(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        async with Api() as api:
            silent = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            answer = await api.ask("POST", silent, "/", key="k", timeout_s=0.2)
    assert answer.outcome is Outcome.UNKNOWN


async def test_a_write_that_was_sent_before_the_node_died_may_have_had_an_effect() -> None:
    """What is idempotent is sent anew by the library where a kept connection was closed; that one is refused then."""
    async with dying_node() as url, Api() as api:
        assert (await api.ask("GET", url, "/")).ok
        answer = await api.ask("DELETE", url, "/", key="k")
    assert answer.outcome is Outcome.UNKNOWN
