"""Who hangs: one culprit or nobody, and a sentence that says why."""

from __future__ import annotations

from typing import Any

import pytest

from distroml.reports import StepTiming, WorkerFact, WorkerPhase
from distroml.runtime.hang import HangSettings, deadline_s, find_hang

SETTINGS = HangSettings()


def fact(rank: int, **fields: Any) -> WorkerFact:
    values: dict[str, Any] = {
        "phase": WorkerPhase.TRAINING,
        "waiting_s": 30.0,
        "timing": timing(0.1),
    } | fields
    return WorkerFact(job_id="j", run_id="r", generation=1, rank=rank, **values)


def timing(slowest_s: float) -> StepTiming:
    return StepTiming(
        step_s=0.1,
        data_s=0.0,
        compute_s=0.1,
        communication_s=0.0,
        idle_s=0.0,
        slowest_s=slowest_s,
    )


def ranks(**odd: dict[str, Any]) -> dict[int, WorkerFact]:
    """Three ranks; ``r1={...}`` says what is different about rank 1."""
    return {rank: fact(rank, **odd.get(f"r{rank}", {})) for rank in range(3)}


@pytest.mark.parametrize(
    ("slowest_s", "expected_s"),
    [(0.1, 10.0), (1.0, 10.0), (3.0, 30.0), (100.0, 600.0), (0.0, 600.0)],
)
def test_the_deadline_is_learnt_from_the_slowest_steps(slowest_s: float, expected_s: float) -> None:
    seen = ranks(r1={"timing": timing(slowest_s)}, r0={"timing": None}, r2={"timing": None})
    assert deadline_s(seen, SETTINGS) == expected_s


def test_nobody_hangs_before_the_deadline() -> None:
    assert find_hang(ranks(r1={"waiting_s": 0.0}), 9.9, SETTINGS) is None
    assert find_hang({}, 1000.0, SETTINGS) is None


@pytest.mark.parametrize(
    ("odd", "culprit", "said"),
    [
        ({"r2": {"silent_s": 12.0, "waiting_s": 0.0}}, 2, "said nothing for 12.0 s"),
        ({"r1": {"silent_s": 12.0}, "r2": {"waiting_s": 0.0}}, 1, "said nothing for 12.0 s"),
        ({"r1": {"waiting_s": 0.0}}, 1, "waits for nobody"),
        ({"r2": {"waiting_s": 3.0}}, 2, "the last to wait"),
        ({}, 0, "the last to wait"),
    ],
)
def test_the_culprit_is_the_one_that_does_not_wait(
    odd: dict[str, dict[str, Any]], culprit: int, said: str
) -> None:
    found = find_hang(ranks(**odd), 12.0, SETTINGS)
    assert found is not None
    assert found.rank == culprit
    assert found.said.startswith("hangs: no rank completed a step for 12.0 s")
    assert said in found.said


def test_a_stopped_process_is_found_in_any_phase_after_its_grace() -> None:
    connecting = {"phase": WorkerPhase.CONNECTING}
    stopped = ranks(r0=connecting, r1=connecting | {"stopped_s": 2.0})
    found = find_hang(stopped, 0.0, SETTINGS)
    assert found is not None
    assert (found.rank, found.said) == (1, "is stopped, for 2.0 s")
    assert find_hang(ranks(r1={"stopped_s": 1.9}), 0.0, SETTINGS) is None


def test_ranks_that_do_not_all_train_do_not_hang() -> None:
    """Starting has a deadline of its own, and who finishes writes a checkpoint."""
    for phase in WorkerPhase:
        if phase is not WorkerPhase.TRAINING:
            assert find_hang(ranks(r1={"phase": phase}), 1000.0, SETTINGS) is None
