"""What each rank keeps of the run's metrics, for the day that the rank that told of them is lost, has no hole."""

from __future__ import annotations

import copy

import pytest

from distroml.runtime.control import MetricRecord
from distroml.runtime.worker.builtin import load_adapter
from distroml.runtime.worker.train import MAX_KEPT_METRICS, Run
from tests.runtime.worker.test_training import spec_of


def record(step: int, name: str = "loss") -> MetricRecord:
    return MetricRecord(step, 0, float(step), {name: step / 2})


def run_at(step: int, records: list[MetricRecord]) -> Run:
    state = load_adapter(spec_of(1)).new_state()
    state.step = step
    run = Run(state)
    run.records.extend(records)
    return run


STEPS_3_TO_6 = [record(step) for step in range(3, 7)]


@pytest.mark.parametrize(
    "own", [STEPS_3_TO_6, STEPS_3_TO_6[:-1], [], [record(1), record(2)]], ids=len
)
def test_who_was_given_the_next_step_knows_of_it_too(own: list[MetricRecord]) -> None:
    adapter = load_adapter(spec_of(1))
    ahead = run_at(7, [*STEPS_3_TO_6, record(7), record(7, "eval_loss")])
    behind = run_at(own[-1].step if own else 0, own)
    given = ahead.records_since(6)
    behind.take(adapter, copy.deepcopy(ahead.blob(adapter)), 7, given)
    assert behind.state.step == 7
    held = [one.step for one in behind.records]
    assert held[-2:] == [7, 7]
    assert sorted(set(held)) == list(range(held[0], 8)), (
        "history would take the hole for all there is"
    )
    assert (3 in held) is (len(own) >= 3)


def test_a_checkpoint_takes_records_back_to_its_step() -> None:
    adapter = load_adapter(spec_of(1))
    run = run_at(6, STEPS_3_TO_6)
    blob = copy.deepcopy(run.blob(adapter))
    run.take(adapter, blob, 4)
    assert [one.step for one in run.records] == [3, 4]
    run.take(adapter, blob, 9)
    assert not run.records, "of the steps between nothing is known"


def test_the_newest_values_are_bounded_where_each_step_has_names_of_its_own() -> None:
    run, other = run_at(0, []), run_at(0, [])
    for step in range(MAX_KEPT_METRICS):
        for one in (run, other):
            one.note({"loss": float(step), f"batch_{step:04}": 1.0, f"batch_{step:04}b": 2.0})
        # as what was saved and read comes back: in whatever order
        other.metrics = dict(sorted(other.metrics.items(), reverse=True))
    assert len(run.metrics) == MAX_KEPT_METRICS
    assert run.metrics == other.metrics, "ranks save the same"
    assert run.metrics["loss"] == float(step)
    assert f"batch_{step:04}b" in run.metrics
