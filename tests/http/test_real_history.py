"""Streams, metrics and logs over the history that a node really keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from distroml.history_view import MAX_LATEST_NAMES, HistoryView
from distroml.http import messages
from distroml.http.messages import MessageType, Reader
from distroml.runtime.control import MetricRecord
from distroml.runtime.store.cursors import Position
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import StreamKey, encode_log, encode_metric
from tests.http.node import WAIT_S, Api, MemoryNode, served
from tests.http.test_jobs import finish
from tests.http.test_streams import read, read_all, running

MOST_IN_A_ROW = 64
"""Records that may be handled before others have their turn."""


class Recorded:
    """A served node with a store on disk, and a pen for rank 0's metrics and two ranks' logs."""

    def __init__(self, store: HistoryStore, api: Api, job_id: str) -> None:
        self.store = store
        self.api = api
        self.job_id = job_id

    async def steps(self, *steps: int) -> None:
        records = [encode_metric(MetricRecord(s, 0, float(s), {"loss": 1 / s})) for s in steps]
        await self._append(0, "metrics", records)

    async def line(self, rank: int, text: str) -> None:
        await self._append(rank, "logs", [encode_log(1.0, text)])

    async def _append(self, rank: int, kind: str, records: list[bytes]) -> None:
        key = StreamKey(self.job_id, f"run-{self.job_id}", 1, rank, kind)  # type: ignore[arg-type]
        self.store.append(key, self.store.next_seq(key), records)
        await self.store.settled()


async def at_once(job_id: str) -> None:
    """Nothing was missed."""


@pytest.fixture
async def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Recorded]:
    monkeypatch.setattr(messages, "END_SETTLE_S", 0.05)
    async with HistoryStore(tmp_path / "history") as store:
        node = MemoryNode()
        node.register("a")
        node.history = HistoryView(store, at_once)  # type: ignore[assignment]
        async with served(node) as api:
            yield Recorded(store, api, running(node))


async def test_cut_and_resumed_stream_is_whole(recorded: Recorded) -> None:
    url = f"{recorded.api.base}/api/jobs/{recorded.job_id}/stream"
    await recorded.steps(*range(1, 21))
    await recorded.line(1, "hello")
    seen = []
    async with recorded.api.http.ws_connect(url) as socket:
        seen += await read(socket, 9)
    cursor = seen[-1]["cursor"]
    async with recorded.api.http.ws_connect(url, params={"cursor": cursor}) as socket:
        await recorded.steps(*range(21, 31))
        finishing = asyncio.create_task(read_all(socket))
        await recorded.line(0, "bye")
        finish(recorded.api.node, recorded.job_id)
        seen += await finishing
    assert [m["step"] for m in seen if m["type"] == "metric"] == list(range(1, 31))
    assert sorted(m["line"] for m in seen if m["type"] == "log") == ["bye", "hello"]
    assert seen[-1]["type"] == "end"


async def test_cursor_that_the_history_does_not_know_is_400(recorded: Recorded) -> None:
    url = f"{recorded.api.base}/api/jobs/{recorded.job_id}/stream"
    async with recorded.api.http.ws_connect(url) as socket:
        (first,) = await read(socket, 1)
    ours = first["cursor"].partition(".")[0]
    reply = await recorded.api.get(
        f"/api/jobs/{recorded.job_id}/stream", params={"cursor": f"{ours}.bm9uc2Vuc2U"}
    )
    assert (reply.status, reply.json["field"]) == (400, "cursor")


async def test_metrics_logs_and_newest_values(recorded: Recorded) -> None:
    await recorded.steps(*range(1, 101))
    await recorded.line(0, "one")
    await recorded.line(1, "two")
    path = f"/api/jobs/{recorded.job_id}"
    page = (await recorded.api.get(f"{path}/metrics?name=loss&from_step=11&max_points=10")).json
    (series,) = page["series"]
    assert (series["steps"][0], series["steps"][-1]) == (11, 100)
    assert len(series["steps"]) <= 10
    assert page["latest"] == {"loss": 0.01}
    assert (page["names"], page["names_complete"]) == (["loss"], True)
    logs = (await recorded.api.get(f"{path}/logs?rank=1")).json["lines"]
    assert [line["line"] for line in logs] == ["two"]


async def test_one_who_reads_much_lets_others_have_their_turn(tmp_path: Path) -> None:
    """Consensus lives in the same event loop and must beat several times a second."""
    store = HistoryStore(tmp_path / "history")
    node = MemoryNode()
    node.register("a")
    node.history = HistoryView(store, at_once)  # type: ignore[assignment]
    job = node.job(running(node))
    for rank in range(8):
        key = StreamKey(job.job_id, "run-1", 1, rank, "logs")
        store.append(key, 0, [encode_log(1.0, f"line {number}") for number in range(100)])
    store.flush()
    in_a_row = longest = 0

    async def others() -> None:
        nonlocal in_a_row
        while True:
            in_a_row = 0
            await asyncio.sleep(0)

    def one_more() -> None:
        nonlocal in_a_row, longest
        in_a_row += 1
        longest = max(longest, in_a_row)

    token = Position.token

    def counted(self: Position) -> str:
        one_more()
        return token(self)

    other = asyncio.create_task(others())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Position, "token", counted)
        batch = await node.history.read_after(job.job_id, None, messages.BATCH_RECORDS)
    assert len(batch.records) == messages.BATCH_RECORDS
    assert longest <= MOST_IN_A_ROW, "records read"
    longest = 0
    reader = await Reader.open(node, job, None, frozenset({MessageType.LOG}))
    async with aclosing(reader.follow()) as told, asyncio.timeout(WAIT_S):
        for _ in range(8 * 100):
            await anext(told)
            one_more()
    other.cancel()
    assert longest <= MOST_IN_A_ROW, "messages made"


def test_newest_values_are_those_of_the_newest_generation_whatever_comes_last(
    tmp_path: Path,
) -> None:
    """A node that was away pulls the generations that it lacks side by side; a short one is there first."""
    store = HistoryStore(tmp_path)
    view = HistoryView(store, at_once)

    def pull(generation: int, step: int, **values: float) -> None:
        key = StreamKey("job-1", "run-1", generation, 0, "metrics")
        record = encode_metric(MetricRecord(step, 0, 1.0, values))
        store.append(key, store.next_seq(key), [record], local=False)
        store.flush()

    pull(3, 900, loss=0.1)
    pull(1, 100, loss=5.0, accuracy=0.4)
    assert view.latest_metrics("job-1") == {"loss": 0.1, "accuracy": 0.4}
    pull(2, 500, loss=2.0, accuracy=0.6)
    assert view.latest_metrics("job-1") == {"loss": 0.1, "accuracy": 0.6}
    pull(3, 901, loss=0.09)
    assert view.latest_metrics("job-1") == {"loss": 0.09, "accuracy": 0.6}


def test_newest_values_are_bounded_in_names(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    view = HistoryView(store, at_once)
    key = StreamKey("job-1", "run-1", 1, 0, "metrics")
    for step in range(1, MAX_LATEST_NAMES + 100):
        values = {"loss": 1 / step, f"loss/batch_{step}": 1.0}
        store.append(key, step - 1, [encode_metric(MetricRecord(step, 0, 1.0, values))])
        store.flush()
    latest = view.latest_metrics("job-1")
    assert len(latest) == MAX_LATEST_NAMES
    assert latest["loss"] == 1 / step
