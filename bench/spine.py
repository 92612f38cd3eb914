"""The spine: what starting, submitting, stepping and writing cost, each beside its peer.

Parts are independent of each other; each has its own cluster, interleaves our runs with the peer's, and cleans up.
Which model and how often is in ``Scale``, so ``--quick`` differs from the full run in numbers only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct

from bench import ours, starts, throughput, torchrun, writes
from bench.parts import Bench, Part, Say, run_parts
from bench.table import Aim, Row, compare
from bench.workloads import MILLION, SMALL
from distroml.local_cluster import LocalCluster
from distroml.spec import JobSpec

SLOTS = 4
WARM_TIMEOUT_S = 60.0
ENDLESS_EPOCHS = 1_000_000


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    start_runs: int
    worker_counts: tuple[int, ...]
    first_step_runs: int
    throughput_runs: int
    epochs: dict[str, int]
    """By workload; the first epoch is not counted."""
    write_rounds: int
    writes: int


FULL = Scale(
    start_runs=10,
    worker_counts=(2, 4),
    first_step_runs=5,
    throughput_runs=5,
    epochs={SMALL.name: 9, MILLION.name: 7},
    write_rounds=5,
    writes=200,
)
QUICK = Scale(
    start_runs=3,
    worker_counts=(2,),
    first_step_runs=3,
    throughput_runs=3,
    epochs={SMALL.name: 4, MILLION.name: 4},
    write_rounds=3,
    writes=64,
)


async def start(bench: Bench[Scale]) -> list[Row]:
    """Import, version and node start."""
    runs = bench.scale.start_runs
    bench.say(f"start: {runs} runs of import, --version and node start")
    return [*starts.commands(runs), *starts.node(runs, bench.directory)]


async def submit(bench: Bench[Scale]) -> list[Row]:
    """Submit to first completed step on a warm node, and from nothing, beside launching torchrun."""
    rows = []
    async with _one_node(bench) as cluster, cluster.client() as client:
        for workers in bench.scale.worker_counts:
            spec = MILLION.spec(workers, epochs=ENDLESS_EPOCHS)
            cold: list[float] = []
            warm: list[float] = []
            peer: list[float] = []
            for number in range(bench.scale.first_step_runs):
                bench.say(f"submit: {workers} workers, round {number + 1}")
                place = bench.directory / f"cold-{workers}-{number}"
                warm.append(await ours.time_to_first_step(cluster, client, spec))
                peer.append(await torchrun.time_to_first_step(spec, bench.directory))
                cold.append(await _time_from_nothing(place, spec))
            rows += [
                compare(
                    f"{began} to first step, {workers} workers",
                    "s",
                    "lower",
                    ours=values,
                    peer_name="torchrun --standalone",
                    peer=peer,
                    aim=aim,
                )
                for began, values, aim in (
                    ("submit", warm, Aim("ratio", ">=", 3)),
                    ("node start", cold, Aim("ratio", ">=", 1)),
                )
            ]
    return rows


async def _time_from_nothing(directory: Path, spec: JobSpec) -> float:
    """Seconds from the launch of a node until a job submitted at once has completed its first step."""
    began = time.monotonic()
    async with LocalCluster(directory, nodes=1, slots=SLOTS) as cluster, cluster.client() as client:
        ready_s = time.monotonic() - began
        return ready_s + await ours.time_to_first_step(cluster, client, spec)


async def steps(bench: Bench[Scale]) -> list[Row]:
    """Steady steps per second, beside plain DDP under torchrun."""
    rows = []
    async with _one_node(bench) as cluster, cluster.client() as client:
        for workload in (SMALL, MILLION):
            for workers in bench.scale.worker_counts:
                scale = bench.scale
                rows += await throughput.beside_torchrun(
                    client,
                    workload,
                    workers,
                    rounds=scale.throughput_runs,
                    epochs=scale.epochs[workload.name],
                    aims={"deterministic": 0.95, "fast": 0.95},
                    directory=bench.directory,
                    say=bench.say,
                )
    return rows


async def write(bench: Bench[Scale]) -> list[Row]:
    """Latency and rate of acknowledged submits on three nodes, beside fdatasync."""
    bench.say(f"write: {bench.scale.write_rounds} rounds of {bench.scale.writes} submits")
    return await writes.measure(bench.scale.write_rounds, bench.scale.writes, bench.directory)


@asynccontextmanager
async def _one_node(bench: Bench[Scale]) -> AsyncIterator[LocalCluster]:
    """A cluster of one node whose forkserver is warm."""
    async with LocalCluster(bench.directory / "one-node", nodes=1, slots=SLOTS) as cluster:
        async with cluster.client() as client:
            await cluster.until(
                client.health,
                lambda answer: bool(answer["details"]["warm"]),
                "the forkserver to be warm",
                timeout_s=WARM_TIMEOUT_S,
            )
        yield cluster


PARTS: dict[str, Part[Scale]] = {
    "start": start,
    "submit": submit,
    "steps": steps,
    "write": write,
}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    return await run_parts(PARTS, only, QUICK if quick else FULL, directory, say)
