"""The peer's side of a training run: ``torchrun --standalone`` around ``bench.torchrun_ddp``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from bench.processes import Broken, die_with_parent, kill_tree, tail, within
from bench.workloads import STEPS_BEFORE_KILL, VICTIM_RANK, TrainedRun
from distroml.spec import JobSpec

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEP_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 300.0
RECOVERY_TIMEOUT_S = 60.0
"""A peer that is not back by then counts as this long."""
MAX_RESTARTS = 10_000
MONITOR_INTERVAL_S = 0.02
"""How often torchrun looks after its ranks; its default is 0.1."""
KILL_TIMEOUT_S = 10.0
MAX_LINE_BYTES = 64 * 1024

Event = dict[str, Any]


class Torchrun:
    """A running torchrun and the events that its ranks print."""

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors

    async def event(self) -> Event:
        """The next event of any rank.

        Raises:
            Broken: torchrun ended.
        """
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):
                event: Event = json.loads(line)
                return event
        raise Broken(f"torchrun ended: {self.said()}")

    async def finish(self) -> None:
        """Wait for the end.

        Raises:
            Broken: it did not end well.
        """
        with contextlib.suppress(Broken):
            while True:
                await self.event()
        if await self._process.wait() != 0:
            raise Broken(f"torchrun ended with {self._process.returncode}: {self.said()}")

    def said(self) -> str:
        """The end of what it and its ranks wrote to standard error."""
        self._errors.seek(0)
        return tail(self._errors.read().decode(errors="replace"))


async def time_to_first_step(spec: JobSpec, directory: Path) -> float:
    """Seconds from the launch of torchrun until its first completed step was read."""
    began = time.monotonic()
    async with _launched(spec, directory, "--announce") as peer:
        async with within(FIRST_STEP_TIMEOUT_S, "torchrun's first step"):
            while "step" not in await peer.event():
                pass
        return time.monotonic() - began


async def train(spec: JobSpec, directory: Path) -> TrainedRun:
    """Train to the end, then read the times that rank 0 noted."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        stamps = Path(place, "stamps.json")
        async with (
            _launched(spec, directory, "--stamps", str(stamps)) as peer,
            within(RUN_TIMEOUT_S, "torchrun to train to the end"),
        ):
            await peer.finish()
        return _read_run(stamps)


def _read_run(stamps: Path) -> TrainedRun:
    return msgspec.json.decode(stamps.read_bytes(), type=TrainedRun)


async def time_to_recover(spec: JobSpec, directory: Path) -> float:
    """Seconds from SIGKILL of one rank until a completed step of a later attempt was read.

    ``RECOVERY_TIMEOUT_S`` where there was none by then, which is a lower bound.
    """
    async with elastic(spec, directory) as peer:
        async with within(FIRST_STEP_TIMEOUT_S, "torchrun to train steadily"):
            pid = await _steady(peer)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError, Broken):
            async with asyncio.timeout(RECOVERY_TIMEOUT_S):
                while True:
                    event = await peer.event()
                    if "step" in event and event["attempt"] > 0:
                        return time.monotonic() - killed_at
        return RECOVERY_TIMEOUT_S


@asynccontextmanager
async def elastic(spec: JobSpec, directory: Path) -> AsyncIterator[Torchrun]:
    """A run that tells of its steps and goes on from its last checkpoint after a failure."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        async with _launched(spec, directory, "--announce", "--checkpoints", place) as peer:
            yield peer


async def _steady(peer: Torchrun) -> int:
    """Wait until the peer trains steadily; the pid of the rank to kill."""
    pids: dict[int, int] = {}
    while True:
        event = await peer.event()
        if "pid" in event:
            pids[event["rank"]] = event["pid"]
        elif event["step"] >= STEPS_BEFORE_KILL:
            return pids[VICTIM_RANK]


@asynccontextmanager
async def _launched(spec: JobSpec, directory: Path, *arguments: str) -> AsyncIterator[Torchrun]:
    """torchrun with ``spec.resources.workers`` ranks of the plain DDP script while the context lasts."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        script = ("bench.torchrun_ddp", "--spec", write_spec(spec, place), *arguments)
        options = ("--standalone", "--nproc-per-node", str(spec.resources.workers))
        async with launched(options, script, Path(place), _OWN_STORES) as peer:
            yield peer


@asynccontextmanager
async def launched(
    options: Sequence[str], script: Sequence[str], place: Path, environ: Mapping[str, str]
) -> AsyncIterator[Torchrun]:
    """``torchrun OPTIONS -m SCRIPT...`` while the context lasts; its ranks end with it.

    Args:
        place: a directory for its temporary files.
        environ: variables beside those of this process.
    """
    with tempfile.TemporaryFile(dir=place) as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "torch.distributed.run", *options),
            *("--max-restarts", str(MAX_RESTARTS), "--monitor-interval", str(MONITOR_INTERVAL_S)),
            *("-m", *script),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            preexec_fn=die_with_parent,
            cwd=ROOT,
            limit=MAX_LINE_BYTES,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place), **environ},
        )
        try:
            yield Torchrun(process, errors)
        finally:
            if process.returncode is None:
                kill_tree(process.pid)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_TIMEOUT_S):
                    await process.wait()


def write_spec(spec: JobSpec, place: str) -> str:
    """The path of a file in ``place`` that holds the job."""
    path = Path(place, "spec.json")
    path.write_bytes(msgspec.json.encode(spec))
    return str(path)


# With a store of its own each attempt finds fresh addresses. By default attempts share the agent's store, find the
# dead attempt's addresses there and fail again and again.
_OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
