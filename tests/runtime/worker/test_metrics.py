from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distroml.errors import DistroMLError
from distroml.runtime.control import MAX_METRIC_NAME_CHARS
from distroml.runtime.worker.metrics import as_metrics, first_of


@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.ones(1, 1) / 2, 0.5],
    ids=repr,
)
def test_any_kind_of_number_is_a_metric(value: Any) -> None:
    metrics = as_metrics({"score": value, "count": 3}, "evaluate")
    assert metrics == {"score": 0.5, "count": 3.0}
    assert {type(one) for one in metrics.values()} == {float}


@pytest.mark.parametrize("value", ["good", "0.5", None, torch.ones(2), [1.0], 10**400], ids=repr)
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(DistroMLError, match=r"evaluate gave 'grade' = .*; a metric is one number"):
        as_metrics({"score": 0.5, "grade": value}, "evaluate")


def test_names_are_strings() -> None:
    with pytest.raises(DistroMLError, match="evaluate gave a metric the name 7"):
        as_metrics({7: 0.5}, "evaluate")
    (name,) = as_metrics({"x" * 1000: 0.5}, "evaluate")
    assert len(name) == MAX_METRIC_NAME_CHARS


def test_nothing_is_no_metric_and_other_things_are_refused() -> None:
    assert as_metrics(None, "evaluate") == {}
    with pytest.raises(DistroMLError, match="evaluate must give a dict of metrics, not a float"):
        as_metrics(0.5, "evaluate")


def test_of_too_many_the_first_in_name_order_are_kept() -> None:
    metrics = {f"m{number}": 0.0 for number in reversed(range(9))}
    assert list(first_of(metrics, 3)) == ["m0", "m1", "m2"]
    assert first_of(metrics, 9) == metrics
