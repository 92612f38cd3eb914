"""Reads the items of recorded streams back; see ``following.item_of``."""

from __future__ import annotations

from typing import NamedTuple


class MetricItem(NamedTuple):
    """One record of a rank's metrics."""

    generation: int
    rank: int
    step: int
    evaluated: bool
    """It tells an evaluation after the step, not the step itself."""
    loss: str


def metric(item: str) -> MetricItem:
    """``generation.rank.step=loss``, or ``~`` in place of ``=``."""
    evaluated = "~" in item
    place, _, loss = item.partition("~" if evaluated else "=")
    generation, rank, step = place.split(".")
    return MetricItem(int(generation), int(rank), int(step), evaluated, loss)


def source(stream: str, item: str) -> tuple[str, str]:
    """Generation and rank that wrote an item of a metrics or logs stream."""
    generation, rank = item.partition("=" if stream == "metrics" else ":")[0].split(".")[:2]
    return generation, rank
