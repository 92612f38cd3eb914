"""Useful steps per second while ranks are killed at a steady pace: ours and torchrun's.

A step is useful once: what is done again after a failure does not count. So it is the gain in completed steps over
the time, however often they were trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec import Struct

from bench import torchrun
from bench.live_job import LiveJob
from bench.processes import within
from bench.torchrun import Torchrun
from bench.workloads import STEPS_BEFORE_KILL
from distroml.spec import JobSpec

KILL_EVERY_S = 5.0
STEADY_TIMEOUT_S = 60.0


class Goodput(Struct, frozen=True):
    """What became of the time."""

    rate: float
    """Useful steps per second."""
    kills: int


async def of_ours(job: LiveJob, duration_s: float, rng: random.Random) -> Goodput:
    """Of a job that trains steadily."""

    async def kill() -> bool:
        pids = [worker["pid"] for worker in (await job.view())["workers"] if worker["pid"]]
        return _kill_one_of(pids, rng)

    began, first = time.monotonic(), (await job.view())["step"]
    kills = await _kill_at_a_steady_pace(kill, began, duration_s)
    last = (await job.view())["step"]
    return Goodput((last - first) / (time.monotonic() - began), kills)


async def of_torchrun(
    spec: JobSpec, directory: Path, duration_s: float, rng: random.Random
) -> Goodput:
    """Of a torchrun that trains steadily; it may restart as often as it must."""
    async with torchrun.elastic(spec, directory) as peer:
        ranks = _Ranks()
        async with within(STEADY_TIMEOUT_S, "torchrun to train steadily"):
            while ranks.step < STEPS_BEFORE_KILL:
                ranks.take(await peer.event())
        listening = asyncio.create_task(ranks.listen(peer))

        async def kill() -> bool:
            return _kill_one_of(list(ranks.pids.values()), rng)

        try:
            began, first = time.monotonic(), ranks.step
            kills = await _kill_at_a_steady_pace(kill, began, duration_s)
            if listening.done():
                listening.result()  # raises: it ended
            return Goodput((ranks.step - first) / (time.monotonic() - began), kills)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


class _Ranks:
    """What torchrun's ranks told of themselves."""

    def __init__(self) -> None:
        self.step = 0
        """The most steps that any attempt had completed."""
        self.pids: dict[int, int] = {}

    def take(self, event: torchrun.Event) -> None:
        if "pid" in event:
            self.pids[event["rank"]] = event["pid"]
        else:
            self.step = max(self.step, event["step"])

    async def listen(self, peer: Torchrun) -> None:
        while True:
            self.take(await peer.event())


async def _kill_at_a_steady_pace(
    kill: Callable[[], Awaitable[bool]], began: float, duration_s: float
) -> int:
    """One every ``KILL_EVERY_S``, the last that long before the end; how many hit a living process."""
    kills = 0
    for number in range(1, int(duration_s / KILL_EVERY_S)):
        await asyncio.sleep(max(0.0, began + number * KILL_EVERY_S - time.monotonic()))
        kills += await kill()
    await asyncio.sleep(max(0.0, began + duration_s - time.monotonic()))
    return kills


def _kill_one_of(pids: list[int], rng: random.Random) -> bool:
    if not pids:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(pids), signal.SIGKILL)
        return True
    return False
