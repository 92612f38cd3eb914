"""Rows of a benchmark: medians, ratios and aims, as a table for people and as JSON for whoever compares runs.

``ratio`` is above 1 where ours is better, whatever the unit: peer/ours for times, ours/peer for rates.
"""

from __future__ import annotations

import math
import operator
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

RUST_PEER = "a Rust peer reports"
"""Whose figures of itself stand in place of a measurement."""
Better = Literal["lower", "higher"]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">=": operator.ge,
    ">": operator.gt,
}


class Aim(Struct, frozen=True):
    """What a row should reach: ``Aim("ratio", ">=", 0.95)``."""

    subject: Literal["ours", "ratio"]
    relation: Literal["<", "<=", ">=", ">"]
    value: float

    def met(self, ours: float, ratio: float | None) -> bool | None:
        """Whether it is reached; None where there is no ratio to judge."""
        judged = ours if self.subject == "ours" else ratio
        return None if judged is None else _COMPARE[self.relation](judged, self.value)

    def __str__(self) -> str:
        return f"{self.subject} {self.relation} {self.value:g}"


class Values(Struct, frozen=True):
    """One value per run, in the order in which they were measured."""

    ours: list[float]
    peer: list[float]


class Row(Struct, frozen=True, kw_only=True):
    """One quantity of ours beside that of a peer; both are medians over ``runs`` interleaved runs."""

    quantity: str
    unit: str
    ours: float
    peer_name: str
    peer: float | None
    ratio: float | None
    """Above 1 where ours is better."""
    aim: str
    aim_met: bool | None
    runs: int
    """Of the side that ran less often."""
    note: str = ""
    values: Values


class Report(Struct, frozen=True, kw_only=True):
    """All that one call of a benchmark found out."""

    bench: str
    quick: bool
    started_at: str
    wall_s: float
    environment: dict[str, str | int | float]
    rows: list[Row]
    failures: list[str]
    """Parts that could not be measured, and why."""


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones.

    Raises:
        ValueError: there is none.
    """
    if not values:
        raise ValueError("there is no median of no values")
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that is not exceeded by ``share`` of the values (nearest rank); 1.0 gives the greatest.

    Raises:
        ValueError: there is no value, or ``share`` is not in (0, 1].
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"there is no percentile {share:g} of {len(values)} values")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def compare(
    quantity: str,
    unit: str,
    better: Better,
    *,
    ours: Sequence[float],
    peer_name: str,
    peer: Sequence[float],
    aim: Aim | None = None,
    note: str = "",
) -> Row:
    """A row from the values of single runs."""
    own, other = median(ours), median(peer) if peer else None
    ratio = None if other is None else _ratio(own, other, better)
    return Row(
        quantity=quantity,
        unit=unit,
        ours=own,
        peer_name=peer_name,
        peer=other,
        ratio=ratio,
        aim="" if aim is None else str(aim),
        aim_met=None if aim is None else aim.met(own, ratio),
        runs=min(len(ours), len(peer)) if peer else len(ours),
        note=note,
        values=Values(ours=list(ours), peer=list(peer)),
    )


def alone(
    quantity: str,
    values: Sequence[float],
    *,
    unit: str = "s",
    aim: Aim | None = None,
    note: str = "",
) -> Row:
    """A row without a peer; less is better."""
    return compare(quantity, unit, "lower", ours=values, peer_name="", peer=[], aim=aim, note=note)


def percentiles(
    quantity: str, values: Sequence[float], *, unit: str = "s", **aims: Aim
) -> list[Row]:
    """Rows of p50, p99 and the greatest of ``values``; ``aims`` by these names (``max``)."""
    wanted = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    rows = [
        alone(f"{quantity}: {name}", [percentile(values, share)], unit=unit, aim=aims.get(name))
        for name, share in wanted
    ]
    return [
        replace(row, runs=len(values), values=Values(ours=list(values), peer=[])) for row in rows
    ]


def _ratio(ours: float, peer: float, better: Better) -> float | None:
    above, below = (peer, ours) if better == "lower" else (ours, peer)
    return above / below if below > 0 else None


def environment(directory: Path) -> dict[str, str | int | float]:
    """What the numbers depend on; nothing that names the machine.

    Args:
        directory: where the benchmark writes; its kind of file system decides what an fsync costs.
    """
    one, five, _ = os.getloadavg()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "filesystem": _filesystem(directory),
        "load_1min_before": round(one, 2),
        "load_5min_before": round(five, 2),
        **{name: metadata.version(name) for name in ("distroml", "torch", "aiohttp", "msgspec")},
    }


def _filesystem(directory: Path) -> str:
    """Type of the file system that holds ``directory``: that of the longest mount point above it."""
    place, found = directory.resolve(), (0, "unknown")
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return found[1]
    for line in mounts:
        _, point, kind, *_ = line.split()
        if place.is_relative_to(point):
            found = max(found, (len(point), kind))
    return found[1]


def write_json(report: Report, path: Path) -> None:
    """Write the report, indented; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def show(report: Report, console: Console) -> None:
    """Print the rows, then notes and failures."""
    table = Table(title=f"bench {report.bench}{' (quick)' if report.quick else ''}")
    table.add_column("quantity", no_wrap=True)
    table.add_column("unit")
    for heading in ("ours", "peer", "ratio"):
        table.add_column(heading, justify="right")
    for heading in ("peer is", "aim", "met", "runs"):
        table.add_column(heading)
    notes: list[str] = []
    for row in report.rows:
        mark = ""
        if row.note:
            notes.append(row.note)
            mark = f" [{len(notes)}]"
        table.add_row(
            row.quantity + mark.replace("[", r"\["),
            row.unit,
            figure(row.ours),
            figure(row.peer),
            figure(row.ratio),
            row.peer_name,
            row.aim,
            {True: "yes", False: "NO", None: ""}[row.aim_met],
            str(row.runs),
        )
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}", markup=False)
    console.print("ratio > 1: ours is better (peer/ours for times, ours/peer for rates)")
    for failure in report.failures:
        console.print(f"FAILED: {failure}", style="bold red", markup=False)


def figure(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2
    scale = abs(value)
    while scale >= 10:
        scale, digits = scale / 10, digits - 1
    while scale < 1 and digits < 6:
        scale, digits = scale * 10, digits + 1
    return f"{value:.{max(0, digits)}f}"
