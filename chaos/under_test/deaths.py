"""Processes that die at a named point on a checkpoint's way, right before a thing is done or right after it.

Whoever wants a death writes the point, the moment and the process into a file. When that process comes there, it takes the file
away and kills itself, so a node dies once, however often it is started again.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

VARIABLE = "CHAOS_DEATH"
"""Path of the file; without it nothing is put in."""


class Death(Struct, frozen=True):
    """What is in the file."""

    point: str
    after: bool
    """Whether the thing is done first."""
    pid: int
    """Whose."""


class Point(Struct, frozen=True):
    """A call of the product's own code."""

    module: str
    name: str
    """Qualified, as ``Class.method``."""
    command: str = ""
    """Only where an argument is, or has, a command of this type."""


AGENT_POINTS = {
    "shard told": Point("distroml.runtime.replicas.for_workers", "ForWorkers._take_shard"),
    "copies": Point("distroml.runtime.replicas.keeping", "Keeper.keep"),
    "copy arrives": Point("distroml.runtime.replicas.own_copies", "OwnCopies.publish"),
    "report": Point("distroml.runtime.local_worker", "LocalWorker.end_copying"),
    "manifest put": Point("distroml.runtime.committing", "write_manifest"),
    "proposal": Point("distroml.consensus.proposer", "Proposer.propose", "CommitCheckpoint"),
    "apply": Point("distroml.consensus.machine", "apply_entry", "CommitCheckpoint"),
    "latest": Point("distroml.runtime.committing", "publish_latest"),
    "retirement": Point("distroml.consensus.machine", "apply_entry", "RetireCheckpoints"),
    "delete": Point("distroml.runtime.checkpoint.stores.file", "FileStore.delete"),
}
"""On the way of a checkpoint through agents, in order."""
WORKER_POINTS = {
    "snapshot": Point("distroml.runtime.worker.snapshot", "Checkpointer.save"),
    "shard write": Point("distroml.runtime.checkpoint.stores.file", "_StagedFile.write"),
    "shard sync": Point("distroml.runtime.checkpoint.stores.file", "_StagedFile.sync"),
    "shard publish": Point("distroml.runtime.checkpoint.stores.file", "_StagedFile.publish"),
    "word of the shard": Point("distroml.runtime.worker.snapshot", "Checkpointer._durable"),
}
"""On its way through workers."""


def ask(path: Path, death: Death) -> None:
    """Have a process die so."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(death))
    fresh.replace(path)


def install_if_asked(points: dict[str, Point]) -> None:
    """Put the points into this process, where the environment names a file. The product is imported by then."""
    if given := os.environ.get(VARIABLE):
        for name, point in points.items():
            _put_in(Path(given), name, point)


def _put_in(path: Path, name: str, point: Point) -> None:
    holder: Any = importlib.import_module(point.module)
    *owners, last = point.name.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    setattr(holder, last, _deadly(path, name, point, getattr(holder, last)))


def _deadly(path: Path, name: str, point: Point, call: Callable[..., Any]) -> Callable[..., Any]:
    def die_if_due(after: bool, args: tuple[Any, ...]) -> None:
        if point.command and not any(map(functools.partial(_is_of, point.command), args)):
            return
        if _is_wanted(path, Death(name, after, os.getpid())):
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    return around(call, die_if_due)


def around(
    call: Callable[..., Any], passing: Callable[[bool, tuple[Any, ...]], None]
) -> Callable[..., Any]:
    """``call``, a coroutine function or not, with a look in front of it and behind it.

    Args:
        passing: is told whether the call is done, and its positional arguments.
    """

    @functools.wraps(call)
    def reached(*args: Any, **kwargs: Any) -> Any:
        passing(False, args)
        result = call(*args, **kwargs)
        passing(True, args)
        return result

    @functools.wraps(call)
    async def reached_in_loop(*args: Any, **kwargs: Any) -> Any:
        passing(False, args)
        result = await call(*args, **kwargs)
        passing(True, args)
        return result

    return reached_in_loop if inspect.iscoroutinefunction(call) else reached


def _is_of(command: str, argument: object) -> bool:
    return command in (type(argument).__name__, type(getattr(argument, "command", None)).__name__)


def _is_wanted(path: Path, death: Death) -> bool:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Death) == death
    except FileNotFoundError:
        return False
