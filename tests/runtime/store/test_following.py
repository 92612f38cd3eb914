"""Cursors mean the same everywhere and stay small; following neither loses nor repeats."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.errors import InvalidRequest
from distroml.runtime.store.cursors import (
    KEPT_GENERATIONS,
    MAX_POSITIONS,
    Position,
    RunPosition,
    parse_token,
)
from distroml.runtime.store.following import Entry, Follower, follow
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import KINDS, StreamKey
from distroml.runtime.store.retention import HistoryLimits
from tests.runtime.store.histories import JOB, key, lines, metric

LIMIT_S = 10.0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[HistoryStore]:
    async with HistoryStore(tmp_path, HistoryLimits(flush_s=0.001)) as opened:
        yield opened


async def take(follower: Follower, count: int) -> list[Entry]:
    """The next ``count`` entries; fails when they do not come."""
    found: list[Entry] = []
    try:
        async with asyncio.timeout(LIMIT_S):
            while len(found) < count:
                found.append(await anext(follower))
    except TimeoutError:
        raise AssertionError(f"waited for {count} entries, got {len(found)}") from None
    return found


async def write(
    store: HistoryStore, stream: StreamKey, start: int, end: int, at: float = 0
) -> None:
    assert store.append(stream, start, lines(start, end, at)) == end
    await store.settled()


keys = st.builds(
    StreamKey,
    st.just(JOB),
    st.sampled_from(["run-1", "run_2"]),
    st.integers(0, 40),
    st.integers(0, 5),
    st.sampled_from(KINDS),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(keys, st.integers(1, 2**50)), st.dictionaries(st.just("run-1"), st.just(3)))
def test_tokens_come_back_as_they_were(
    next_seqs: dict[StreamKey, int], floors: dict[str, int]
) -> None:
    position = Position.at(JOB, next_seqs)
    for run_id, floor in floors.items():
        position.runs.setdefault(run_id, RunPosition()).floor = floor
    again = parse_token(position.token(), JOB)
    assert again == position
    assert again.token() == position.token()
    assert position.token().replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize(
    "token",
    [
        "",
        "!",
        "abc",
        "é",
        "A" * 40_000,
        base64.urlsafe_b64encode(msgspec.msgpack.encode([1, JOB, [["run", -1, []]]])).decode(),
        base64.urlsafe_b64encode(
            msgspec.msgpack.encode([1, JOB, [["run", 0, [[1, [{}]]]]]])
        ).decode(),
        base64.urlsafe_b64encode(msgspec.msgpack.encode([9, JOB, []])).decode(),
        Position("other").token(),
    ],
)
def test_what_is_no_cursor_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor") as caught:
        parse_token(token, JOB)
    assert caught.value.field == "cursor"


def test_old_generations_read_to_the_end_are_folded() -> None:
    heads = {key(rank, generation): 10 for generation in range(1, 21) for rank in range(4)}
    position = Position.at(JOB, {**heads, key(2, 9): 8})
    position.fold(heads)
    assert position.runs["run-1"].floor == 9
    assert position.wanted(key(2, 8)) is None
    assert position.wanted(key(2, 9)) == 8
    position.advance(key(2, 9), 10)
    position.fold(heads)
    assert list(position.runs["run-1"].generations) == list(range(21 - KEPT_GENERATIONS, 21))


def test_a_token_stays_bounded_whatever_happens() -> None:
    heads = {key(rank, generation): 2**40 for generation in range(1, 301) for rank in range(16)}
    position = Position.at(JOB, dict.fromkeys(heads, 5))
    position.fold(heads)
    assert position.streams() <= MAX_POSITIONS
    assert parse_token(position.token(), JOB) == position


def test_a_cursor_costs_no_more_steps_where_there_are_more_ranks(tmp_path: Path) -> None:
    """Each message of a stream has one of its own."""

    def steps(ranks: int, generations: int) -> int:
        heads = {
            key(rank, generation, kind): 10
            for generation in range(1, generations + 1)
            for rank in range(ranks)
            for kind in KINDS
        }
        follower = Follower(HistoryStore(tmp_path), Position.at(JOB, heads))
        follower.cursor()  # folds once what it began with
        events: list[str] = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            follower.cursor()
        finally:
            sys.setprofile(None)
        return len(events)

    assert max(steps(1, 1), steps(64, 4), steps(1024, 1)) < 200


async def test_replays_then_goes_on_live(store: HistoryStore) -> None:
    await write(store, key(), 0, 5)
    follower = follow(store, JOB)
    assert [entry.seq for entry in await take(follower, 5)] == [0, 1, 2, 3, 4]
    assert follower.caught_up()
    assert await follower.batch(timeout_s=0) == []
    await write(store, key(), 5, 8)
    assert not follower.caught_up()
    assert await take(follower, 3) == [
        Entry(key(), seq, record) for seq, record in enumerate(lines(5, 8), 5)
    ]
    follower.close()
    assert await follower.batch() == []


async def test_a_follower_that_waits_gets_what_comes(store: HistoryStore) -> None:
    follower = follow(store, JOB)
    waiting = asyncio.create_task(take(follower, 4))
    await asyncio.sleep(0)
    for start in range(4):
        await write(store, key(rank=start), 0, 1)
    assert {entry.key.rank for entry in await waiting} == {0, 1, 2, 3}


async def test_replay_is_in_order_of_time_within_a_generation(store: HistoryStore) -> None:
    store.append(key(0, 1), 0, lines(0, 50, at=100))
    store.append(key(1, 1), 0, lines(0, 50, at=100.5))
    store.append(key(0, 1, "metrics"), 0, [metric(n, at=100.25 + n, loss=1) for n in range(50)])
    store.append(key(0, 2), 0, lines(0, 5, at=50))
    await store.settled()
    entries = await take(follow(store, JOB), 155)
    assert [e.key.rank if e.key.kind == "logs" else "m" for e in entries[:6]] == [0, "m", 1] * 2
    assert [entry.key.generation for entry in entries] == [1] * 150 + [2] * 5


async def test_a_cursor_resumes_at_any_entry_and_any_node(tmp_path: Path) -> None:
    streams = [
        key(rank, generation, kind) for rank in (0, 1) for generation in (1, 2) for kind in KINDS
    ]
    stores = [HistoryStore(tmp_path / name, HistoryLimits(segment_bytes=400)) for name in "ab"]
    for store in stores:
        for stream in streams:
            store.append(stream, 0, lines(0, 30))
        store.flush()
    whole = await take(follow(stores[0], JOB), 240)
    assert len(set(whole)) == 240
    for cut in (0, 1, 77, 120, 239, 240):
        follower = follow(stores[0], JOB)
        before = await take(follower, cut)
        after = await take(follow(stores[1], JOB, follower.cursor()), 240 - cut)
        assert before + after == whole


async def test_a_node_that_is_behind_waits_for_what_the_client_lacks(store: HistoryStore) -> None:
    await write(store, key(), 0, 3)
    cursor = Position.at(JOB, {key(): 6}).token()
    follower = follow(store, JOB, cursor)
    assert await follower.batch(timeout_s=0.01) == []
    await write(store, key(), 3, 8)
    assert [entry.seq for entry in await take(follower, 2)] == [6, 7]


async def test_a_slow_follower_goes_on_from_disk_without_loss(store: HistoryStore) -> None:
    follower = follow(store, JOB)
    await write(store, key(), 0, 1)
    assert [entry.seq for entry in await take(follower, 1)] == [0]
    assert await follower.batch(timeout_s=0) == []  # it is live now
    big = [b"x" * 50_000] * 60
    for seq in range(1, 61):
        store.append(key(), seq, big[seq - 1 : seq])
        await store.settled()
    assert [entry.seq for entry in await take(follower, 60)] == list(range(1, 61))
    await write(store, key(), 61, 63)
    assert [entry.seq for entry in await take(follower, 2)] == [61, 62]


async def test_records_that_were_dropped_are_passed_over(store: HistoryStore) -> None:
    await write(store, key(), 0, 3)
    follower = follow(store, JOB)
    await take(follower, 3)
    assert await follower.batch(timeout_s=0) == []
    assert store.skip_to(key(), 100) == 100
    await store.settled()
    await write(store, key(), 100, 102)
    assert [entry.seq for entry in await take(follower, 2)] == [100, 101]


async def test_kinds_and_from_now(store: HistoryStore) -> None:
    await write(store, key(), 0, 3)
    logs = follow(store, JOB, kinds=("logs",), from_now=True)
    store.append(key(kind="metrics"), 0, [metric(1, loss=1.0)])
    await write(store, key(), 3, 4)
    assert await take(logs, 1) == [Entry(key(), 3, lines(3, 4)[0])]
    assert await logs.batch(timeout_s=0) == []


async def test_removal_ends_a_live_follower(store: HistoryStore) -> None:
    await write(store, key(), 0, 1)
    follower = follow(store, JOB)
    await take(follower, 1)
    assert await follower.batch(timeout_s=0) == []
    store.remove(JOB)
    assert await follower.batch(timeout_s=LIMIT_S) == []
    assert follower.ended


@settings(max_examples=50, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 6), st.integers(0, 9)),
        max_size=25,
    )
)
def test_any_mix_of_writing_taking_and_resuming_delivers_each_once(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[int, int, int, int]]
) -> None:
    async def scenario() -> None:
        store = HistoryStore(tmp_path_factory.mktemp("mix"), HistoryLimits(segment_bytes=200))
        follower = follow(store, JOB)
        seen: list[tuple[StreamKey, int]] = []
        for rank, generation, count, taking in plan:
            stream = key(rank, generation)
            start = store.next_seq(stream)
            store.append(stream, start, lines(start, start + count))
            store.flush()
            if taking == 9:
                follower.close()
                follower = follow(store, JOB, follower.cursor())
            for _ in range(taking % 9):
                if follower.caught_up():
                    break
                seen.append((await anext(follower))[:2])
        while not follower.caught_up():
            seen.append((await anext(follower))[:2])
        assert sorted(seen) == sorted(
            (stream, seq) for stream, head in store.heads(JOB).items() for seq in range(head)
        )

    asyncio.run(scenario())
