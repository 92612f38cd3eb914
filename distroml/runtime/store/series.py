"""Metric series in compact arrays: merging generations and thinning out for a chart.

Pure: what ``queries`` has decoded goes in, the points of a chart come out.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct


class MetricPoint(Struct, frozen=True):
    """One value of a metric. Steps are 1-based: the value after ``step`` completed steps."""

    step: int
    value: float
    at: float
    """Unix seconds."""
    generation: int


@dataclass(slots=True)
class Column:
    """One metric of one stream, its steps strictly increasing."""

    generation: int
    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    ats: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float, at: float) -> None:
        """Append a value; the same step again replaces it, an earlier step is ignored."""
        if self.steps and step <= self.steps[-1]:
            if step < self.steps[-1]:
                return
            self.values[-1], self.ats[-1] = value, at
            return
        self.steps.append(step)
        self.values.append(value)
        self.ats.append(at)

    def point(self, index: int) -> MetricPoint:
        return MetricPoint(self.steps[index], self.values[index], self.ats[index], self.generation)


class Piece(Struct, frozen=True):
    """The part of a column, ``start`` to ``end`` (exclusive), that no newer generation covers."""

    column: Column
    start: int
    end: int


def merge(columns: Iterable[Column], from_step: int, to_step: int) -> list[Piece]:
    """What counts of each column, in order of steps, ``to_step`` included; of one generation the first one counts most.

    A generation covers all steps from the first to the last that it recorded: of older ones only what lies
    outside is kept. So each step has one value, that of the highest generation that went over it, also where
    generations recorded different steps; what an older one reached beyond stays until a newer one gets there.
    """
    covered: list[tuple[int, int]] = []
    pieces: list[Piece] = []
    for column in sorted(columns, key=lambda column: -column.generation):
        if not column.steps:
            continue
        first, last = column.steps[0], column.steps[-1]
        for low, high in _uncovered(covered, max(first, from_step), min(last, to_step)):
            start, end = bisect_left(column.steps, low), bisect_right(column.steps, high)
            if start < end:
                pieces.append(Piece(column, start, end))
        covered = _union(covered, (first, last))
    return sorted(pieces, key=lambda piece: piece.column.steps[piece.start])


def _uncovered(covered: Sequence[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """The parts of ``low..high`` outside the sorted, disjoint intervals ``covered``; all ends inclusive."""
    parts: list[tuple[int, int]] = []
    for begin, end in covered:
        if begin > high:
            break
        if low < begin:
            parts.append((low, begin - 1))
        low = max(low, end + 1)
    if low <= high:
        parts.append((low, high))
    return parts


def _union(covered: Sequence[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    low, high = new
    apart: list[tuple[int, int]] = []
    for begin, end in covered:
        if end + 1 < low or begin > high + 1:
            apart.append((begin, end))
        else:
            low, high = min(low, begin), max(high, end)
    return sorted([*apart, (low, high)])


def thin(values: Sequence[float], max_points: int) -> list[int]:
    """Indexes of at most ``max_points`` of ``values`` that keep the shape of their curve, ascending.

    The first and the last are kept; what is between is cut into equal buckets, of each the lowest and the highest
    value are kept (the first of equals). A bucket with a value that is not finite keeps the first such one and
    the highest finite one. A function of its arguments alone: every node thins alike.
    """
    count = len(values)
    if count <= max_points:
        return list(range(count))
    if max_points < 4:
        return [count - 1] if max_points == 1 else [0, count - 1][:max_points]
    buckets = (max_points - 2) // 2
    kept = {0, count - 1}
    for bucket in range(buckets):
        start = 1 + bucket * (count - 2) // buckets
        end = 1 + (bucket + 1) * (count - 2) // buckets
        part = values[start:end]
        if math.isfinite(sum(part)):
            kept.add(start + part.index(min(part)))
            kept.add(start + part.index(max(part)))
        else:
            kept.update(start + index for index in _extremes_of_broken(part))
    return sorted(kept)


def _extremes_of_broken(part: Sequence[float]) -> set[int]:
    finite = [index for index, value in enumerate(part) if math.isfinite(value)]
    broken = next((i for i, value in enumerate(part) if not math.isfinite(value)), None)
    chosen = set() if broken is None else {broken}
    if finite:
        chosen.add(max(finite, key=lambda index: (part[index], -index)))
    return chosen


def thinned(pieces: Sequence[Piece], max_points: int) -> list[MetricPoint]:
    """The points of a merged series, at most ``max_points`` of them (see ``thin``)."""
    values: array[float] = array("d")
    starts: list[int] = []
    for piece in pieces:
        starts.append(len(values))
        values.extend(piece.column.values[piece.start : piece.end])
    points: list[MetricPoint] = []
    for index in thin(values, max_points):
        number = bisect_right(starts, index) - 1
        piece = pieces[number]
        points.append(piece.column.point(piece.start + index - starts[number]))
    return points
