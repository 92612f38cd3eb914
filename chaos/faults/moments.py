"""Waiting, for a bounded time, until the cluster is at a moment that is bad for a fault."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from chaos.cluster import Cluster
from chaos.faults.strike import Unfit
from distroml.errors import DistroMLError

POLL_S = 0.01
WAIT_S = 10.0


async def recovery(cluster: Cluster) -> None:
    """Until some job is in the middle of a recovery. Raises Unfit where none is seen in time."""
    deadline_s = time.monotonic() + WAIT_S
    async with cluster.client(timeout_s=2.0) as client:
        while time.monotonic() < deadline_s:
            with contextlib.suppress(DistroMLError, OSError):
                for status in ("RECOVERING", "STARTING"):
                    if (await client.jobs(status=status, limit=1))["jobs"]:
                        return
            await asyncio.sleep(POLL_S)
    raise Unfit(f"no job was seen to recover within {WAIT_S:g} s")


async def checkpoint_appears(cluster: Cluster) -> Path:
    """Until the directory of a checkpoint comes to be in some store; its path in there. Raises Unfit where none does."""
    known = set(checkpoint_directories(cluster.store_dirs))
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        if fresh := set(checkpoint_directories(cluster.store_dirs)) - known:
            return Path(*max(fresh).parts[-4:])  # job, run, "checkpoints", step
        await asyncio.sleep(POLL_S)
    raise Unfit(f"no checkpoint was begun within {WAIT_S:g} s")


async def election(cluster: Cluster, names: Sequence[str], leader: str) -> None:
    """Until one of these nodes no longer follows a leader that is gone. Raises Unfit where none does so."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        for found in await asyncio.gather(*(cluster.health(name) for name in names)):
            if found is not None and (found["leader"] != leader or found["role"] == "candidate"):
                return
        await asyncio.sleep(POLL_S)
    raise Unfit(f"no election was seen within {WAIT_S:g} s")


def checkpoint_directories(stores: Iterable[Path]) -> list[Path]:
    """All directories of checkpoints in these stores, whole or not; those of a run in the order of their steps."""
    found: list[Path] = []
    for store in stores:
        with contextlib.suppress(OSError):
            found += sorted(store.glob("*/*/checkpoints/ckpt_step_*"))
    return found
