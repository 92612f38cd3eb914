"""Clients of stores: one per place, and one place's troubles are no other's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from distroml.runtime.checkpoint.stores import s3_client
from distroml.runtime.checkpoint.stores.loop_thread import LoopThread
from distroml.runtime.checkpoint.stores.s3_client import Place, Refused, Requests

WAIT_S = 10.0


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    made = LoopThread()
    yield made
    made.close()


async def hang(stack: AsyncExitStack) -> None:
    await asyncio.Event().wait()


def making(client: object) -> Callable[[AsyncExitStack], Awaitable[object]]:
    async def make(stack: AsyncExitStack) -> object:
        await asyncio.sleep(0)
        return client

    return make


def test_a_place_that_cannot_be_connected_holds_up_no_other(thread: LoopThread) -> None:
    known = thread.submit(thread.client("known", making("first"))).result(WAIT_S)
    waiting = thread.submit(thread.client("hangs", hang))
    assert thread.submit(thread.client("known", hang)).result(WAIT_S) is known
    assert thread.submit(thread.client("new", making("second"))).result(WAIT_S) == "second"
    assert not waiting.done()


def test_many_first_requests_make_one_client(thread: LoopThread) -> None:
    begun: list[int] = []

    async def make(stack: AsyncExitStack) -> object:
        begun.append(1)
        await asyncio.sleep(0)
        return object()

    async def many() -> list[object]:
        return await asyncio.gather(*(thread.client("place", make) for _ in range(9)))

    assert len(set(thread.submit(many()).result(WAIT_S))) == len(begun) == 1


def test_who_gives_up_spoils_it_for_nobody(thread: LoopThread) -> None:
    async def first_gives_up() -> object:
        connected = asyncio.Event()

        async def make(stack: AsyncExitStack) -> object:
            await connected.wait()
            return "made"

        first = asyncio.create_task(thread.client("place", make))
        second = asyncio.create_task(thread.client("place", make))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        connected.set()
        return await second

    assert thread.submit(first_gives_up()).result(WAIT_S) == "made"


def test_after_a_failure_it_is_tried_anew(thread: LoopThread) -> None:
    async def fail(stack: AsyncExitStack) -> object:
        raise OSError("no credentials")

    with pytest.raises(OSError, match="no credentials"):
        thread.submit(thread.client("place", fail)).result(WAIT_S)
    assert thread.submit(thread.client("place", making("made"))).result(WAIT_S) == "made"


def test_connecting_counts_as_part_of_a_requests_attempt(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests("s3://bucket", Place("http://127.0.0.1:9", "", "", "", ""))
    monkeypatch.setattr(s3_client, "loop_thread", lambda: thread)
    monkeypatch.setattr(s3_client, "attempt_timeout_s", lambda size_bytes: 0.05)
    monkeypatch.setattr(s3_client, "pause_s", lambda attempt, *times: 0 if attempt < 3 else None)
    monkeypatch.setattr(requests, "_connect", hang)

    async def never(client: Any) -> None:
        raise AssertionError

    with pytest.raises(Refused) as caught:
        thread.submit(requests.send(never)).result(WAIT_S)
    assert caught.value.attempts == 3
