"""The global options of a command line call, and how its results reach the terminal.

Commands get a ``Context`` and use its ``client``; documents go out through ``print_json`` (``--json``), everything
for people through a rich console that is imported only then.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from cyclopts import Parameter
from msgspec import Struct

from distroml.client import AsyncClient

if TYPE_CHECKING:
    from rich.console import Console

_T = TypeVar("_T")

STDIN = "<stdin>"
"""What ``-`` on the command line becomes before options are looked for."""
PIPE_WIDTH = 4096
"""Columns of a table that no terminal bounds, so that a pipe gets whole values."""

JobReference = Annotated[
    str, Parameter(name="ID", help="job id, a unique prefix of one, or a name")
]


class Context(Struct, frozen=True, kw_only=True):
    """What the global options said."""

    url: str | None
    json: bool
    timeout_s: float

    def run(self, work: Callable[[AsyncClient], Awaitable[_T]]) -> _T:
        """Do ``work`` with a client for the nodes that were named."""

        async def whole() -> _T:
            async with AsyncClient(self.url, timeout_s=self.timeout_s) as client:
                return await work(client)

        return asyncio.run(whole())


Ctx = Annotated[Context, Parameter(parse=False)]


def print_json(document: Any) -> None:
    """A whole answer of the API, indented."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def print_json_line(document: Any) -> None:
    """One event of a stream on a line of its own, visible at once to whoever reads the pipe."""
    sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
    sys.stdout.flush()


def console() -> Console:
    """A console for standard output."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    empty: str,
    right: Sequence[str] = (),
) -> None:
    """A table for people, or ``empty`` where there are no rows. Columns in ``right`` are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        number = name in right
        table.add_column(name, justify="right" if number else "left", no_wrap=number)
    for row in rows:
        table.add_row(*("-" if cell is None or cell == "" else printable(cell) for cell in row))
    out = console()
    with out.capture() as drawn:
        out.print(table if table.row_count else empty)
    for line in drawn.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def local_time(at: object) -> str:
    """A time of the API (RFC 3339) as local date and time; ``-`` for none."""
    if not isinstance(at, str):
        return "-"
    return datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def printable(text: object) -> str:
    """``text`` without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in str(text))


def size(count: object) -> str:
    """Bytes in the largest binary unit that keeps it at least 1."""
    if not isinstance(count, int | float):
        return "-"
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
