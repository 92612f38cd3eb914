"""Checkpoints: how fast a state becomes durable, how long training stands still for it, how fast it comes back.

Everything is beside what the same disk and memory do without us (dd, one memcpy) and beside torch's own ways: Distributed
Checkpoint (DCP), torch.save, safetensors. Players take turns, each writes a new file, and the disk is idle before each turn.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench import commits
from bench.live_job import cluster_at
from bench.object_store import uploads
from bench.parts import Bench, Part, Say, run_parts
from bench.players import Player, playing
from bench.processes import Broken
from bench.table import RUST_PEER, Aim, Row, compare, median, percentiles
from distroml.model import Checkpoint
from distroml.reports import ShardFact
from distroml.runtime.checkpoint.commit import write_manifest
from distroml.runtime.checkpoint.stores.file import FileStore

MIB = 1024 * 1024
S3_BYTES = 256 * MIB
ORDER_TIMEOUT_S = 300.0
JOB, RUN = "bench", "run"
PEERS = {
    "dcp": "DCP save (fsync)",
    "dcp-async": "DCP async_save (fsync)",
    "torch": "torch.save of rank 0 + fsync",
}


class Scale(Struct, frozen=True, kw_only=True):
    """How much is measured."""

    state_bytes: int
    rounds: int
    ranks: tuple[int, ...]
    commits: int
    rate_s: float
    """How long commits and steps are counted, each time."""


FULL = Scale(state_bytes=1024 * MIB, rounds=5, ranks=(1, 4), commits=200, rate_s=20.0)
QUICK = Scale(state_bytes=256 * MIB, rounds=3, ranks=(1, 4), commits=20, rate_s=5.0)
COMMIT_EVERY = 25
"""Steps between the checkpoints whose latency is measured: they follow one another without overlap."""
RUST_RATE = 22.5


class Ranks:
    """The ranks of one job, and the directory that they save into."""

    def __init__(self, players: Sequence[Player], directory: Path) -> None:
        self.players, self.directory = players, directory
        self._serial = 0
        self.size_bytes = 0

    async def save(self, kind: str) -> tuple[float, float, Checkpoint | None]:
        """One checkpoint of all ranks: seconds of the longest stall, seconds until whole, our record of it."""
        self._serial += 1
        self._settle()
        began = time.perf_counter()
        told = await asyncio.gather(
            *(
                player.ask("save", ORDER_TIMEOUT_S, kind=kind, directory=str(self.directory), step=self._serial)
                for player in self.players
            )
        )  # fmt: skip
        checkpoint = self.commit([one["shard"] for one in told]) if told[0]["shard"] else None
        whole_s = time.perf_counter() - began
        return max(one["stall_s"] for one in told), whole_s, checkpoint

    def commit(self, shards: Sequence[Any]) -> Checkpoint:
        """What the leader does once all shards are durable, but for the log."""
        return write_manifest(
            FileStore(self.directory),
            job_id=JOB,
            run_id=RUN,
            generation=1,
            shards=[msgspec.convert(shard, type=ShardFact) for shard in shards],
            committed_at=0.0,
        )

    def _settle(self) -> None:
        """Remove what the last turn wrote, and have the disk idle."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        os.sync()


@asynccontextmanager
async def ranks(bench: Bench[Scale], count: int, threads: int = 1) -> AsyncIterator[Ranks]:
    """So many ranks, each with the whole state in memory."""
    place = bench.directory / f"ranks-{count}-{time.monotonic_ns()}"
    place.mkdir()
    async with AsyncExitStack() as stack:
        players = []
        for rank in range(count):
            arguments = [rank, count, place / "meet", bench.scale.state_bytes, threads]
            players.append(
                await stack.enter_async_context(
                    playing("checkpoint_process", list(map(str, arguments)), place / f"{rank}.log")
                )
            )
        made = Ranks(players, place / "store")
        sizes = await asyncio.gather(*(p.ask("size", ORDER_TIMEOUT_S) for p in players))
        made.size_bytes = sizes[0]
        yield made
    shutil.rmtree(place, ignore_errors=True)


async def save(bench: Bench[Scale]) -> list[Row]:
    """Bytes per second until the whole state is durable, with 1 and more ranks."""
    rows = []
    for count in bench.scale.ranks:
        async with ranks(bench, count) as job:
            rates: dict[str, list[float]] = {kind: [] for kind in ("dd", "ours", *PEERS)}
            for number in range(-1, bench.scale.rounds):
                bench.say(f"save: {count} ranks, round {number + 1}")
                for kind in _turns(list(rates), number):
                    seconds = (
                        await _dd(bench.directory, job.size_bytes)
                        if kind == "dd"
                        else (await job.save(kind))[1]
                    )
                    if number >= 0:  # the first round is for buffers and disk to be used once
                        rates[kind].append(job.size_bytes / seconds / 1e9)
        what = f"save, {_size(job.size_bytes)}, {count} rank{'s' * (count > 1)}"
        rows.append(_rate(what, rates, "dd", "dd conv=fdatasync", Aim("ratio", ">=", 0.9)))
        rows += [_rate(what, rates, kind, name) for kind, name in PEERS.items()]
    return rows


async def stall(bench: Bench[Scale]) -> list[Row]:
    """How long a step loop stands still for a checkpoint."""
    async with ranks(bench, 1) as job:
        (player,) = job.players
        found: dict[str, list[float]] = {kind: [] for kind in ("memcpy", "ours", "dcp-async")}
        for number in range(-1, bench.scale.rounds):
            bench.say(f"stall: round {number + 1}")
            for kind in _turns(list(found), number):
                if kind == "memcpy":
                    seconds = await player.ask("memcpy", ORDER_TIMEOUT_S)
                else:
                    seconds = (await job.save(kind))[0]
                if number >= 0:
                    found[kind].append(seconds * 1024 * MIB / job.size_bytes)
    what = "stall of the step loop per GiB"
    return [
        compare(what, "s", "lower", ours=found["ours"], peer_name=name, peer=found[kind], aim=aim)
        for kind, name, aim in (
            ("memcpy", "one memcpy", Aim("ratio", ">=", 1 / 1.2)),
            ("dcp-async", "DCP async_save", None),
        )
    ]


async def training(bench: Bench[Scale]) -> list[Row]:
    """What a checkpoint costs a training process that uses all cores meanwhile."""
    async with ranks(bench, 1, threads=os.cpu_count() or 1) as job:
        (player,) = job.players
        found: dict[str, list[dict[str, float]]] = {"ours": [], "dcp-async": []}
        place = bench.directory / "training"
        for number in range(-1, bench.scale.rounds):
            bench.say(f"training: round {number + 1}")
            for kind in _turns(list(found), number):
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                os.sync()
                told = await player.ask("train", ORDER_TIMEOUT_S, kind=kind, directory=str(place), step=number + 2)  # fmt: skip
                if number >= 0:
                    found[kind].append(told)
    peer = "DCP async_save"

    def of(kind: str, name: str) -> list[float]:
        return [one[name] for one in found[kind]]

    slower = {
        kind: [one["during_s"] / one["rest_s"] for one in told] for kind, told in found.items()
    }
    note = f"the write took {median(of('ours', 'wall_s')):.2f} s beside {median(of('dcp-async', 'wall_s')):.2f} s"
    size = _size(job.size_bytes)
    return [
        compare("step time while a checkpoint is written / at rest", "", "lower", ours=slower["ours"], peer_name=peer, peer=slower["dcp-async"], note=note),
        compare(f"training time lost to one checkpoint of {size}", "s", "lower", ours=of("ours", "lost_s"), peer_name=peer, peer=of("dcp-async", "lost_s")),
    ]  # fmt: skip


async def restore(bench: Bench[Scale]) -> list[Row]:
    """Bytes per second from files to a state that can be trained; from the page cache and from the disk."""
    async with ranks(bench, 1) as job:
        (player,) = job.players
        kinds = ("ours", "safetensors", "dcp")
        found: dict[str, dict[str, list[float]]] = {
            where: {kind: [] for kind in kinds} for where in ("memory", "disk")
        }
        _, _, checkpoint = await job.save("ours")
        assert checkpoint is not None
        store = job.directory
        plain, torchs = bench.directory / "plain", bench.directory / "torchs"
        await player.ask("keep", ORDER_TIMEOUT_S, directory=str(plain))
        torchs.mkdir()
        await player.ask("save", ORDER_TIMEOUT_S, kind="dcp", directory=str(torchs), step=1)
        places = {"ours": store, "safetensors": plain, "dcp": torchs / "dcp-1"}
        for number in range(-1, bench.scale.rounds):
            bench.say(f"restore: round {number + 1}")
            for where, rates in found.items():
                for kind in _turns(kinds, number):
                    await player.ask("spoil", ORDER_TIMEOUT_S)
                    if where == "disk":
                        _forget(places[kind])
                    record = msgspec.to_builtins(checkpoint) if kind == "ours" else None
                    seconds = await player.ask("restore", ORDER_TIMEOUT_S, kind=kind, directory=str(places[kind]), checkpoint=record)  # fmt: skip
                    if number >= 0:
                        rates[kind].append(job.size_bytes / seconds / 1e9)
    unverified = Aim("ratio", ">=", 0.8)
    rows = []
    for where, rates in found.items():
        what = f"restore and verify {_size(job.size_bytes)} from {where}"
        name = "safetensors load_file, unverified"
        rows.append(_rate(what, rates, "safetensors", name, unverified))
        rows.append(_rate(what, rates, "dcp", "DCP load, unverified"))
    return rows


async def compression(bench: Bench[Scale]) -> list[Row]:
    """Zstandard beside nothing, on random weights: the least that it can save, and what it costs."""
    async with ranks(bench, 1) as job:
        found: dict[str, list[float]] = {"ours-zstd": [], "ours": []}
        sizes: dict[str, int] = {}
        for number in range(-1, min(3, bench.scale.rounds)):
            bench.say(f"compression: round {number + 1}")
            for kind in _turns(list(found), number):
                _, seconds, checkpoint = await job.save(kind)
                assert checkpoint is not None
                sizes[kind] = checkpoint.size_bytes
                if number >= 0:
                    found[kind].append(seconds)
    share = sizes["ours-zstd"] / sizes["ours"]
    note = f"compressed, uniformly random weights take {100 * share:.1f} % of their size"
    return [
        compare("save with compression: zstd", "s", "lower", ours=found["ours-zstd"], peer_name="ours without", peer=found["ours"], note=note)
    ]  # fmt: skip


async def s3(bench: Bench[Scale]) -> list[Row]:
    """Bytes per second of a shard to an S3 server, beside the bare library."""
    size = min(bench.scale.state_bytes, S3_BYTES)
    async with uploads(bench.directory, size) as players:
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        for number in range(-1, bench.scale.rounds):
            bench.say(f"s3: round {number + 1}")
            for kind in _turns(list(rates), number):
                if kind == "ours":
                    seconds = await asyncio.to_thread(players.ours, number + 2)
                else:
                    seconds = await players.bare(number + 2)
                if number >= 0:
                    rates[kind].append(players.size_bytes / seconds / 1e9)
        what = f"a shard of {_size(players.size_bytes)} to S3 (moto, which both wait for)"
    return [
        _rate(what, rates, "bare", "aiobotocore multipart, unverified", Aim("ratio", ">=", 0.9))
    ]


async def commit(bench: Bench[Scale]) -> list[Row]:
    """From the last durable shard until every node knows the commit, in a job of four ranks on three nodes."""
    rows = []
    shared = bench.directory / "shared"
    shared.mkdir()
    async with cluster_at(bench.directory) as cluster:
        for store in ("local", f"file://{shared}"):
            kind = store.partition(":")[0]
            bench.say(f"commit: {bench.scale.commits} to {kind}")
            spec = commits.small(COMMIT_EVERY, store)
            found = await commits.latencies_s(cluster, spec, bench.scale.commits)
            what = f"last shard durable ({kind}) to committed on all nodes"
            rows += percentiles(what, [1000 * one for one in found], unit="ms")
    return rows


async def rate(bench: Bench[Scale]) -> list[Row]:
    """Commits per second of a job of four ranks that saves a small state after each step, and what that costs."""
    committed, stepped, plain = [], [], []
    async with cluster_at(bench.directory) as cluster:
        for number in range(bench.scale.rounds):
            bench.say(f"rate: round {number + 1}")
            per_s, steps_per_s = await commits.rates(cluster, commits.small(1), bench.scale.rate_s)
            committed.append(per_s)
            stepped.append(steps_per_s)
            plain.append((await commits.rates(cluster, commits.small(None), bench.scale.rate_s))[1])
    rounds = bench.scale.rounds
    return [
        compare("commits of a small state", "1/s", "higher", ours=committed, peer_name=RUST_PEER, peer=[RUST_RATE] * rounds),
        compare("steps, each saved", "1/s", "higher", ours=stepped, peer_name="ours without checkpoints", peer=plain),
    ]  # fmt: skip


PARTS: dict[str, Part[Scale]] = {
    "save": save,
    "stall": stall,
    "training": training,
    "restore": restore,
    "compression": compression,
    "s3": s3,
    "commit": commit,
    "rate": rate,
}


async def run(
    quick: bool, directory: Path, say: Say, only: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """All parts, or those named; rows and what failed."""
    return await run_parts(PARTS, only, QUICK if quick else FULL, directory, say)


def _turns(kinds: Sequence[str], number: int) -> list[str]:
    """Who goes first changes from round to round."""
    turn = number % len(kinds)
    return [*kinds[turn:], *kinds[:turn]]


def _rate(
    what: str, rates: dict[str, list[float]], peer: str, name: str, aim: Aim | None = None
) -> Row:
    return compare(
        what, "GB/s", "higher", ours=rates["ours"], peer_name=name, peer=rates[peer], aim=aim
    )


def _forget(directory: Path) -> None:
    """Have the page cache hold nothing of the files in ``directory``."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1024 / MIB:.2g} GiB"


async def _dd(directory: Path, size_bytes: int) -> float:
    """Seconds of dd for so many bytes, to the disk."""
    file = directory / "dd"
    file.unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        "dd",
        "if=/dev/zero",
        f"of={file}",
        "bs=16M",
        f"count={size_bytes}",
        "iflag=count_bytes",
        "conv=fdatasync",
        stderr=asyncio.subprocess.DEVNULL,
    )
    if await process.wait():
        raise Broken("dd failed")
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds
