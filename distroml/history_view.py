"""The history of jobs in the words of the API: ``http.services`` over ``runtime.store``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from distroml.errors import InvalidRequest
from distroml.http.services import HistoryBatch, LogLine, MetricNames, MetricPoint, Series
from distroml.http.wakes import Wakes
from distroml.runtime.control import MetricRecord
from distroml.runtime.store.following import Entry, follow
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.queries import HistoryQueries
from distroml.runtime.store.records import UndecodableRecord, decode_log, decode_metric
from distroml.runtime.store.subscriptions import Written

MAX_LATEST_JOBS = 1024
MAX_LATEST_NAMES = 256
"""Of one job, the first ones told: as many as four of its records may have."""
RECORDS_PER_TURN = 32
"""Read at once before others get their turn: about 1 ms, with a cursor each."""


class _Latest(NamedTuple):
    generation: int
    value: float


class HistoryView:
    """The history of jobs in the words of the API.

    Args:
        caught_up: returns once this node has what others recorded of a job while it was away.
    """

    def __init__(self, store: HistoryStore, caught_up: Callable[[str], Awaitable[None]]) -> None:
        self._store = store
        self._caught_up = caught_up
        self._queries = HistoryQueries(store)
        self._latest: dict[str, dict[str, _Latest]] = {}
        """By job and metric."""
        self._wakes = Wakes()
        store.listen(self._on_written)

    async def metric_names(self, job_id: str) -> MetricNames:
        await self._caught_up(job_id)
        names, complete = await self._queries.metric_names(job_id)
        return MetricNames(names=tuple(names), complete=complete)

    async def metric_series(
        self, job_id: str, name: str, from_step: int, to_step: int | None, max_points: int
    ) -> Series:
        await self._caught_up(job_id)
        found = await self._queries.metric_series(job_id, name, from_step, to_step, max_points)
        return Series(
            steps=tuple(point.step for point in found.points),
            values=tuple(point.value for point in found.points),
            total=found.total,
        )

    def latest_metrics(self, job_id: str) -> Mapping[str, float]:
        return {name: latest.value for name, latest in self._latest.get(job_id, {}).items()}

    async def log_lines(self, job_id: str, rank: int | None, tail: int) -> Sequence[LogLine]:
        await self._caught_up(job_id)
        page = await self._queries.log_lines(job_id, rank=rank, tail=tail)
        return [
            LogLine(generation=one.generation, rank=one.rank, at=one.at, line=one.line)
            for one in page.lines
        ]

    def end_position(self, job_id: str) -> str:
        return follow(self._store, job_id, from_now=True).cursor()

    async def read_after(self, job_id: str, position: str | None, limit: int) -> HistoryBatch:
        try:
            follower = follow(self._store, job_id, position)
        except InvalidRequest as error:
            raise ValueError(error.detail) from None
        records: list[tuple[MetricPoint | LogLine, str]] = []
        taken = 0
        more = True
        try:
            while len(records) < limit:
                taken += 1
                if taken % RECORDS_PER_TURN == 0:
                    await asyncio.sleep(0)
                entry = await follower.stored()
                if entry is None:
                    more = False
                    break
                record = _shown(entry)
                if record is not None:
                    records.append((record, follower.cursor()))
        finally:
            follower.close()
        return HistoryBatch(records=tuple(records), position=follower.cursor(), more=more)

    def watch(self, job_id: str, wake: asyncio.Event) -> AbstractContextManager[None]:
        return self._wakes.watch(job_id, wake)

    def forget(self, job_id: str) -> None:
        """The job was removed."""
        self._queries.forget(job_id)
        self._latest.pop(job_id, None)

    def _on_written(self, written: Written, local: bool) -> None:
        key = written.key
        self._wakes.wake(key.job_id)
        if key.kind != "metrics" or key.rank != 0:
            return
        latest = self._latest.pop(key.job_id, {})
        for raw in written.records[-2:]:  # an epoch's evaluation comes as a record of its own
            try:
                values = decode_metric(raw).values
            except UndecodableRecord:
                continue
            for name, value in values.items():
                held = latest.get(name)
                # older generations may come later, to a node that was away
                if held.generation <= key.generation if held else len(latest) < MAX_LATEST_NAMES:
                    latest[name] = _Latest(key.generation, value)
        self._latest[key.job_id] = latest
        if len(self._latest) > MAX_LATEST_JOBS:
            del self._latest[next(iter(self._latest))]


def _shown(entry: Entry) -> MetricPoint | LogLine | None:
    key = entry.key
    try:
        if key.kind == "logs":
            line = decode_log(entry.record)
            return LogLine(generation=key.generation, rank=key.rank, at=line.at, line=line.line)
        metric: MetricRecord = decode_metric(entry.record)
    except UndecodableRecord:
        return None
    return MetricPoint(
        step=metric.step,
        epoch=metric.epoch,
        generation=key.generation,
        rank=key.rank,
        at=metric.at,
        values=metric.values,
    )
