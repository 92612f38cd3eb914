"""Values of a msgspec type, at random and fond of the edges: seeds that reach deep into a decoder."""

from __future__ import annotations

import random
from typing import Any, Final

import msgspec
from msgspec import inspect

_INTS: Final = (0, 1, 2, 3, 7, 127, 128, 255, 2**16, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1)
_FLOATS: Final = (0.0, -1.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_TEXTS: Final = ("", "a", "b", "job-1", "run-job-1", "n1", "ü", "𝕏", "x" * 64, "../..", "\x00")
_DEPTH: Final = 5
"""Containers deeper than this stay empty."""


def sample(rng: random.Random, kind: Any) -> Any:
    """A value that an encoder takes and the decoder of `kind` mostly takes back."""
    return _value(rng, inspect.type_info(kind), 0)


def encoded(kind: Any, count: int, seed: int = 1) -> list[bytes]:
    """MessagePack of `count` values of each member of the union `kind`, or of `kind` itself."""
    rng = random.Random(seed)
    info = inspect.type_info(kind)
    members = info.types if isinstance(info, inspect.UnionType) else (info,)
    return [msgspec.msgpack.encode(_value(rng, one, 0)) for one in members for _ in range(count)]


def _value(rng: random.Random, info: Any, depth: int) -> Any:
    match info:
        case inspect.Metadata():
            return _value(rng, info.type, depth)
        case inspect.StructType():
            return _struct(rng, info, depth)
        case inspect.UnionType():
            return _value(rng, rng.choice(info.types), depth)
        case inspect.IntType():
            low = info.ge if info.ge is not None else -(2**63)
            high = info.le if info.le is not None else 2**63 - 1
            assert info.gt is info.lt is None, "no type here has such a bound"
            return min(max(rng.choice(_INTS), low), high)
        case inspect.StrType():
            texts = [text for text in _TEXTS if len(text) >= (info.min_length or 0)]
            return rng.choice(("a", "job-1", "run_1")) if info.pattern else rng.choice(texts)
        case inspect.BytesType():
            least, most = info.min_length or 0, info.max_length or 64
            return rng.randbytes(rng.choice((least, min(least + 3, most), min(64, most))))
        case inspect.ListType() | inspect.VarTupleType():
            length = 0 if depth > _DEPTH else rng.choice((0, 1, 1, 2, 3))
            length = min(max(length, info.min_length or 0), info.max_length or 3)
            return [_value(rng, info.item_type, depth + 1) for _ in range(length)]
        case inspect.TupleType():
            return tuple(_value(rng, item, depth + 1) for item in info.item_types)
        case inspect.DictType():
            length = 0 if depth > _DEPTH else rng.choice((0, 1, 2))
            keys = [_value(rng, info.key_type, depth + 1) for _ in range(length)]
            return {key: _value(rng, info.value_type, depth + 1) for key in keys}
        case _:
            return _scalar(rng, info)


def _scalar(rng: random.Random, info: Any) -> Any:
    match info:
        case inspect.FloatType():
            low = max(x for x in (info.ge, info.gt, float("-inf")) if x is not None)
            high = min(x for x in (info.le, info.lt, float("inf")) if x is not None)
            bounded = (low, high) != (float("-inf"), float("inf"))
            return max(low, min((low + high) / 2, 1.0)) if bounded else rng.choice(_FLOATS)
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.EnumType():
            return rng.choice(list(info.cls))
        case inspect.LiteralType():
            return rng.choice(info.values)
        case inspect.AnyType():
            return rng.choice((None, 1, "a", b"\xff", [1, [2]], {"a": {"b": 1.5}}, {1: 2}))
        case _:
            raise TypeError(f"no values for {info}: teach tests.fuzz.typed this type")


def _struct(rng: random.Random, info: Any, depth: int) -> Any:
    """A Struct with some fields at their defaults; all of them where its own checks refuse."""
    optional = [field for field in info.fields if not field.required]
    left_out = {field.name for field in optional if depth > _DEPTH or rng.random() < 0.3}
    values = {
        field.name: _value(rng, field.type, depth + 1)
        for field in info.fields
        if field.name not in left_out
    }
    try:
        return info.cls(**values)
    except ValueError:
        return info.cls(**{f.name: values[f.name] for f in info.fields if f.required})
