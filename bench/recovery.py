"""Recovery in place: from harm done to a running job until it trains again, and what being able to costs.

A job of four ranks trains a million parameters on three real nodes: agents, Raft, commits through the log. Within
that one job a worker is killed or stopped, or a node or the leader loses power, time after time. Beside it torchrun's
elastic restarts train the same thing on the same machine, with its own store for each attempt and a short monitor
interval, which is the best that it can do, and torchft, where it is installed, with its timeouts cut short.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bench import goodput as under_fire
from bench import live_job, throughput, torchft, torchrun
from bench.live_job import ENDLESS_EPOCHS, PHASES, WORKERS, LiveJob, Recovery, cluster_at
from bench.parts import Bench, Part, Say, run_parts
from bench.processes import cpu_s
from bench.table import Aim, Row, Values, alone, compare, median, percentiles
from bench.workloads import GLOBAL_BATCH, MILLION, TWENTY_FIVE_MILLION, Workload
from distroml.local_cluster import LocalCluster
from distroml.spec import Hyperparameters, JobSpec

ENDLESS_RESTARTS = 10_000
OWN_CHECKPOINT_EVERY = 200
PEER_CHECKPOINT_EVERY = 10
"""The peer goes back to its last checkpoint; ours only where no rank survives."""
AGENT_CPU_AIM = 2.0
RETURN_TIMEOUT_S = 60.0


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    kills: int
    peer_kills: int
    stops: int
    node_kills: int
    leader_kills: int
    throughput_runs: int
    epochs: dict[str, int]
    """By workload; the first epoch is not counted."""
    cpu_s: float
    """How long the agents' processor time is watched."""
    goodput_s: float


FULL = Scale(
    kills=50,
    peer_kills=5,
    stops=10,
    node_kills=10,
    leader_kills=10,
    throughput_runs=5,
    epochs={MILLION.name: 9, TWENTY_FIVE_MILLION.name: 4},
    cpu_s=30.0,
    goodput_s=120.0,
)
QUICK = Scale(
    kills=5,
    peer_kills=1,
    stops=1,
    node_kills=1,
    leader_kills=1,
    throughput_runs=1,
    epochs={MILLION.name: 4, TWENTY_FIVE_MILLION.name: 2},
    cpu_s=5.0,
    goodput_s=21.0,
)


def endless(checkpoint_every: int = OWN_CHECKPOINT_EVERY) -> JobSpec:
    """A million parameters under AdamW on four ranks, for as long as nobody cancels it."""
    spec = MILLION.spec(WORKERS, epochs=ENDLESS_EPOCHS, checkpoint_every=checkpoint_every)
    knobs = Hyperparameters(
        batch_size=spec.hyperparameters.batch_size,
        epochs=ENDLESS_EPOCHS,
        optimizer="adamw",
        weight_decay=0.01,
    )
    return replace(spec, hyperparameters=knobs, max_restarts=ENDLESS_RESTARTS)


async def kill(bench: Bench[Scale]) -> list[Row]:
    """SIGKILL of a random worker, beside torchrun's restart of all and torchft's survivors."""
    peer = []
    for number in range(bench.scale.peer_kills):
        bench.say(f"kill: torchrun, round {number + 1}")
        peer.append(await torchrun.time_to_recover(endless(PEER_CHECKPOINT_EVERY), bench.directory))
    survivors = await _torchft(bench)
    rng = random.Random(1)
    async with _job(bench) as job:
        found = []
        for number in range(bench.scale.kills):
            bench.say(f"kill: {number + 1} of {bench.scale.kills}")
            found.append(await job.recover_from(signalling(rng, signal.SIGKILL)))
    what = f"kill -9 of 1 of {WORKERS} workers"
    seen = [one.seen_s for one in found]
    stepped = [one.first_step_s for one in found]
    late = sum(seconds >= torchrun.RECOVERY_TIMEOUT_S for seconds in peer)
    note = (
        f"the peer's best of {len(peer)} is {min(peer):.2f} s, {min(peer) / median(seen):.1f} times our median; "
        f"{late} were not back within {torchrun.RECOVERY_TIMEOUT_S:g} s and count as that long"
    )
    if not survivors:
        note += f"; {torchft.HOW_TO_GET}"
    best = compare(
        f"{what} to the next step, as seen outside",
        "s",
        "lower",
        ours=seen,
        peer_name="torchrun, own store per attempt: its best",
        peer=[min(peer)],
        aim=Aim("ratio", ">=", 15),
        note=note,
    )
    return [
        replace(best, runs=len(found), values=Values(ours=seen, peer=peer)),
        *torchft.rows(what, GLOBAL_BATCH // WORKERS, found, survivors),
        *percentiles(
            f"{what} to the next step",
            stepped,
            p50=Aim("ours", "<=", 0.25),
            p99=Aim("ours", "<=", 0.5),
        ),
        *_phases(what, found),
        _lost(what, found),
    ]


async def _torchft(bench: Bench[Scale]) -> list[torchft.Recovery]:
    """What became of the same kills there; nothing where it is not installed."""
    if not torchft.installed():
        bench.say(f"kill: {torchft.HOW_TO_GET}")
        return []
    found = []
    for number in range(bench.scale.peer_kills):
        bench.say(f"kill: torchft, round {number + 1}")
        found.append(await torchft.time_to_recover(endless(), bench.directory))
    return found


async def stop(bench: Bench[Scale]) -> list[Row]:
    """SIGSTOP of a random worker: told from a slow one by its state, then replaced."""
    rng = random.Random(2)
    async with _job(bench) as job:
        found = await _repeat(
            bench, "stop", bench.scale.stops, job, signalling(rng, signal.SIGSTOP)
        )
    what = f"SIGSTOP of 1 of {WORKERS} workers"
    after = [(one.phases_ms["total"] - one.phases_ms["detect"]) / 1000 for one in found]
    return [
        alone(
            f"{what}: from its detection to the next step",
            after,
            aim=Aim("ours", "<=", 0.5),
            note=f"from the signal it takes {median([one.first_step_s for one in found]):.2f} s, most of which is "
            "the grace that a stopped process has",
        ),
        *_phases(what, found),
        _lost(what, found),
    ]


async def node(bench: Bench[Scale]) -> list[Row]:
    """Power failure of a node that does not lead and has ranks."""
    found = []
    async with _job(bench) as job:
        for number in range(bench.scale.node_kills):
            bench.say(f"node: {number + 1} of {bench.scale.node_kills}")
            leader = await job.cluster.leader(RETURN_TIMEOUT_S)
            found.append(await _lose_node(job, lambda names, led=leader: names - {led}))  # type: ignore[misc]
    what = "power failure of a node with ranks"
    stepped = [one.first_step_s for one in found]
    return [
        *percentiles(f"{what} to the next step", stepped),
        *_phases(what, found),
        _lost(what, found),
    ]


async def leader(bench: Bench[Scale]) -> list[Row]:
    """Power failure of the node that leads, and that has ranks too."""
    found = []
    async with _job(bench) as job:
        for number in range(bench.scale.leader_kills):
            bench.say(f"leader: {number + 1} of {bench.scale.leader_kills}")
            name = await job.cluster.leader(RETURN_TIMEOUT_S)
            if name not in _nodes_of(await job.view()):
                await job.client.transfer_leadership(min(_nodes_of(await job.view())))
                name = await job.cluster.leader(RETURN_TIMEOUT_S)
            found.append(await _lose_node(job, lambda names, led=name: names & {led}))  # type: ignore[misc]
    what = "power failure of the leader, which has ranks"
    stepped = [one.first_step_s for one in found]
    return [
        *percentiles(f"{what} to the next step", stepped, p50=Aim("ours", "<=", 1.2)),
        *_phases(what, found),
        _lost(what, found),
    ]


async def steps(bench: Bench[Scale]) -> list[Row]:
    """Steady steps per second where nothing fails, and what the agents take of the processor meanwhile."""
    rows: list[Row] = []
    scale = bench.scale
    async with cluster_at(bench.directory) as cluster:
        for workload in (MILLION, TWENTY_FIVE_MILLION):
            async with cluster.client() as client:
                rows += await throughput.beside_torchrun(
                    client,
                    workload,
                    WORKERS,
                    rounds=scale.throughput_runs,
                    epochs=scale.epochs[workload.name],
                    aims={"deterministic": 0.95, "fast": 0.99},
                    directory=bench.directory,
                    say=bench.say,
                )
            rows.append(await _agents(bench, cluster, workload))
    return rows


async def goodput(bench: Bench[Scale]) -> list[Row]:
    """Useful steps per second while a random rank is killed every few seconds."""
    duration_s = bench.scale.goodput_s
    bench.say(f"goodput: torchrun, {duration_s:g} s")
    peer = await under_fire.of_torchrun(
        endless(PEER_CHECKPOINT_EVERY), bench.directory, duration_s, random.Random(3)
    )
    bench.say(f"goodput: ours, {duration_s:g} s")
    async with _job(bench) as job:
        own = await under_fire.of_ours(job, duration_s, random.Random(3))
    return [
        compare(
            f"useful steps under a kill every {under_fire.KILL_EVERY_S:g} s",
            "1/s",
            "higher",
            ours=[own.rate],
            peer_name="torchrun, own store per attempt",
            peer=[peer.rate],
            note=f"{own.kills} kills beside {peer.kills}; the peer's steps count up to the last that it told of",
        )
    ]


# --- harm ------------------------------------------------------------------------------------------------------


def signalling(rng: random.Random, number: int) -> live_job.Disturb:
    """Harm that is a signal to the process of a random rank."""

    def disturb(view: dict[str, Any]) -> float:
        pid = rng.choice(view["workers"])["pid"]
        at = time.time()
        os.kill(pid, number)
        return at

    return disturb


async def _lose_node(job: LiveJob, choose: Callable[[set[str]], set[str]]) -> Recovery:
    """Power failure of one of the nodes with ranks; afterwards it is started again and warm."""
    lost: list[str] = []

    def disturb(view: dict[str, Any]) -> float:
        lost.append(min(choose(_nodes_of(view))))
        at = time.time()
        job.cluster.nodes[lost[0]].power_off()
        return at

    recovery = await job.recover_from(disturb)
    for name in lost:
        job.cluster.nodes[name].start()
        await job.cluster.wait_ready(name, timeout_s=RETURN_TIMEOUT_S)
        await live_job.until_warm(job.cluster, name)
    return recovery


def _nodes_of(view: dict[str, Any]) -> set[str]:
    return {worker["node"] for worker in view["workers"]}


async def _repeat(
    bench: Bench[Scale], name: str, times: int, job: LiveJob, disturb: live_job.Disturb
) -> list[Recovery]:
    found = []
    for number in range(times):
        bench.say(f"{name}: {number + 1} of {times}")
        found.append(await job.recover_from(disturb))
    return found


# --- what it runs on -------------------------------------------------------------------------------------------


@asynccontextmanager
async def _job(bench: Bench[Scale]) -> AsyncIterator[LiveJob]:
    async with cluster_at(bench.directory) as cluster, live_job.training(cluster, endless()) as job:
        yield job


async def _agents(bench: Bench[Scale], cluster: LocalCluster, workload: Workload) -> Row:
    """Processor time of each agent while a job trains and nobody asks anything."""
    bench.say(f"steps: agents beside {workload.name}, {bench.scale.cpu_s:g} s")
    spec = workload.spec(WORKERS, epochs=ENDLESS_EPOCHS)
    async with live_job.training(cluster, spec) as job:
        pids = [pid for one in cluster.nodes.values() if (pid := one.pid)]
        step, began = (await job.view())["step"], time.monotonic()
        before = [cpu_s(pid) for pid in pids]
        await asyncio.sleep(bench.scale.cpu_s)
        after, took_s = [cpu_s(pid) for pid in pids], time.monotonic() - began
        rate = ((await job.view())["step"] - step) / took_s
    shares = [100 * (b - a) / took_s for a, b in zip(before, after, strict=True)]
    return alone(
        f"an agent's processor time, {workload.name} parameters",
        shares,
        unit="% of a core",
        aim=Aim("ours", "<=", AGENT_CPU_AIM),
        note=f"{rate:.1f} steps/s; the busiest agent takes {max(shares):.1f} %",
    )


# --- rows ------------------------------------------------------------------------------------------------------


def _phases(what: str, found: Sequence[Recovery]) -> list[Row]:
    return [
        alone(f"{what}: {phase}", [one.phases_ms.get(phase, 0.0) for one in found], unit="ms")
        for phase in PHASES
    ]


def _lost(what: str, found: Sequence[Recovery]) -> Row:
    most = float(max(one.steps_lost for one in found))
    row = alone(f"{what}: most steps lost", [most], unit="1", aim=Aim("ours", "<=", 0))
    return replace(row, runs=len(found))


PARTS: dict[str, Part[Scale]] = {
    "kill": kill,
    "stop": stop,
    "node": node,
    "leader": leader,
    "throughput": steps,
    "goodput": goodput,
}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    return await run_parts(PARTS, only, QUICK if quick else FULL, directory, say)
