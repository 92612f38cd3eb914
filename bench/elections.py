"""Elections that nobody needed: a training job on all slots of three nodes, and the leader must stay the leader.

Three nodes on this machine run one job with as many workers as there are slots, with checkpoints, for ``--minutes``.
The nodes' terms before and after say how many elections there were; each one is spurious, since nothing fails. Rounds
of pre-votes are counted too: they disturb nobody, but each one is a silence that reached the election timeout. The
settings are the nodes' defaults, or those in DISTROML_ELECTION_TIMEOUT_MS and DISTROML_HEARTBEAT_MS.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import urllib.request
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from bench.parts import Bench, Part, Say, run_parts
from bench.processes import Broken
from bench.table import Aim, Row, compare
from bench.workloads import MILLION
from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster
from distroml.settings import NodeSettings

OPTIONS = frozenset({"minutes"})
NODES = 3
SLOTS = max(1, (os.cpu_count() or 1) // 2)
"""Of each node: with three nodes, one and a half busy workers per core."""
ENDLESS_EPOCHS = 1_000_000
CHECKPOINT_EVERY = 50
TRAINING_TIMEOUT_S = 180.0
SAMPLE_S = 0.5
PRE_VOTES = 'distroml_raft_loop_total{event="pre_vote_rounds"}'


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    minutes: float


FULL = Scale(minutes=10.0)
QUICK = Scale(minutes=0.1)


class _Sample(Struct, frozen=True):
    """What the cluster says at one moment."""

    leader: str | None
    term: int
    restarts: int
    step: int


async def training(bench: Bench[Scale]) -> list[Row]:
    """Leader changes, terms and rounds of pre-votes while a job trains on all slots."""
    workers = NODES * SLOTS
    spec = MILLION.spec(workers, epochs=ENDLESS_EPOCHS, checkpoint_every=CHECKPOINT_EVERY)
    async with (
        LocalCluster(bench.directory / "cluster", nodes=NODES, slots=SLOTS) as cluster,
        cluster.client() as client,
    ):
        job_id = (await client.submit(spec))["job_id"]
        await cluster.until(
            lambda: client.job(job_id),
            lambda job: job["step"] > 0,
            f"job {job_id} to train",
            timeout_s=TRAINING_TIMEOUT_S,
        )
        bench.say(f"{workers} workers train; watching for {bench.scale.minutes:g} minutes")
        before = await pre_vote_rounds(cluster)
        samples = await _watch(client, job_id, 60 * bench.scale.minutes)
        rounds = await pre_vote_rounds(cluster) - before
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if samples[-1].step <= samples[0].step:
        raise Broken(f"job {job_id} made no step while it was watched, so there was no load")
    return rows(
        samples, rounds, f"{_settings()}; {workers} workers; 1-minute load {load:.1f} per core"
    )


def _settings() -> str:
    chosen = NodeSettings()
    election_ms = os.environ.get("DISTROML_ELECTION_TIMEOUT_MS", chosen.election_timeout_ms)
    heartbeat_ms = os.environ.get("DISTROML_HEARTBEAT_MS", chosen.heartbeat_ms)
    return f"election timeout {election_ms} ms, heartbeat {heartbeat_ms} ms"


async def _watch(client: AsyncClient, job_id: str, seconds: float) -> list[_Sample]:
    """Samples from beginning to end, at least two."""
    until = time.monotonic() + seconds
    samples = [await _sample(client, job_id)]
    while len(samples) < 2 or time.monotonic() < until:
        await asyncio.sleep(SAMPLE_S)
        samples.append(await _sample(client, job_id))
    return samples


async def _sample(client: AsyncClient, job_id: str) -> _Sample:
    told, job = await client.leader(), await client.job(job_id)
    return _Sample(told["leader"], told["term"], job["restarts"], job["step"])


async def pre_vote_rounds(cluster: LocalCluster) -> int:
    """How often any node has asked for pre-votes since it started."""

    def read(url: str) -> int:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10.0) as answer:
            return counter(answer.read().decode(), PRE_VOTES)

    return sum([await asyncio.to_thread(read, node.url) for node in cluster.nodes.values()])


def counter(exposition: str, series: str) -> int:
    """The value of one series in the Prometheus text format.

    Raises:
        Broken: it is not there.
    """
    for line in exposition.splitlines():
        if line.startswith(f"{series} "):
            return int(float(line.rpartition(" ")[2]))
    raise Broken(f"a node's /metrics has no {series}")


def leader_changes(leaders: list[str | None]) -> int:
    """How often one leader followed another; nobody known in between is none."""
    known = [name for name in leaders if name is not None]
    return sum(one != other for one, other in itertools.pairwise(known))


def rows(samples: list[_Sample], pre_votes: int, note: str) -> list[Row]:
    """Changes over the samples, of which all but steps and pre-votes should be none."""
    first, last = samples[0], samples[-1]
    counts = (
        ("spurious leader changes", leader_changes([one.leader for one in samples]), True),
        ("spurious elections (terms)", max(one.term for one in samples) - first.term, True),
        ("restarts of the job", last.restarts - first.restarts, True),
        ("rounds of pre-votes", pre_votes, False),
        ("steps trained meanwhile", last.step - first.step, False),
    )
    return [
        compare(
            name,
            "1",
            "higher" if name.startswith("steps") else "lower",
            ours=[float(value)],
            peer_name="",
            peer=[],
            aim=Aim("ours", "<=", 0) if judged else None,
            note=note if name == counts[0][0] else "",
        )
        for name, value, judged in counts
    ]


PARTS: dict[str, Part[Scale]] = {"training": training}


async def run(
    quick: bool,
    directory: Path,
    say: Say,
    only: tuple[str, ...] = (),
    *,
    minutes: float | None = None,
) -> tuple[list[Row], list[str]]:
    """All parts, or those named: rows, and one line for each part that failed."""
    scale = QUICK if quick else FULL
    if minutes is not None:
        scale = replace(scale, minutes=minutes)
    return await run_parts(PARTS, only, scale, directory, say)
