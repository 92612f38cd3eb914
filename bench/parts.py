"""Runs the parts of a benchmark one after another: each in a directory of its own, and none stops the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from msgspec import Struct

from bench.table import Row

Say = Callable[[str], None]
"""Tells what is being measured."""
S = TypeVar("S")


class Bench(Struct, Generic[S], frozen=True, kw_only=True):
    """What a part works with."""

    scale: S
    """How much is measured."""
    directory: Path
    """Empty at first, removed afterwards."""
    say: Say


Part = Callable[[Bench[S]], Awaitable[list[Row]]]


async def run_parts(
    parts: dict[str, Part[S]], only: Iterable[str], scale: S, directory: Path, say: Say
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    rows: list[Row] = []
    failures: list[str] = []
    for name in tuple(only) or tuple(parts):
        place = directory / name
        place.mkdir()
        try:
            rows += await parts[name](Bench(scale=scale, directory=place, say=say))
        except Exception as error:  # the other parts are still worth their time
            say(f"{name} failed: {error}")
            failures.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return rows, failures
