"""How a node's process ends where it cannot start, cannot go on, or does not stop in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator

from distroml.config import NodeConfig
from distroml.consensus.peers import Address
from distroml.errors import ConfigError
from distroml.node.registration import LEAVE_LIMIT_S
from distroml.runtime.identity import unusable

STOP_LIMIT_S = 12.0
"""A node that has left and not stopped by then (a disk that hangs) just goes: crashing at any time is safe."""
SHUTDOWN_LIMIT_S = LEAVE_LIMIT_S + STOP_LIMIT_S
"""From the signal to the end of the process at the latest; who sets up an init system is told to wait longer."""

_log = logging.getLogger("distroml.node")


class NodeBroken(Exception):
    """This process cannot do its duty any more; what is on disk is sound, so start it again."""


def raise_for_dead(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Crash-only: a node whose coordinator or supervisor is gone would look alive and do nothing."""
    for task in tasks:
        error = None if task.cancelled() else task.exception()
        raise NodeBroken(f"its {task.get_name()} ended: {error!r}") from error


@contextlib.contextmanager
def directory_errors(config: NodeConfig) -> Iterator[None]:
    """An error of the disk as a ConfigError that names the data directory."""
    try:
        yield
    except OSError as error:
        raise unusable(config.data_dir, error) from None


@contextlib.contextmanager
def address_errors(field: str, address: Address | None) -> Iterator[None]:
    """An error of the network as a ConfigError that names the setting."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{field} {address} cannot be used: {error.strerror or error}.", field=field
        ) from None


def leave_within(limit_s: float) -> None:
    """Make sure that the process ends, whatever its disk or a thread does."""

    def leave() -> None:
        _log.error("did not stop within %g s; leaving", limit_s)
        os._exit(1)

    timer = threading.Timer(limit_s, leave)
    timer.daemon = True
    timer.start()
