"""Incidents of the API as records on the clock of the run."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.ending import incident_of

NOW_S = 100.0
UNIX = 1_700_000_100.0
"""Unix time at ``NOW_S``."""


def _view(observed_at: str, total_ms: float | None) -> dict[str, Any]:
    phases = {"detect": 5.0} if total_ms is None else {"detect": 5.0, "total": total_ms}
    return {
        "observed_at": observed_at,
        "generation": 1,
        "reason": "generation 1: worker 0 on node a killed by SIGKILL",
        "phases_ms": phases,
        "steps_lost": 0,
        "next_generation": 2,
        "resume_step": 10,
        "highest_step": 10,
        "cause": {"node": "a", "pid": 7},
    }


def test_an_incident_is_placed_on_the_clock_of_the_run() -> None:
    one = incident_of("job-1", _view("2023-11-14T22:14:10.500Z", 40.0), NOW_S, NOW_S - UNIX)
    assert one.at_s == pytest.approx(50.5)
    assert (one.total_ms, one.phases_ms, one.recovered) == (40.0, {"detect": 5.0}, True)
    assert one.culprit == "process 7 of node a"


@pytest.mark.parametrize(
    ("observed_at", "total_ms"),
    [("2023-11-13T22:14:10.500Z", 86_400_040.0), ("2023-11-14T22:14:10.500Z", 86_400_040.0)],
)
def test_what_a_clock_that_jumped_tells_is_no_time(observed_at: str, total_ms: float) -> None:
    one = incident_of("job-1", _view(observed_at, total_ms), NOW_S, NOW_S - UNIX)
    assert 0.0 <= one.at_s <= NOW_S
    assert (one.total_ms, one.phases_ms, one.recovered) == (None, {}, True)


def test_a_recovery_that_was_overtaken_has_not_recovered() -> None:
    one = incident_of("job-1", _view("2023-11-14T22:14:10.500Z", None), NOW_S, NOW_S - UNIX)
    assert (one.total_ms, one.recovered) == (None, False)
