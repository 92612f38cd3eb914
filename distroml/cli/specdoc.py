"""``distroml spec``: the fields of a job specification, read from their types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from distroml.cli.context import Ctx, print_json, print_table
from distroml.spec import DATASET_OPTIONS, MODEL_OPTIONS, JobSpec, Option


def spec(*, ctx: Ctx) -> int:
    """Show the fields of a job specification with defaults and ranges (--json: JSON Schema)."""
    if ctx.json:
        print_json(msgspec.json.schema(JobSpec))
        return 0
    print_table(
        ("FIELD", "TYPE", "DEFAULT", "RANGE", "MEANING"), [*_fields(), *_options()], empty=""
    )
    return 0


def _fields() -> Iterator[tuple[str, ...]]:
    info = inspect.type_info(JobSpec)
    assert isinstance(info, inspect.StructType)
    yield from _struct(info, "")


def _struct(info: inspect.StructType, prefix: str) -> Iterator[tuple[str, ...]]:
    for field in info.fields:
        path = prefix + field.encode_name
        if isinstance(field.type, inspect.StructType):
            yield from _struct(field.type, path + ".")
            continue
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        type_name, limits, meaning = _describe(field.type)
        yield path, type_name, _shown(default), limits, meaning


def _describe(kind: inspect.Type) -> tuple[str, str, str]:
    """Name, range and meaning of a type."""
    if isinstance(kind, inspect.Metadata):
        name, limits, _ = _describe(kind.type)
        return name, limits, str((kind.extra_json_schema or {}).get("description", ""))
    if isinstance(kind, inspect.UnionType):
        parts = [_describe(part) for part in kind.types]
        limits, meaning = (next(filter(None, (p[i] for p in parts)), "") for i in (1, 2))
        return " or ".join(part[0] for part in parts), limits, meaning
    if isinstance(kind, inspect.DictType):
        return "mapping", f"at most {kind.max_length} entries" if kind.max_length else "", ""
    name = type(kind).__name__.removesuffix("Type").lower()
    return {"none": "null"}.get(name, name), _limits(kind), ""


def _limits(kind: inspect.Type) -> str:
    low, above = getattr(kind, "ge", None), getattr(kind, "gt", None)
    high, below = getattr(kind, "le", None), getattr(kind, "lt", None)
    shortest, longest = getattr(kind, "min_length", None), getattr(kind, "max_length", None)
    words = (
        (low, "{:,}"),
        (above, "above {:,}"),
        (high, "to {:,}"),
        (below, "below {:,}"),
        (shortest, "{:,}"),
        (longest, "to {:,} characters"),
    )
    return " ".join(word.format(limit) for limit, word in words if limit is not None)


def _options() -> Iterator[tuple[str, ...]]:
    parts: tuple[tuple[str, str, dict[str, dict[str, Option]]], ...] = (
        ("model", "model_options", MODEL_OPTIONS),
        ("dataset", "dataset_options", DATASET_OPTIONS),
    )
    for part, field, tables in parts:
        for owner, table in tables.items():
            for name, option in table.items():
                limits = "" if option.low is None else f"{option.low:,.12g} to {option.high:,.12g}"
                kind = type(option.default).__name__
                yield f"{field}.{name}", kind, _shown(option.default), limits, f"{part} {owner}"


def _shown(default: Any) -> str:
    return msgspec.json.encode(default).decode()
