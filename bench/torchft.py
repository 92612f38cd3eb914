"""The peer that keeps its survivors: torchft, a lighthouse and one torchrun per replica group of one rank.

It recovers without a checkpoint, as ours does. What the killed group would have trained until it is back is left out.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path

from msgspec import Struct

from bench import live_job, torchrun
from bench.players import playing
from bench.processes import Broken, within
from bench.table import Row, compare
from bench.torchrun import RECOVERY_TIMEOUT_S, Event, Torchrun
from bench.workloads import GLOBAL_BATCH, STEPS_BEFORE_KILL, VICTIM_RANK
from distroml.local_cluster import free_ports
from distroml.spec import JobSpec

PACKAGE = "torchft"
HOW_TO_GET = (
    "torchft is not installed, so it is left out; 'pip install --no-deps torchft==0.2.0' adds it "
    "(the development environment has all that it needs, and --no-deps keeps the torch that is there)"
)
LIGHTHOUSE_TIMEOUT_S = 60.0
"""Importing torchft imports torch."""
STEADY_TIMEOUT_S = 180.0
"""Eight processes import torch before the first step."""
LIGHTHOUSE = {
    "min_replicas": 2,
    "quorum_tick_ms": 10,
    "heartbeat_timeout_ms": 200,
    "join_timeout_ms": 300,
}
HEARTBEAT_MS = 20
TIMEOUT_MS = 2000
"""What was tuned; its own defaults are 100, 5000 and 60000 ms for the lighthouse, 100 ms and 60 s for the groups.

A killed group counts as alive until its heartbeats are too old, and the quorum waits for it. A survivor that is no
neighbour of it in Gloo's ring stays in its collective until that times out or the others leave the group, and the
quorum waits for it as long as one may join late: with two of four as the least quorum, the other two go on without it and
it catches up. The collective's timeout is also all the time that a returning group has to fetch the state.
"""


def installed() -> bool:
    """Whether there is a torchft to compare with."""
    return importlib.util.find_spec(PACKAGE) is not None


def version() -> str:
    """Such as ``torchft 0.2.0``."""
    return f"{PACKAGE} {metadata.version(PACKAGE)}"


class Recovery(Struct, frozen=True, kw_only=True):
    """What came of a killed group; the times are lower bounds where they are ``RECOVERY_TIMEOUT_S``."""

    step_s: float
    """From the kill until a survivor had told of a completed step without the killed group."""
    whole_s: float
    """From the kill until a completed step of all groups had been told of."""
    steps_discarded: int
    """Most that one survivor began and threw away; they were done again."""
    shares_lost: int
    """Shares of batches that no step trained: each step has one for each group."""


def recovery(
    before: Mapping[int, Event], told: Sequence[tuple[float, Event]], groups: int
) -> Recovery:
    """What was told of steps after a kill.

    Args:
        before: surviving group -> the last that it told of a step before the kill, when all took part.
        told: seconds after the kill -> what a group told.
        groups: how many there are.
    """
    steps = [(at, event) for at, event in told if "step" in event]
    fewer = [index for index, (_, event) in enumerate(steps) if event["groups"] < groups]
    after = steps[fewer[0] :] if fewer else []
    whole = [at for at, event in after if event["groups"] == groups]
    discarded = [
        event["discarded"] - before[event["rank"]]["discarded"]
        for _, event in after
        if event["rank"] in before
    ]

    def left_out(event: Event) -> int:
        return groups * int(event["step"]) - int(event["batches"])

    # All groups hold the same count, the one that returned too, since it came with the state.
    shares = [left_out(event) for _, event in after]
    return Recovery(
        step_s=after[0][0] if after else RECOVERY_TIMEOUT_S,
        whole_s=min(whole, default=RECOVERY_TIMEOUT_S),
        steps_discarded=max(discarded, default=0),
        shares_lost=max(shares) - left_out(next(iter(before.values()))) if shares else 0,
    )


def rows(
    what: str, samples_of_share: int, ours: Sequence[live_job.Recovery], peer: Sequence[Recovery]
) -> list[Row]:
    """Ours beside torchft after the same harm; none where there is nothing of torchft."""
    if not peer:
        return []
    name = version()
    late = sum(one.whole_s >= RECOVERY_TIMEOUT_S for one in peer)
    seen = [one.seen_s for one in ours]
    return [
        compare(
            f"{what} to the survivors' next step, as seen outside",
            "s",
            "lower",
            ours=seen,
            peer_name=name,
            peer=[one.step_s for one in peer],
            note=f"ours is a step of all ranks, that of {name} leaves out the killed group's samples; most steps "
            f"that one of its survivors threw away and did again: {max(one.steps_discarded for one in peer)}",
        ),
        compare(
            f"{what} until all are in again, as seen outside",
            "s",
            "lower",
            ours=seen,
            peer_name=name,
            peer=[one.whole_s for one in peer],
            note=f"{late} of {len(peer)} were not back within {RECOVERY_TIMEOUT_S:g} s and count as that long",
        ),
        compare(
            f"{what}: samples that no step trained",
            "1",
            "lower",
            ours=[one.steps_lost * GLOBAL_BATCH for one in ours],
            peer_name=name,
            peer=[one.shares_lost * samples_of_share for one in peer],
        ),
    ]


class Groups:
    """All replica groups and what they tell."""

    def __init__(self, members: Sequence[Torchrun]) -> None:
        self._members = members
        self._told: asyncio.Queue[Event | Broken] = asyncio.Queue()

    @property
    def count(self) -> int:
        return len(self._members)

    async def event(self) -> Event:
        """The next event of any group.

        Raises:
            Broken: the torchrun of a group ended.
        """
        told = await self._told.get()
        if isinstance(told, Broken):
            raise told
        return told

    async def steady(self) -> tuple[int, dict[int, Event]]:
        """Wait until all train steadily: the process to kill, and what each other group told of its last step.

        Raises:
            Broken: one of them failed by itself.
        """
        pids: dict[int, int] = {}
        steps: dict[int, Event] = {}
        while len(steps) < self.count:
            event = await self.event()
            rank = event["rank"]
            if event["attempt"] > 0:
                said = self._members[rank].said()
                raise Broken(f"group {rank} of torchft failed before any was killed: {said}")
            if "pid" in event:
                pids[rank] = event["pid"]
            elif event["step"] >= STEPS_BEFORE_KILL and event["groups"] == self.count:
                steps[rank] = event
        del steps[VICTIM_RANK]
        return pids[VICTIM_RANK], steps

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Groups]:
        """Take what is told while the context lasts."""
        tasks = [asyncio.create_task(self._listen(member)) for member in self._members]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, member: Torchrun) -> None:
        try:
            while True:
                await self._told.put(await member.event())
        except Broken as ended:
            await self._told.put(ended)


async def time_to_recover(spec: JobSpec, directory: Path) -> Recovery:
    """SIGKILL one of the groups that train steadily; wait until all are in again, or for ``RECOVERY_TIMEOUT_S``.

    Raises:
        Broken: they never trained steadily.
    """
    async with running(spec, directory) as peer:
        async with within(STEADY_TIMEOUT_S, "torchft to train steadily"):
            victim, before = await peer.steady()
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        told: list[tuple[float, Event]] = []
        found = recovery(before, told, peer.count)
        with suppress(TimeoutError, Broken):
            async with asyncio.timeout(RECOVERY_TIMEOUT_S):
                while found.whole_s == RECOVERY_TIMEOUT_S:
                    event = await peer.event()
                    told.append((time.monotonic() - killed_at, event))
                    found = recovery(before, told, peer.count)
        return found


@asynccontextmanager
async def running(spec: JobSpec, directory: Path) -> AsyncIterator[Groups]:
    """A lighthouse and ``spec.resources.workers`` replica groups of one rank while the context lasts."""
    count = spec.resources.workers
    async with AsyncExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        log_path = place / "lighthouse.log"
        lighthouse = await stack.enter_async_context(playing("torchft_lighthouse", [], log_path))
        address = await lighthouse.ask("serve", LIGHTHOUSE_TIMEOUT_S, **LIGHTHOUSE)
        script = ["bench.torchft_ddp", "--spec", torchrun.write_spec(spec, str(place))]
        script += ["--timeout-ms", str(TIMEOUT_MS), "--heartbeat-ms", str(HEARTBEAT_MS)]
        script += ["--min-groups", str(LIGHTHOUSE["min_replicas"])]
        members = []
        for number, port in enumerate(free_ports(count)):
            options = ["--master-port", str(port), "--nnodes", "1", "--nproc-per-node", "1"]
            environ = {
                "RUST_LOG": "warn",  # by default it logs several lines per step
                "TORCHFT_LIGHTHOUSE": address,
                "REPLICA_GROUP_ID": str(number),
                "NUM_REPLICA_GROUPS": str(count),
            }
            group = torchrun.launched(options, script, place, environ)
            members.append(await stack.enter_async_context(group))
        yield await stack.enter_async_context(Groups(members).listening())
