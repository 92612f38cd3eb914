"""Series merged over generations and thinned; latest values; log lines by tail and by page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.errors import InvalidRequest
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.queries import COLUMN_POINTS, MAX_NAMES, HistoryQueries
from distroml.runtime.store.records import MAX_LINE_CHARACTERS, decode_log, encode_log
from distroml.runtime.store.retention import HistoryLimits
from distroml.runtime.store.series import Column, MetricPoint, merge, thin
from tests.runtime.store.histories import JOB, key, lines, metric


async def points_of(queries: HistoryQueries, *args: Any, **options: Any) -> list[MetricPoint]:
    return (await queries.metric_series(*args, **options)).points


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path, HistoryLimits(segment_bytes=2000))


def train(
    store: HistoryStore, generation: int, steps: range, rank: int = 0, **values: float
) -> None:
    stream = key(rank, generation, "metrics")
    start = store.next_seq(stream)
    records = [metric(step, loss=1000.0 * generation + step, **values) for step in steps]
    store.append(stream, start, records)
    store.flush()


async def test_each_step_has_the_value_of_the_highest_generation(store: HistoryStore) -> None:
    queries = HistoryQueries(store)
    train(store, 1, range(1, 151))
    train(store, 2, range(101, 131))
    points = await points_of(queries, JOB, "loss")
    assert [point.step for point in points] == list(range(1, 151))
    assert {point.generation for point in points if 101 <= point.step <= 130} == {2}
    assert {point.generation for point in points if not 101 <= point.step <= 130} == {1}
    train(store, 2, range(131, 201))
    points = await points_of(queries, JOB, "loss", from_step=120, to_step=180)
    assert [(point.step, point.value) for point in points] == [
        (step, 2000.0 + step) for step in range(120, 181)
    ]


async def test_what_rank_0_lost_another_rank_told_again(store: HistoryStore) -> None:
    queries = HistoryQueries(store)
    train(store, 1, range(1, 5))
    train(store, 2, range(1, 8), rank=3)
    train(store, 2, range(8, 10))
    assert [point.step for point in await points_of(queries, JOB, "loss")] == list(range(1, 10))


async def test_series_of_ranks_and_unknown_names(store: HistoryStore) -> None:
    queries = HistoryQueries(store)
    train(store, 1, range(1, 5), rank=0)
    train(store, 1, range(1, 5), rank=1, throughput=7.0)
    assert [p.value for p in await points_of(queries, JOB, "throughput")] == [7.0] * 4
    assert await points_of(queries, JOB, "throughput", rank=0) == []
    assert await points_of(queries, JOB, "nothing") == []
    assert await points_of(queries, "unknown", "loss") == []
    assert await queries.metric_names(JOB) == (["loss", "throughput"], True)
    with pytest.raises(InvalidRequest, match="max_points"):
        await queries.metric_series(JOB, "loss", max_points=0)


async def test_latest_metrics_follow_the_newest_generation(store: HistoryStore) -> None:
    queries = HistoryQueries(store)
    assert await queries.latest_metrics(JOB) == {}
    train(store, 1, range(1, 11), accuracy=0.5)
    train(store, 2, range(5, 8))
    latest = await queries.latest_metrics(JOB)
    assert (latest["loss"].step, latest["loss"].generation) == (7, 2)
    assert (latest["accuracy"].step, latest["accuracy"].value) == (10, 0.5)


async def test_a_small_index_gives_the_same_answers(store: HistoryStore) -> None:
    queries = HistoryQueries(store, index_points=1)
    for rank in range(3):
        train(store, 1, range(1, 50), rank=rank)
    for rank in (0, 1, 2, 0):
        assert len(await points_of(queries, JOB, "loss", rank=rank)) == 49


async def test_the_index_is_bounded_where_each_step_has_names_of_its_own(
    store: HistoryStore,
) -> None:
    for rank in (0, 1):
        records = [
            metric(step, loss=1 / step, **{f"rank_{rank}/batch_{step}": 1.0})
            for step in range(1, 2001)
        ]
        store.append(key(rank, kind="metrics"), 0, records)
    store.flush()
    queries = HistoryQueries(store)
    names, complete = await queries.metric_names(JOB)
    assert (len(names), complete) == (MAX_NAMES, False)
    assert (await queries.metric_series(JOB, "loss")).total == 2000
    assert all(len(index.columns) == MAX_NAMES for index in queries._indexes.values())
    small = HistoryQueries(store, index_points=MAX_NAMES * COLUMN_POINTS)
    await points_of(small, JOB, "loss")
    assert len(small._indexes) == 1, "columns are charged for more than their points"


async def test_names_of_very_many_ranks_are_bounded(store: HistoryStore) -> None:
    for rank in range(40):
        values = {f"rank_{rank}/{number}": 1.0 for number in range(64)}
        store.append(key(rank, kind="metrics"), 0, [metric(1, **values)])
    store.flush()
    names, complete = await HistoryQueries(store).metric_names(JOB)
    assert (len(names), complete) == (MAX_NAMES, False)
    assert "rank_0/63" in names


async def test_trimmed_and_unreadable_records_are_passed_over(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, HistoryLimits(segment_bytes=500, metric_stream_bytes=3000))
    store.append(key(kind="metrics"), 0, [b"\xc1 no record"])
    for step in range(1, 300):
        train(store, 1, range(step, step + 1))
    points = await points_of(HistoryQueries(store), JOB, "loss")
    assert points[-1].step == 299
    assert len(points) == 300 - store.first_seq(key(kind="metrics"))


steps = st.lists(st.integers(0, 60), max_size=20, unique=True).map(sorted)


@given(st.lists(steps, max_size=5), st.integers(0, 60), st.integers(0, 60))
def test_merging_covers_each_step_once_with_the_newest(
    generations: list[list[int]], low: int, high: int
) -> None:
    columns: list[Column] = []
    for number, of_generation in enumerate(generations):
        columns.append(Column(number))
        for step in of_generation:
            columns[-1].add(step, float(number), 0.0)
    found = [
        (piece.column.steps[index], piece.column.generation)
        for piece in merge(columns, low, high)
        for index in range(piece.start, piece.end)
    ]
    expected = [
        (step, number)
        for number, of_generation in enumerate(generations)
        for step in of_generation
        if low <= step <= high
        and not any(newer and newer[0] <= step <= newer[-1] for newer in generations[number + 1 :])
    ]
    assert found == sorted(expected)


values = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(values, max_size=300), st.integers(1, 50))
def test_thinning_keeps_ends_and_extremes_within_its_bound(series: list[float], limit: int) -> None:
    kept = thin(series, limit)
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    assert kept == thin(series, limit)
    if len(series) <= limit:
        assert kept == list(range(len(series)))
        return
    assert kept[-1] == len(series) - 1
    if limit >= 4:
        assert kept[0] == 0
        chosen = [series[index] for index in kept]
        if all(map(math.isfinite, series)):
            assert (min(chosen), max(chosen)) == (min(series), max(series))
        else:
            assert not all(map(math.isfinite, chosen))


async def test_the_tail_is_merged_by_time_over_ranks(store: HistoryStore) -> None:
    store.append(key(0, 1), 0, lines(0, 20, at=0.0))
    store.append(key(0, 2), 0, lines(0, 20, at=100.0))
    store.append(key(1, 2), 0, lines(0, 20, at=100.5))
    store.append(key(0, 2, "metrics"), 0, [metric(1, loss=1.0)])
    store.flush()
    queries = HistoryQueries(store)
    page = await queries.log_lines(JOB, tail=4)
    assert [(line.at, line.rank) for line in page.lines] == [
        (118.0, 0),
        (118.5, 1),
        (119.0, 0),
        (119.5, 1),
    ]
    assert [line.generation for line in (await queries.log_lines(JOB, tail=45)).lines] == (
        [1] * 5 + [2] * 40
    )
    only = await queries.log_lines(JOB, tail=3, rank=0, generation=1)
    assert [line.line for line in only.lines] == ["line 17", "line 18", "line 19"]
    assert len((await queries.log_lines(JOB, tail=10_000)).lines) == 60
    assert (await queries.log_lines(JOB, tail=0)).lines == []
    assert (await queries.log_lines("unknown")).lines == []
    with pytest.raises(InvalidRequest, match="tail"):
        await queries.log_lines(JOB, tail=-1)


async def test_pages_continue_where_the_last_one_ended(store: HistoryStore) -> None:
    store.append(key(0), 0, lines(0, 10))
    store.append(key(1), 0, lines(0, 10, at=0.5))
    store.append(key(0, kind="metrics"), 0, [metric(1, loss=1.0)])
    store.flush()
    queries = HistoryQueries(store)
    page = await queries.log_lines(JOB, tail=5)
    assert (await queries.log_lines(JOB, after=page.cursor)).lines == []
    store.append(key(0), 10, lines(10, 14))
    store.append(key(1), 10, lines(10, 14, at=0.5))
    store.flush()
    found: list[tuple[int, int]] = []
    cursor = page.cursor
    while (page := await queries.log_lines(JOB, tail=3, after=cursor)).lines:
        assert len(page.lines) <= 3
        found += [(line.seq, line.rank) for line in page.lines]
        cursor = page.cursor
    assert found == [(seq, rank) for seq in range(10, 14) for rank in (0, 1)]


def test_long_and_odd_lines_can_be_stored() -> None:
    long = decode_log(encode_log(1.5, "x" * 5000))
    assert long.at == 1.5
    assert long.line == "x" * MAX_LINE_CHARACTERS + "… [904 characters cut]"
    assert decode_log(encode_log(0, "caf\udce9")).line == "caf?"
