"""What the API asks of history: metric series, latest values, log lines.

``HistoryQueries`` keeps an index of decoded metrics in memory, per job and rank, that grows with each question by
what was written since; the first question about a long job reads all of it, in small portions between which the
event loop goes on. Logs are read from the end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from msgspec import Struct

from distroml.errors import InvalidRequest
from distroml.runtime.store.cursors import Position, parse_token
from distroml.runtime.store.following import Entry, Follower
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import (
    StreamKey,
    UndecodableRecord,
    decode_log,
    decode_metric,
)
from distroml.runtime.store.series import Column, MetricPoint, merge, thinned

MAX_POINTS = 10_000
MAX_TAIL_LINES = 10_000
MAX_TAIL_BYTES = 4 * 1024 * 1024
PORTION_BYTES = 64 * 1024
"""Decoded at once before others get their turn: about 2 ms."""
INDEX_POINTS = 4_000_000
"""Points (24 bytes each) in all indexes together; beyond it the least recently asked for are dropped."""
COLUMN_POINTS = 30
"""What a column is charged on top of its points: it takes about 700 bytes before there is one."""
MAX_NAMES = 1024
"""Metrics of one rank that are indexed, and of a job that are told of, the first ones that are found: user code may
make new names in each step."""
LAST_STEP = 2**62


class MetricSeries(Struct, frozen=True, kw_only=True):
    """One metric over steps."""

    points: list[MetricPoint]
    total: int
    """Points in the range before thinning."""


class LogLine(Struct, frozen=True):
    """One line of output with where it came from."""

    at: float
    line: str
    generation: int
    rank: int
    seq: int
    run_id: str


class LogPage(Struct, frozen=True):
    """Lines in order of time, and the cursor from which to go on."""

    lines: list[LogLine]
    cursor: str


@dataclass(slots=True)
class _RankIndex:
    """All metrics of one rank of a job, as far as they were read."""

    reached: dict[StreamKey, int] = field(default_factory=dict)
    columns: dict[str, dict[StreamKey, Column]] = field(default_factory=dict)
    complete: bool = True
    """False where there were more than ``MAX_NAMES``."""
    points: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class HistoryQueries:
    """Answers questions about what ``store`` holds; one per node.

    Args:
        index_points: bound of the index of metrics in memory, in points.
    """

    def __init__(self, store: HistoryStore, *, index_points: int = INDEX_POINTS) -> None:
        self._store = store
        self._index_points = index_points
        self._indexes: dict[tuple[str, int], _RankIndex] = {}
        """By job and rank, the least recently used first."""

    # --- metrics -----------------------------------------------------------------------------------------------

    async def metric_series(
        self,
        job_id: str,
        name: str,
        from_step: int = 0,
        to_step: int | None = None,
        max_points: int = 1000,
        rank: int | None = None,
    ) -> MetricSeries:
        """One metric over the steps of a job, merged over generations (``series.merge``) and thinned (``series.thin``).

        Rank 0 tells what the ranks know together. If it is lost with what it told last, another rank tells that again
        in the next generation.

        Args:
            to_step: the last step asked for; None: all.
            rank: whose; None: the lowest one's that told of a step, in the newest generation that did.

        Raises:
            InvalidRequest: ``max_points`` is not 1 to ``MAX_POINTS``.
        """
        if not 1 <= max_points <= MAX_POINTS:
            raise InvalidRequest(
                f"max_points must be 1 to {MAX_POINTS}, not {max_points}.", field="max_points"
            )
        columns: list[Column] = []
        for candidate in self._ranks(job_id) if rank is None else [rank]:
            index = await self._indexed(job_id, candidate)
            columns += index.columns.get(name, {}).values()
        last = LAST_STEP if to_step is None else to_step
        pieces = merge(columns, from_step, last)
        total = sum(piece.end - piece.start for piece in pieces)
        return MetricSeries(points=thinned(pieces, max_points), total=total)

    async def latest_metrics(self, job_id: str) -> dict[str, MetricPoint]:
        """The newest value of each metric, of the lowest rank that has it, by name."""
        latest: dict[str, MetricPoint] = {}
        for name, columns in (await self._named(job_id))[0].items():
            newest = max(
                (column for column in columns if column.steps),
                key=lambda column: column.generation,
            )
            latest[name] = newest.point(-1)
        return dict(sorted(latest.items()))

    async def metric_names(self, job_id: str) -> tuple[list[str], bool]:
        """Names of a job's metrics: all that rank 0 ever reported, and what others last reported; and whether
        none was left out, beyond ``MAX_NAMES``."""
        named, complete = await self._named(job_id)
        return sorted(named), complete

    async def _named(self, job_id: str) -> tuple[dict[str, list[Column]], bool]:
        """Columns by metric: of the lowest rank in full; of others their last record only."""
        named: dict[str, list[Column]] = {}
        complete = True
        ranks = self._ranks(job_id)
        if ranks:
            index = await self._indexed(job_id, ranks[0])
            named = {name: list(columns.values()) for name, columns in index.columns.items()}
            complete = index.complete
        for key, head in sorted(self._metric_streams(job_id), key=lambda item: item[0].rank):
            if key.rank == ranks[0] or not head:
                continue
            for raw in self._store.read(key, head - 1):
                for column_name, column in _columns_of(key, raw):
                    if column_name not in named and len(named) >= MAX_NAMES:
                        complete = False
                        continue
                    held = named.setdefault(column_name, [])
                    if all(other.generation < column.generation for other in held):
                        held.append(column)
        return named, complete

    def _metric_streams(self, job_id: str) -> list[tuple[StreamKey, int]]:
        heads = self._store.heads(job_id)
        return [(key, head) for key, head in sorted(heads.items()) if key.kind == "metrics"]

    def _ranks(self, job_id: str) -> list[int]:
        return sorted({key.rank for key, head in self._metric_streams(job_id) if head})

    async def _indexed(self, job_id: str, rank: int) -> _RankIndex:
        """The index of one rank, brought up to what the store has now."""
        index = self._indexes.pop((job_id, rank), None) or _RankIndex()
        self._indexes[job_id, rank] = index
        async with index.lock:
            for key, head in self._metric_streams(job_id):
                if key.rank == rank:
                    await self._index_stream(index, key, head)
        self._drop_indexes()
        return index

    async def _index_stream(self, index: _RankIndex, key: StreamKey, head: int) -> None:
        reached = index.reached.get(key, 0)
        while (reached := max(reached, self._store.first_seq(key))) < head:
            records = self._store.read(key, reached, PORTION_BYTES)
            if not records and self._store.first_seq(key) <= reached:
                return  # it cannot be read now; the store has logged why
            for raw in records:
                _add(index, key, raw)
            reached += len(records)
            index.reached[key] = reached
            await asyncio.sleep(0)

    def _drop_indexes(self) -> None:
        total = sum(index.points for index in self._indexes.values())
        for key in list(self._indexes)[:-1]:
            if total <= self._index_points:
                return
            total -= self._indexes.pop(key).points

    def forget(self, job_id: str) -> None:
        """Drop what is indexed of a removed job."""
        for key in [key for key in self._indexes if key[0] == job_id]:
            del self._indexes[key]

    # --- logs --------------------------------------------------------------------------------------------------

    async def log_lines(
        self,
        job_id: str,
        rank: int | None = None,
        tail: int = 200,
        generation: int | None = None,
        after: str | None = None,
    ) -> LogPage:
        """The last ``tail`` lines of a job's workers, or the first ``tail`` after a cursor, in order of time.

        Args:
            rank: only of this rank; None: of all.
            generation: only of this generation; None: of all.
            after: cursor of an earlier page: the lines that follow it, oldest first.

        Raises:
            InvalidRequest: ``tail`` is not 0 to ``MAX_TAIL_LINES`` or the cursor is not one of this job.
        """
        if not 0 <= tail <= MAX_TAIL_LINES:
            raise InvalidRequest(f"tail must be 0 to {MAX_TAIL_LINES}, not {tail}.", field="tail")

        def chosen(key: StreamKey) -> bool:
            return (
                key.kind == "logs"
                and (rank is None or key.rank == rank)
                and (generation is None or key.generation == generation)
            )

        if after is not None:
            return await self._lines_after(parse_token(after, job_id), tail, chosen)
        heads = self._store.heads(job_id)
        position = Position.at(job_id, heads)
        position.fold(heads)
        lines = await self._last_lines([key for key in heads if chosen(key)], heads, tail)
        return LogPage(lines, position.token())

    async def _last_lines(
        self, keys: list[StreamKey], heads: Mapping[StreamKey, int], tail: int
    ) -> list[LogLine]:
        """The last ``tail`` lines, read from the newest generation back until there are enough."""
        lines: list[LogLine] = []
        older = sorted(keys, key=lambda key: (-key.generation, key.run_id, key.rank))
        for _, group in groupby(older, key=lambda key: (key.generation, key.run_id)):
            if len(lines) >= tail:
                break
            found: list[tuple[float, LogLine]] = []
            for key in group:
                found += await self._tail_of(key, heads[key], tail - len(lines))
                found.sort(key=lambda item: (item[0], item[1].rank, item[1].seq))
                del found[: max(0, len(found) + len(lines) - tail)]
            lines = [line for _, line in found] + lines
        return _within(lines, MAX_TAIL_BYTES)

    async def _tail_of(self, key: StreamKey, head: int, count: int) -> list[tuple[float, LogLine]]:
        """The last ``count`` lines of one stream with times that never decrease, for sorting."""
        seq = max(self._store.first_seq(key), head - count)
        found: deque[tuple[float, LogLine]] = deque(maxlen=count)
        at = 0.0
        while seq < head and (records := self._store.read(key, seq, PORTION_BYTES)):
            for number, raw in enumerate(records, seq):
                if line := _line_of(Entry(key, number, raw)):
                    at = max(at, line.at)
                    found.append((at, line))
            seq += len(records)
            await asyncio.sleep(0)
        return list(found)

    async def _lines_after(
        self, position: Position, count: int, chosen: Callable[[StreamKey], bool]
    ) -> LogPage:
        follower = Follower(self._store, position, kinds=("logs",))
        lines: list[LogLine] = []
        size = 0
        while len(lines) < count and size < MAX_TAIL_BYTES:
            entry = await follower.stored()
            if entry is None:
                break
            if chosen(entry.key) and (line := _line_of(entry)):
                lines.append(line)
                size += len(entry.record)
        return LogPage(lines, follower.cursor())


def _add(index: _RankIndex, key: StreamKey, raw: bytes) -> None:
    try:
        record = decode_metric(raw)
    except UndecodableRecord:
        return
    for name, value in record.values.items():
        columns = index.columns.get(name)
        if columns is None:
            if len(index.columns) >= MAX_NAMES:
                index.complete = False
                continue
            columns = index.columns[name] = {}
        column = columns.get(key)
        if column is None:
            column = columns[key] = Column(key.generation)
            index.points += COLUMN_POINTS
        column.add(record.step, value, record.at)
        index.points += 1


def _columns_of(key: StreamKey, raw: bytes) -> Iterable[tuple[str, Column]]:
    """One-point columns of a single record."""
    alone = _RankIndex()
    _add(alone, key, raw)
    return [(name, columns[key]) for name, columns in alone.columns.items()]


def _line_of(entry: Entry) -> LogLine | None:
    try:
        record = decode_log(entry.record)
    except UndecodableRecord:
        return None
    key = entry.key
    return LogLine(record.at, record.line, key.generation, key.rank, entry.seq, key.run_id)


def _within(lines: list[LogLine], max_bytes: int) -> list[LogLine]:
    """The longest end of ``lines`` that stays within ``max_bytes`` characters."""
    for index in range(len(lines) - 1, -1, -1):
        max_bytes -= len(lines[index].line)
        if max_bytes < 0:
            return lines[index + 1 :]
    return lines
