"""What many runs come to together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.records import FaultBegan, Incident, Operation, Outcome, Record, Violation
from chaos.tally import Tally, quantile


def _history(kind: str, *recoveries_ms: float | None) -> list[Record]:
    fault = FaultBegan(at_s=1, fault=0, kind=kind, family="process", nodes=("a",), detail={})
    operation = Operation(
        invoked_s=1, at_s=2, client="x", node="a", kind="submit", outcome=Outcome.OK
    )
    incidents = [
        Incident(
            at_s=3,
            job_id="j",
            generation=number,
            reason="",
            phases_ms={},
            total_ms=took_ms,
            recovered=took_ms is not None,
            steps_lost=1,
        )
        for number, took_ms in enumerate(recoveries_ms, start=1)
    ]
    return [fault, operation, *incidents]


def test_runs_add_up() -> None:
    tally = Tally()
    tally.add(1, _history("worker-kill", 100.0, None), [])
    tally.add(2, _history("all-off", 300.0), [Violation(checker="leaders", what="two")])

    assert tally.runs == 2
    assert tally.faults == {"worker-kill": 1, "all-off": 1}
    assert tally.operations == {"ok": 2}
    assert (tally.recoveries_ms, tally.unfinished, tally.steps_lost) == ([100.0, 300.0], 1, 3)
    assert tally.failed_seeds == [2]
    assert "p50 100 ms, p99 300 ms" in str(tally)
    assert "violations:  1: leaders 1" in str(tally)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values(values: list[float], part: float) -> None:
    ordered = sorted(values)
    found = quantile(ordered, part)

    assert found in values
    assert sum(value <= found for value in values) >= part * len(values)


def test_nothing_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="no value"):
        quantile([], 0.5)
