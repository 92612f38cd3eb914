"""Nested values as JSON-able ones, exactly: what JSON lacks is tagged, and tensors are put aside by name.

JSON has no infinities, no tuples and no keys that are numbers; optimizers and schedulers keep all of these.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_FLOAT, _TUPLE, _ITEMS, _TENSOR = "$float", "$tuple", "$items", "$tensor"
_TAGS = frozenset((_FLOAT, _TUPLE, _ITEMS, _TENSOR))


def to_plain(value: Any, name: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """``value`` as JSON can hold it.

    Args:
        name: of the value, for errors and for its tensors.
        tensors: takes the tensors by name, such as ``optimizer/state/0/exp_avg``; None: there must be none.

    Raises:
        TypeError: it has something in it that is no plain value; names it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(float(value))}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and tensors is not None:
        if name in tensors:
            raise TypeError(f"two tensors are called '{name}'")
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, list):
        return [to_plain(one, f"{name}/{at}", tensors) for at, one in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: to_plain(list(value), name, tensors)}
    if isinstance(value, dict):
        items = [
            (key, to_plain(one, f"{name}/{key}" if name else str(key), tensors))
            for key, one in value.items()
        ]
        if all(type(key) is str and key not in _TAGS for key, _ in items):
            return dict(items)
        return {_ITEMS: [[to_plain(key, name), one] for key, one in items]}
    raise TypeError(f"'{name}' is a {type(value).__name__}")


def from_plain(value: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    """What ``to_plain`` was given; dicts and lists in the place of their subclasses, keys in no certain order."""
    if isinstance(value, list):
        return [from_plain(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if _FLOAT in value:
        return float(value[_FLOAT])
    if _TUPLE in value:
        return tuple(from_plain(value[_TUPLE], tensors))
    if _ITEMS in value:
        return {from_plain(key): from_plain(one, tensors) for key, one in value[_ITEMS]}
    if _TENSOR in value:
        return (tensors or {})[value[_TENSOR]]
    return {key: from_plain(one, tensors) for key, one in value.items()}
