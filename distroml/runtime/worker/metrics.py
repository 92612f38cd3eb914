"""Metrics as the user's code gives them, made plain: floats by name, and no more of them than are kept of a record."""

from __future__ import annotations

from collections.abc import Mapping

from distroml.errors import DistroMLError
from distroml.runtime.control import MAX_METRIC_NAME_CHARS

MAX_SHOWN_CHARS = 100


def as_metrics(values: object, giver: str) -> dict[str, float]:
    """``values`` as floats: anything that is one number will do, of torch and numpy too; None is no metric.

    Args:
        giver: whose they are, for errors.

    Raises:
        DistroMLError: something is no number, or has no name; says which.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise DistroMLError(f"{giver} must give a dict of metrics, not a {type(values).__name__}.")
    metrics = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise DistroMLError(f"{giver} gave a metric the name {name!r}; names are strings.")
        metrics[str(name[:MAX_METRIC_NAME_CHARS])] = _as_float(value, name, giver)
    return metrics


def first_of(metrics: dict[str, float], count: int) -> dict[str, float]:
    """At most ``count`` of them, the first in name order: the same on all ranks."""
    if len(metrics) <= count:
        return metrics
    return {name: metrics[name] for name in sorted(metrics)[:count]}


def _as_float(value: object, name: str, giver: str) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise DistroMLError(
        f"{giver} gave {name!r} = {repr(value)[:MAX_SHOWN_CHARS]}; a metric is one number."
    )
