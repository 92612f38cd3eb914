"""One run: a cluster, clients and observers, a schedule of faults, the aftermath, the judgement, the report.

The folder of a run has ``plan.json``, ``history.jsonl``, ``nodes/NAME.log``, ``harness.log`` and the report. With the
plan it can be played again, with the history judged again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

import distroml
from chaos import aftermath, leftovers, report
from chaos.checkers import Limits, counts, judge
from chaos.cluster import HTTP_PORT, PEER_PORT, CannotStart, Cluster
from chaos.ending import END_TIMEOUT_S
from chaos.kinds import BY_NAME, Need
from chaos.observers import Observers
from chaos.play import Missed, Player
from chaos.processes import own_mark
from chaos.records import (
    Began,
    Ended,
    JobEnded,
    Leftover,
    Record,
    Violation,
    read_history,
)
from chaos.schedule import Schedule
from chaos.specs import OBJECTS, TRAINED, kept_in
from chaos.under_test.edits import Edit
from chaos.workload import Workload

_log = logging.getLogger(__name__)

PLAN = "plan.json"
CORES, LOAD = "cores", "load"
"""Among the versions that a history tells: what the machine had, and what others did with it when the run began."""


class Invalid(Exception):
    """The run says nothing: too little happened in it, or it is not there."""


class Plan(Struct, frozen=True, kw_only=True):
    """What to play; with this a run can be played again."""

    schedule: Schedule
    kinds: tuple[str, ...]
    """Those that could be drawn."""
    jobs: int = 2
    """Training jobs at a time."""
    specs: tuple[str, ...] = tuple(TRAINED)
    """Names of the jobs that clients submit."""
    namespaces: bool = True
    """Where the machine allows it."""
    mutant: str | None = None
    edits: tuple[Edit, ...] = ()
    end_timeout_s: float = END_TIMEOUT_S
    """In which the jobs end once the faults are over."""


class Result(Struct, frozen=True, kw_only=True):
    """What came of a run."""

    inflicted: tuple[str, ...]
    missed: tuple[Missed, ...]
    violations: tuple[Violation, ...]


async def run(plan: Plan, folder: Path, references: Sequence[JobEnded] = ()) -> Result:
    """Play, judge and report.

    Args:
        references: undisturbed jobs of an earlier run on this machine, which need not be played again.

    Raises:
        CannotStart, NetworkUnusable, NoObjects: the cluster under test did not come up.
        Invalid: too little happened.
        FileExistsError: the folder holds a run already.
    """
    _write_plan(folder, plan)
    with _log_into(folder / "harness.log"):
        async with _terminating():
            player = await _play(plan, folder, references)
        return await asyncio.to_thread(_judge, folder, player)


async def _play(plan: Plan, folder: Path, references: Sequence[JobEnded]) -> Player:
    schedule, known, (load, _, _) = plan.schedule, leftovers.before(), os.getloadavg()
    cluster = Cluster(
        folder,
        nodes=schedule.nodes,
        mutant=plan.edits,
        namespaces=plan.namespaces,
        objects=not set(plan.specs).isdisjoint(kept_in(OBJECTS)),
    )
    async with cluster:
        cluster.history.write(
            Began(
                at_s=cluster.clock(),
                seed=schedule.seed,
                duration_s=schedule.duration_s,
                nodes=schedule.nodes,
                faults=plan.kinds,
                mutant=plan.mutant,
                versions={
                    "distroml": distroml.__version__,
                    "python": platform.python_version(),
                    CORES: str(len(os.sched_getaffinity(0))),
                    LOAD: f"{load:.1f}",
                },
            )
        )
        workload = Workload(
            cluster, schedule.seed, jobs=plan.jobs, specs=plan.specs, first=_aimed_at(schedule)
        )
        await workload.prepare(references)
        player, enough, over = Player(cluster, schedule), asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(Observers(cluster).run_until(over), name="observers")
            work = group.create_task(workload.run_until(enough), name="workload")
            await player.play()
            enough.set()
            await work
            await aftermath.settle(
                cluster,
                workload,
                warm=lambda: _warm_or_not(cluster),
                end_timeout_s=plan.end_timeout_s,
            )
            over.set()
        await cluster.stop_nodes()
        for leftover in _left(cluster, known):
            cluster.history.write(leftover)
        cluster.history.write(Ended(at_s=cluster.clock()))
    return player


def _aimed_at(schedule: Schedule) -> tuple[str, ...]:
    """The jobs that faults of this schedule need to have something to hit, where not every job will do."""
    aimed = any(Need.OBJECTS in BY_NAME[one.kind].needs for one in schedule.planned)
    return kept_in(OBJECTS) if aimed else ()


async def _warm_or_not(cluster: Cluster) -> None:
    """A node that does not come back is a matter for the checkers: its jobs and replicas tell."""
    try:
        await cluster.wait_warm()
    except CannotStart as error:
        _log.error("%s", error)


def _left(cluster: Cluster, known: leftovers.Before) -> list[Leftover]:
    hosts = [node.url.removeprefix("http://").rpartition(":")[0] for node in cluster.nodes.values()]
    return leftovers.look(
        own_mark(),
        cluster.clock(),
        known,
        [node.data_dir for node in cluster.nodes.values()],
        [f"{host}:{port}" for host in hosts for port in (PEER_PORT, HTTP_PORT)]
        + ([cluster.objects.address] if cluster.objects else []),
    )


def _judge(folder: Path, player: Player) -> Result:
    violations = judge_again(folder)
    if violations and not serious(violations):
        missed = "; ".join(f"{one.planned.kind}: {one.why}" for one in player.missed)
        why = "; ".join(one.what for one in violations)
        raise Invalid(f"{why}{f' (missed: {missed})' if missed else ''}")
    return Result(
        inflicted=tuple(player.inflicted), missed=tuple(player.missed), violations=violations
    )


def serious(violations: Sequence[Violation]) -> bool:
    """Whether the product broke a promise, and not only the run did too little to say anything."""
    return any(one.checker != counts.NAME for one in violations)


def judge_again(folder: Path) -> tuple[Violation, ...]:
    """Judge the history of a run that is on disk, and write its report anew.

    Raises:
        FileNotFoundError, msgspec.ValidationError: there is none that this program reads.
    """
    history = read_history(folder)
    violations = tuple(judge(history, _limits(history)))
    report.write_report(folder, history, violations)
    return violations


def _limits(history: Sequence[Record]) -> Limits:
    """Times are those of a machine with a core per node; one that has less to give is allowed to be slower."""
    for record in history:
        if isinstance(record, Began) and (cores := float(record.versions.get(CORES, "0"))):
            wanted = record.nodes + float(record.versions.get(LOAD, "0"))
            return Limits(machine_factor=max(1.0, wanted / cores))
    return Limits()


def _write_plan(folder: Path, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PLAN).open("xb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")


def read_plan(folder: Path) -> Plan:
    """Of a run that is on disk.

    Raises:
        FileNotFoundError, msgspec.ValidationError: there is none that this program reads.
    """
    return msgspec.json.decode((folder / PLAN).read_bytes(), type=Plan)


def references_in(folder: Path) -> tuple[JobEnded, ...]:
    """The undisturbed jobs of a run that is on disk."""
    history = read_history(folder)
    return tuple(one for one in history if isinstance(one, JobEnded) and one.undisturbed)


@contextlib.asynccontextmanager
async def _terminating() -> AsyncIterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, so that everything is cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@contextlib.contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """What the harness itself has to say."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger("chaos")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
