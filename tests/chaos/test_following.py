"""What names an item of a stream, and that it can be read back."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from chaos.checkers.items import MetricItem, metric, source
from chaos.following import item_of

_NUMBER = st.integers(0, 10**6)


@given(_NUMBER, _NUMBER, _NUMBER, st.floats(allow_nan=False), st.booleans())
def test_metrics_are_read_back_to_the_last_bit(
    generation: int, rank: int, step: int, loss: float, evaluated: bool
) -> None:
    event: dict[str, Any] = {
        "type": "metric", "generation": generation, "rank": rank, "step": step, "loss": loss,
    }  # fmt: skip
    if evaluated:
        event["eval_loss"] = 1.0
    item = item_of(event)
    assert metric(item) == MetricItem(generation, rank, step, evaluated, loss.hex())
    assert source("metrics", item) == (str(generation), str(rank))


def test_log_lines_are_told_apart_by_their_text() -> None:
    line = {
        "type": "log",
        "generation": 2,
        "rank": 1,
        "at": "2026-01-31T12:00:00.250Z",
        "line": "a",
    }
    assert item_of(line) == item_of(dict(line))
    assert item_of(line) != item_of({**line, "line": "b"})
    assert source("logs", item_of(line)) == ("2", "1")


def test_events_have_their_place_in_the_log() -> None:
    state = {"type": "state", "index": 7, "status": "RUNNING"}
    commit = {"type": "checkpoint", "index": 9, "event": "committed", "step": 40}
    assert item_of(state) == "7:state RUNNING"
    assert item_of(commit) == "9:checkpoint committed 40"
