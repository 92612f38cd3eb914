"""Stores that hang: they take threads of their own, never those of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores import threads
from distroml.runtime.checkpoint.stores.threads import StoreThreads
from tests.consensus.live import until


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_a_store_that_hangs_holds_up_no_other_and_is_used_again_once_it_answers(
    release: threading.Event,
) -> None:
    calls = StoreThreads("test", each=1)
    with pytest.raises(StoreError, match="file:///nfs has not answered"):
        await calls.run("file:///nfs", release.wait, 0.01)
    assert calls.busy("file:///nfs")
    begun: list[str] = []
    with pytest.raises(StoreError, match="not answered"):
        await calls.run("file:///nfs", lambda: begun.append("late"), 0.01)
    assert await calls.run("local", lambda: 7, 10.0) == 7
    release.set()
    await until(lambda: not calls.busy("file:///nfs"), "the store to be free again")
    assert await calls.run("file:///nfs", lambda: 8, 10.0) == 8
    assert begun == [], "nobody waited for it any more"


async def test_what_a_call_raises_is_raised(release: threading.Event) -> None:
    calls = StoreThreads("test", each=1)

    def fails() -> None:
        raise OSError("stale")

    with pytest.raises(OSError, match="stale"):
        await calls.run("local", fails, 10.0)


async def test_further_calls_wait_for_their_turn(release: threading.Event) -> None:
    calls = StoreThreads("test", each=2)
    running = [asyncio.create_task(calls.run("s3://x", release.wait, 10.0)) for _ in range(5)]
    await until(lambda: calls.busy("s3://x"), "two calls to be under way")
    release.set()
    assert await asyncio.gather(*running) == [True] * 5
    await until(lambda: not calls.busy("s3://x"), "all to be over")


async def test_stores_with_calls_under_way_are_bounded(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MAX_STORES", 2)
    calls = StoreThreads("test", each=1)
    hanging = [asyncio.create_task(calls.run(name, release.wait, 10.0)) for name in ("a", "b")]
    await until(lambda: calls.busy("a") and calls.busy("b"), "two stores to hang")
    with pytest.raises(StoreError, match="c is asked later"):
        await calls.run("c", lambda: None, 10.0)
    release.set()
    await asyncio.gather(*hanging)
