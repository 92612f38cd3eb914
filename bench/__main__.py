"""``python -m bench NAME [--quick] [--json FILE]``: run one benchmark; without a name, list them.

Exit codes: 0 everything was measured (whether or not the aims were met), 1 some part failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.table import Report, Row, environment, show, write_json

BENCHMARKS = {
    "spine": "start, submit, steps per second and acknowledged writes, beside plain torchrun",
    "heartbeats": "1,000 workers on 125 agents that report to one leader: cost of a report, and the rate held",
    "barrier": "100 and 1,000 workers that meet in the control plane, beside bare asyncio",
    "consensus": "writes per second and their latency on three nodes with fsync, beside etcd",
    "failover": "SIGKILL of the leader to the next acknowledged write, and that none is lost, beside etcd",
    "recovery": "from a killed worker, node or leader to the next step, and what being able to costs, beside torchrun and torchft",
    "checkpoint": "saving, the stall for it, and restoring, beside dd, memcpy, DCP, torch.save and safetensors",
    "elections": "leader changes that nobody needed while a job trains on all slots",
}
"""Name of the module -> one line on what it measures."""


OPTIONS = ("load", "minutes")
"""Options of single benchmarks; a module names those that it takes in its own ``OPTIONS``."""
MAX_MINUTES = 24 * 60
RESULTS = Path("bench-results")
PIPE_WIDTH = 140
"""Characters of a line where the output is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.name is None:
        print(listing())
        return 0
    if arguments.name not in BENCHMARKS:
        print(f"There is no benchmark '{arguments.name}'.\n{listing()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"bench.{arguments.name}")
    options = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    if unknown := sorted(options.keys() - getattr(module, "OPTIONS", frozenset())):
        print(f"{arguments.name} has no option --{', --'.join(unknown)}.", file=sys.stderr)
        return 2
    parts = module.PARTS
    only = tuple(filter(None, arguments.only.split(",")))
    if unknown := [name for name in only if name not in parts]:
        print(f"{arguments.name} has the parts {', '.join(parts)}; not {', '.join(unknown)}.", file=sys.stderr)  # fmt: skip
        return 2
    try:
        report = asyncio.run(_measure(arguments.name, arguments.quick, only, options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return 130
    file = arguments.json or result_file(arguments.name, arguments.quick)
    write_json(report, file)
    show(report, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    print(f"written to {file}")
    return 1 if report.failures else 0


def result_file(name: str, quick: bool) -> Path:
    """Where the rows go if nothing else is said; the last run replaces the one before."""
    return RESULTS / f"{name}{'-quick' if quick else ''}.json"


def listing() -> str:
    """The benchmarks, one per line."""
    lines = [f"  {name:10} {line}" for name, line in BENCHMARKS.items()]
    return "\n".join(["python -m bench NAME [--quick] [--only PART,...] [--json FILE]", *lines])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure beside a peer.")
    parser.add_argument("name", nargs="?", help="which benchmark; without it, they are listed")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--only", default="", metavar="PART,...", help="some parts of it")
    parser.add_argument("--load", action="store_true", default=None, help="failover: all cores are busy")  # fmt: skip
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="elections: how long to watch")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where the rows go (default: {RESULTS}/NAME.json)")  # fmt: skip
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= MAX_MINUTES:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {MAX_MINUTES}")
    return minutes


async def _measure(
    name: str, quick: bool, only: tuple[str, ...], options: Mapping[str, Any]
) -> Report:
    """Run in a temporary directory; SIGTERM ends it as SIGINT does, with everything cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    console = Console(stderr=True)
    began, started_at = time.monotonic(), datetime.now(UTC)
    rows: list[Row]
    failures: list[str]
    with tempfile.TemporaryDirectory(prefix="distroml-bench-") as place:
        facts = environment(Path(place))
        rows, failures = await importlib.import_module(f"bench.{name}").run(
            quick,
            Path(place),
            lambda text: console.print(f"{time.monotonic() - began:6.0f} s  {text}", style="dim"),
            only,
            **options,
        )
    with contextlib.suppress(OSError):
        facts["load_1min_after"] = round(os.getloadavg()[0], 2)
    return Report(
        bench=name,
        quick=quick,
        started_at=started_at.isoformat(timespec="seconds"),
        wall_s=round(time.monotonic() - began, 1),
        environment=facts,
        rows=rows,
        failures=failures,
    )


if __name__ == "__main__":
    sys.exit(main())
