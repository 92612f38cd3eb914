"""Runs the parts of a benchmark one after the other; one that fails does not take the others with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from bench.table import Row

Say = Callable[[str], None]
_Bench = TypeVar("_Bench")
Part = Callable[[_Bench], Awaitable[list[Row]]]


async def run_parts(
    parts: Mapping[str, Part[_Bench]],
    make: Callable[[Path], _Bench],
    directory: Path,
    say: Say,
    only: tuple[str, ...] = (),
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed.

    Args:
        make: gives a part what it works with, from an empty directory of its own.
    """
    rows: list[Row] = []
    failures: list[str] = []
    for name in only or tuple(parts):
        place = directory / name
        place.mkdir()
        try:
            rows += await parts[name](make(place))
        except Exception as error:  # the other parts are still worth their time
            say(f"{name} failed: {error}")
            failures.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return rows, failures
