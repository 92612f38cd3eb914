"""``python -m chaos``: break a real cluster on purpose, and see whether it kept its promises.

Exit status: 0 everything held, 1 a promise was broken (or a mutant survived), 2 the run could not be made or says nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from chaos import machine, mutants, run, schedule
from chaos.cluster import CannotStart
from chaos.kinds import KINDS, Kind, Need, UnknownFault, chosen, possible
from chaos.network import NetworkUnusable
from chaos.objects import NoObjects
from chaos.records import JobEnded, Violation, read_history
from chaos.tally import Tally

HELD, BROKEN, NOTHING = 0, 1, 2
RUNS = Path("chaos-runs")
SHORTEST_S, LONGEST_S = 5.0, 24 * 3600.0
SOAK_RUN_S = 90.0
MAX_HOURS = 24 * 14
SHOWN_VIOLATIONS = 20
_UNUSABLE = (
    CannotStart,
    NetworkUnusable,
    NoObjects,
    UnknownFault,
    run.Invalid,
    FileExistsError,
    FileNotFoundError,
    msgspec.DecodeError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(given.do(given))
    except _UNUSABLE as error:
        print(f"could not run: {error}", file=sys.stderr)
        return NOTHING
    except ExceptionGroup as group:
        if (unexpected := group.split(_UNUSABLE)[1]) is not None:
            raise unexpected from None
        print(f"could not run: {_first(group)}", file=sys.stderr)
        return NOTHING
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; everything that was started has been removed", file=sys.stderr)
        return NOTHING


def _first(error: BaseException) -> BaseException:
    """What began it, out of groups within groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description="Breaks a real cluster of real processes on purpose, and judges what came of it.",
        epilog="Exit status: 0 everything held, 1 a promise was broken or a mutant survived, 2 nothing can be said.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("run", help="one run: faults drawn from a seed, then the judgement")
    _common(one)
    one.add_argument("--seed", type=int, help="of schedule and clients (default: a fresh one, printed)")  # fmt: skip
    one.add_argument("--duration", type=_duration, default=120.0, metavar="S", help="of the faults, s (default: 120)")  # fmt: skip
    one.set_defaults(do=_run)

    listing = commands.add_parser("list-faults", help="all kinds of faults, and what they need")
    listing.set_defaults(do=_list_faults)

    again = commands.add_parser("replay", help="the same schedule and seed again")
    again.add_argument("folder", type=Path, metavar="RUN", help="folder of the run that was kept")
    _keep(again)
    again.set_defaults(do=_replay)

    verdict = commands.add_parser("judge", help="judge a history on disk again, without a cluster")
    verdict.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    verdict.set_defaults(do=_judge)

    soak = commands.add_parser("soak", help="many seeds, and a tally over all")
    _common(soak)
    soak.add_argument("--hours", type=_hours, default=2.0, metavar="H", help="(default: 2)")
    soak.add_argument("--seed", type=int, help="of the first run (default: a fresh one, printed)")
    soak.add_argument("--duration", type=_duration, default=SOAK_RUN_S, metavar="S", help=f"of each run's faults, s (default: {SOAK_RUN_S:g})")  # fmt: skip
    soak.set_defaults(do=_soak)

    evil = commands.add_parser("mutants", help="known faults brought back: each must be caught")
    evil.add_argument("names", nargs="*", metavar="NAME", help="mutants (default: all)")
    evil.add_argument("--list", action="store_true", help="only say what there is")
    evil.add_argument("--short", action="store_true", help="only the set for every build")
    _keep(evil)
    evil.set_defaults(do=_mutants)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", default="all", metavar="WHICH", help="families and kinds, comma-separated (default: all)")  # fmt: skip
    parser.add_argument("--nodes", type=int, choices=(3, 5), default=3, help="voters (default: 3)")
    parser.add_argument("--jobs", type=_jobs, default=2, metavar="N", help="training jobs at a time (default: 2)")  # fmt: skip
    parser.add_argument("--no-namespaces", action="store_true", help="loopback addresses, without faults of the network")  # fmt: skip
    _keep(parser)


def _keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=Path, metavar="DIR", help=f"keep the folder of a run here, whatever comes of it (default: {RUNS}/, if something was broken)")  # fmt: skip


# --- commands ---------------------------------------------------------------------------------------------------


def _run(given: argparse.Namespace) -> int:
    kinds = asyncio.run(_usable(given))
    seed = _fresh_seed() if given.seed is None else given.seed
    plan = _plan(given, seed, kinds)
    return _play(plan, given.keep, f"seed-{seed}")


def _replay(given: argparse.Namespace) -> int:
    plan = run.read_plan(given.folder)
    return _play(plan, given.keep, f"seed-{plan.schedule.seed}-again")


def _plan(given: argparse.Namespace, seed: int, kinds: Sequence[Kind]) -> run.Plan:
    return run.Plan(
        schedule=schedule.draw(seed, given.duration, given.nodes, kinds),
        kinds=tuple(kind.name for kind in kinds),
        jobs=given.jobs,
        namespaces=not given.no_namespaces,
    )


def _judge(given: argparse.Namespace) -> int:
    violations = run.judge_again(given.folder)
    _tell(violations, given.folder)
    if run.serious(violations):
        return BROKEN
    return NOTHING if violations else HELD


def _list_faults(given: argparse.Namespace) -> int:
    found = asyncio.run(machine.look())
    for kind in KINDS:
        needs = ", ".join(need for need in kind.needs)
        lacking = "" if possible([kind], found.has) else "  (not on this machine)"
        print(f"{kind.name:18} {kind.family:8} {kind.does}{f'; needs {needs}' if needs else ''}{lacking}")  # fmt: skip
    for need, why in found.lacks.items():
        print(f"\nno {need}: {why}")
    return HELD


def _soak(given: argparse.Namespace) -> int:
    kinds = asyncio.run(_usable(given))
    seed = _fresh_seed() if given.seed is None else given.seed
    ends_s, tally = time.monotonic() + given.hours * 3600, Tally()
    references: tuple[JobEnded, ...] = ()
    print(f"from seed {seed} on", flush=True)
    while time.monotonic() < ends_s:
        folder, began_s = _folder(given.keep, f"seed-{seed}"), time.monotonic()
        try:
            result = asyncio.run(run.run(_plan(given, seed, kinds), folder, references))
        except run.Invalid as error:
            tally.invalid += 1
            print(f"seed {seed}: invalid: {error}; see {folder}", flush=True)
        else:
            references = references or run.references_in(folder)
            tally.add(seed, read_history(folder), result.violations)
            took_s = time.monotonic() - began_s
            print(f"seed {seed}: {len(result.inflicted)} faults, {len(result.violations)} violations, {took_s:.0f} s", flush=True)  # fmt: skip
            _tell(result.violations, folder)
            if not result.violations and given.keep is None:
                shutil.rmtree(folder)
        seed += 1
    print(tally)
    if tally.violations:
        return BROKEN
    return HELD if tally.runs else NOTHING


def _mutants(given: argparse.Namespace) -> int:
    if unknown := sorted(set(given.names) - mutants.BY_NAME.keys()):
        raise run.Invalid(f"there is no mutant {', '.join(unknown)}; see 'mutants --list'")
    wanted = [
        one
        for one in mutants.MUTANTS
        if (not given.names or one.name in given.names) and (one.short or not given.short)
    ]
    if given.list:
        for one in wanted:
            print(f"{one.name:24} {one.breaks}")
        return HELD
    survivors = 0
    for one in wanted:
        folder = _folder(given.keep, f"mutant-{one.name}")
        verdict = asyncio.run(mutants.play(one, folder))
        survivors += not verdict.caught
        word = "caught  " if verdict.caught else "SURVIVED"
        print(f"{word} {one.name:24} {verdict.took_s:5.0f} s  {verdict.why}", flush=True)
        if given.keep is None and verdict.caught:
            shutil.rmtree(folder)
    print(f"{len(wanted) - survivors} of {len(wanted)} caught")
    return BROKEN if survivors else HELD


# --- what they share --------------------------------------------------------------------------------------------


async def _usable(given: argparse.Namespace) -> tuple[Kind, ...]:
    """What was asked for and can be inflicted here; what cannot is told, and refused where it was named."""
    kinds = chosen(given.faults)
    found = await machine.look(namespaces=not given.no_namespaces)
    usable = possible(kinds, found.has)
    named = {word.strip() for word in given.faults.split(",")}
    left_out = [kind for kind in kinds if kind not in usable]
    for kind in left_out:
        why = "; ".join(found.lacks[need] for need in kind.needs if need in found.lacks)
        if kind.name in named:
            raise run.Invalid(f"{kind.name} cannot be inflicted here: {why}")
        print(f"left out: {kind.name}: {why}", file=sys.stderr)
    if Need.OBJECTS in found.lacks:
        print(
            f"no job keeps its checkpoints in s3://: {found.lacks[Need.OBJECTS]}", file=sys.stderr
        )
    if not usable:
        raise run.Invalid("none of these faults can be inflicted here")
    return usable


def _play(plan: run.Plan, keep: Path | None, name: str) -> int:
    print(plan.schedule, flush=True)
    folder = keep or _folder(None, name)
    try:
        result = asyncio.run(run.run(plan, folder))
    except BaseException:
        print(f"what there is of the run is in {folder}", file=sys.stderr)
        raise
    tally = Tally()
    tally.add(plan.schedule.seed, read_history(folder), result.violations)
    for missed in result.missed:
        print(f"missed: {missed.planned.kind}: {missed.why}")
    print(tally)
    _tell(result.violations, folder)
    if keep is None and not result.violations:
        shutil.rmtree(folder)
    else:
        print(f"kept in {folder}: report.html, report.json, plan.json, history.jsonl, nodes/")
    return BROKEN if result.violations else HELD


def _tell(violations: Sequence[Violation], folder: Path) -> None:
    for one in violations[:SHOWN_VIOLATIONS]:
        print(f"VIOLATION {one.checker}: {one.what}")
    if violations:
        more = len(violations) - SHOWN_VIOLATIONS
        print(f"{f'and {more} more; ' if more > 0 else ''}all of it is in {folder}", flush=True)


def _folder(keep: Path | None, name: str) -> Path:
    return (keep or RUNS) / f"{name}-{int(time.time())}"


def _fresh_seed() -> int:
    return random.SystemRandom().randrange(10**6)


def _between(text: str, low: float, high: float, unit: str) -> float:
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} must be a number of {unit} from {low:g} to {high:g}"
    )


def _duration(text: str) -> float:
    return _between(text, SHORTEST_S, LONGEST_S, "seconds")


def _hours(text: str) -> float:
    return _between(text, 0.01, MAX_HOURS, "hours")


def _jobs(text: str) -> int:
    return round(_between(text, 1, 16, "jobs"))


if __name__ == "__main__":
    sys.exit(main())
