"""A simulated cluster: its processes and disks, and the handles by which faults and tests move it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from distroml.consensus.frames import Channel, LinkLimits
from distroml.consensus.raft_types import RaftSettings
from distroml.consensus.state import digest_state
from tests.sim.disk import SimDisk
from tests.sim.invariants import Checker
from tests.sim.lossy import Lossy
from tests.sim.process import RESTART_S, Process
from tests.sim.streams import Cuts, Streams
from tests.sim.world import World


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What one run is, besides its seed and its faults."""

    nodes: int = 3
    """Voters."""
    learners: int = 0
    lossy: bool = False
    """Frames may be dropped, repeated and reordered; otherwise the product's links over streams."""
    drop: float = 0.02
    repeat: float = 0.05
    late: float = 0.05
    compaction_entries: int = 40
    trailing_entries: int = 10
    snapshot_chunk_bytes: int = 4096
    append_batch_bytes: int = 4096
    inflight_entries: int = 64
    disk_s: float = 0.0005
    poll_s: float = 0.0
    """What arrives at a process within this time is handled in one go, as by a busy event loop."""
    keyed: bool = False
    """Links prove a cluster key and tag every frame."""
    rate: float = 5.0
    """Client operations per second in all, on the average."""

    def raft_settings(self) -> RaftSettings:
        return RaftSettings(
            compaction_entries=self.compaction_entries,
            trailing_entries=self.trailing_entries,
            snapshot_chunk_bytes=self.snapshot_chunk_bytes,
            snapshot_window_chunks=4,
            append_batch_bytes=self.append_batch_bytes,
            inflight_entries=self.inflight_entries,
        )


class Cluster:
    def __init__(
        self,
        seed: int,
        config: Config | None = None,
        *,
        settings: RaftSettings | None = None,
        start: bool = True,
    ) -> None:
        self.config = config or Config()
        self.world = World(seed)
        self.settings = settings or self.config.raft_settings()
        self.limits = LinkLimits()
        self.voters = [f"n{place}" for place in range(self.config.nodes)]
        self.learners = [f"x{place}" for place in range(self.config.learners)]
        self.names = [*self.voters, *self.learners]
        self.cuts = Cuts()
        self.network: Streams | Lossy
        if self.config.lossy:
            config = self.config
            self.network = Lossy(
                self.world,
                self.cuts,
                self.voters,
                drop=config.drop,
                repeat=config.repeat,
                late=config.late,
            )
        else:
            self.network = Streams(self.world, self.cuts)
        self.disks = {name: SimDisk() for name in self.names}
        self.slow_disk_s: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.checker = Checker(self)
        self.processes: dict[str, Process] = {}
        self.incarnations = dict.fromkeys(self.names, 0)
        self.lives = 0
        self.sent = 0
        self.counts = {"kills": 0, "power losses": 0, "exits": 0, "boots": 0}
        self.tap: Callable[[str, str, Channel, bytes], bool] | None = None
        """Sees each frame that is about to leave; False drops it."""
        self.on_death: Callable[[Process], None] = lambda _process: None
        if start:
            for name in self.names:
                self.boot(name)

    # ------------------------------------------------------------------ processes

    def boot(self, name: str, at_least: int = 1) -> Process:
        assert name not in self.processes, f"{name} runs already"
        self.counts["boots"] += 1
        self.lives += 1
        self.incarnations[name] = max(self.incarnations[name] + 1, at_least)
        process = Process(self, name, self.incarnations[name], Path("/data"))
        self.processes[name] = process
        self.world.note(3, self.lives)
        process.start()
        return process

    def kill(self, name: str, *, power: bool = False, rng: random.Random | None = None) -> None:
        """The process dies at this instant; with `power` its host does too."""
        process = self.processes.pop(name)
        rng = rng or self.world.stream("kill", self.lives, self.world.now)
        process.alive = False
        process.loop.dead = True
        self.counts["kills"] += 1
        self.world.note(4, process.life, int(power))
        self.disks[name].kill(self.world.now, rng)
        if power:
            self.counts["power losses"] += 1
            self.disks[name].lose_power(rng)
        self.network.kill(name)
        self.checker.died(process)
        self.on_death(process)

    def exits(self, name: str, _why: str, *, at_least: int = 1) -> None:
        """The process ends by itself, as soon as it returns to its loop; its supervisor restarts it."""
        process = self.processes[name]
        self.counts["exits"] += 1

        def end() -> None:
            if process.alive:
                self.kill(name)
                self.world.later(RESTART_S, self.revive, name, at_least)

        self.world.later(0.0, end)

    def revive(self, name: str, at_least: int = 1) -> None:
        if name not in self.processes:
            self.boot(name, at_least)

    def wipe(self, name: str) -> None:
        """The data directory of a dead node is lost."""
        assert name not in self.processes
        self.disks[name].wipe()
        self.incarnations[name] = 0
        self.checker.wiped(name)

    def disk_s(self, name: str, rng: random.Random) -> float:
        slow_s = self.slow_disk_s.get(name)
        base_s = self.config.disk_s if slow_s is None else slow_s
        return rng.uniform(0.5, 2.0) * base_s

    # ------------------------------------------------------------------ the network

    def isolate(self, *names: str, inward: bool = True, outward: bool = True) -> None:
        for one, other in itertools.product(names, [n for n in self.names if n not in names]):
            if outward:
                self.cuts.cut(one, other)
            if inward:
                self.cuts.cut(other, one)

    def heal(self) -> None:
        """Ends every fault that is under way; what is dead comes back."""
        self.cuts.mend_all()
        self.slow_disk_s.clear()
        for name in self.names:
            self.disks[name].fail.clear()
            self.disks[name].failpoint = None
            self.rates.pop(name, None)
            process = self.processes.get(name)
            if process is None:
                self.boot(name)
            else:
                process.loop.set_rate(1.0)
                process.loop.resume()

    # ------------------------------------------------------------------ facts

    def leader(self) -> Process | None:
        leaders = [process for process in self.processes.values() if process.leads]
        return max(leaders, key=lambda process: process.raft.term, default=None)

    def settled(self) -> bool:
        """A leader exists, all nodes follow it, and everything it has is applied on every node."""
        leader = self.leader()
        if leader is None or len(self.processes) < len(self.names):
            return False
        last = leader.log.last_index
        return all(
            process.registered
            and process.core.leader == leader.name
            and process.raft.applied_index == last
            and not process.loop.paused
            for process in self.processes.values()
        )

    def elect(self, limit_s: float = 5.0) -> Process:
        """Runs until a node leads and has committed an entry of its own term."""

        def elected() -> bool:
            leader = self.leader()
            if leader is None:
                return False
            raft = leader.core.raft
            return bool(raft.commit_index >= (raft.noop_index or raft.commit_index + 1))

        assert self.world.run_until(elected, limit_s), f"no leader within {limit_s} s"
        leader = self.leader()
        assert leader is not None
        return leader

    def followers(self) -> list[Process]:
        """All voters that are up and do not lead."""
        return [
            self.processes[name]
            for name in self.voters
            if name in self.processes and not self.processes[name].leads
        ]

    def digests(self) -> dict[str, str]:
        return {name: digest_state(p.replica.state) for name, p in self.processes.items()}

    def describe(self) -> dict[str, Any]:
        """Where each node stands, for the message of a failure."""
        found: dict[str, Any] = {}
        for name in self.names:
            process = self.processes.get(name)
            if process is None or not process.started:
                found[name] = "down" if process is None else "starting"
                continue
            raft = process.core.raft
            found[name] = (
                f"{process.core.role} term {raft.term} leader {process.core.leader} "
                f"applied {raft.applied_index} committed {raft.commit_index} "
                f"log {raft.log.anchor_index}..{raft.log.last_index} proven {raft.log.proven} "
                f"registered {process.registered} trouble {process.raft.status().reason!r}"
            )
        return found
