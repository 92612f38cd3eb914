"""One life of one node: the product's RaftNode, Proposer, Replica and links, wired as `distroml.node` does.

Everything here only observes; what it observes goes to `invariants.Checker`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from distroml.commands import RegisterNode
from distroml.consensus.authentication import LinkSecurity
from distroml.consensus.frames import Address, Channel
from distroml.consensus.messages import decode
from distroml.consensus.peers import PeerLinks
from distroml.consensus.proposer import Proposer
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_core import RaftCore, Turn
from distroml.consensus.raft_types import (
    EntryTooLarge,
    NotLeader,
    Overloaded,
    Role,
    StorageCorrupt,
)
from distroml.consensus.replica import Replica
from distroml.credentials import ClusterKeys
from distroml.errors import DistroMLError
from tests.sim.disk import SimDisk
from tests.sim.loop import NodeLoop
from tests.sim.lossy import Lossy, LossyLinks
from tests.sim.streams import Streams

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sim.cluster import Cluster

CLUSTER_ID = "simulated"
WALL_S = 1.7e9
REGISTER_TIMEOUT_S = 5.0
REGISTER_PAUSE_S = 0.2
RESTART_S = 0.5
_TELLING, _PROMISE_NOTHING = (3, 4, 6), (5, 14)
"""Tags of messages, as the second byte of their encoding: RequestVote, VoteGranted and AppendReply; and Append, of
whose entries the leader's own disk is not yet asked, with TransferRequest, which leaves between turns."""
_KEY = bytes(range(32))


class _Reincarnates(Exception):
    """The cluster knows this incarnation; the process ends and comes back with a higher one."""


class Process:
    def __init__(self, cluster: Cluster, name: str, incarnation: int, directory: Path) -> None:
        world = cluster.world
        self.cluster, self.name, self.incarnation = cluster, name, incarnation
        self.started_at = world.now
        self.disk: SimDisk = cluster.disks[name]
        self.learns = name in cluster.learners
        self.loop = NodeLoop(world, name, cluster.rates.get(name, 1.0), cluster.config.poll_s)
        self.loop.execute = self._execute
        self.loop.on_killed = lambda: cluster.kill(name)
        self.life = cluster.lives
        self._disk_rng = world.stream("disk", self.life)
        self.links = _observed_links(self, cluster)
        self.replica = _CheckedReplica(self)
        self.raft = RaftNode(
            name=name,
            voters=tuple(cluster.voters),
            data_dir=directory,
            links=self.links,
            machine=self.replica,
            settings=cluster.settings,
            clock=self.loop.time,
            rng=world.stream("raft", self.life),
            disk=self.disk,
        )
        self.proposer = Proposer(
            name=name,
            incarnation=incarnation,
            raft=self.raft,
            links=self.links,
            refusal=(NotLeader, Overloaded, EntryTooLarge),
            clock=lambda: WALL_S + self.loop.time(),
        )
        self.links.subscribe(Channel.PROPOSE, self.proposer.on_forwarded)
        self.replica.listen(self.proposer.on_applied)
        self.raft.on_role(lambda _status: self._on_role())
        self.started = False
        self.registered = False
        self.alive = True
        self.disk_until = 0.0
        """When the last disk call ends."""
        self.seen: Any = None
        """What the checker saw last; its own notes."""

    # ------------------------------------------------------------------ facts

    @property
    def core(self) -> RaftCore:
        return self.raft.core

    @property
    def log(self) -> Any:
        return self.raft.core.raft.log

    @property
    def leads(self) -> bool:
        return self.started and self.core.role is Role.LEADER

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        self.loop.enter(self.spawn, self._main())

    def spawn(self, coroutine: Any) -> Any:
        """A task of this process; to be called inside its loop."""
        return self.loop.create_task(coroutine)

    def do(self, action: Any) -> None:
        """Calls `action()` inside the process, as its API would."""
        self.loop.enter(action)

    def compact(self) -> None:
        """Takes a snapshot in the next turn, whatever the settings say."""
        raft = self.core.raft

        def at_once() -> None:
            if raft.applied_index > raft.log.anchor_index:
                raft.compact()

        self.do(lambda: self.raft._post(at_once))

    def passes(self, call: str, *, after: bool) -> bool:
        """False where a failpoint lies here: the process has died, and nothing that it still does counts."""
        point = self.disk.failpoint
        if point is not None and self.alive and point.hit(call, after=after):
            self.disk.failpoint = None
            self.cluster.kill(self.name)
        return self.alive

    async def _main(self) -> None:
        try:
            await self.links.start()
            await self.raft.start()
        except StorageCorrupt as error:
            self.cluster.world.violate(f"{self.name} refuses its own directory: {error}")
            return
        except OSError as error:
            if self.alive:
                self.cluster.exits(self.name, f"{error}")
            return
        except Exception as error:
            self.cluster.world.violate(f"{self.name} cannot start: {type(error).__name__}: {error}")
            return
        if self.alive:
            self._observe()
            await self._register()

    def _observe(self) -> None:
        core, checker = self.core, self.cluster.checker
        finish_turn = core.finish_turn

        def observed() -> Turn:
            turn = finish_turn()
            if self.alive:
                checker.after_turn(self, turn)
            return turn

        core.finish_turn = observed  # type: ignore[method-assign]
        self.started = True
        checker.started(self)

    async def _register(self) -> None:
        command = RegisterNode(
            name=self.name, incarnation=self.incarnation, http=f"http://{self.name}", slots=4
        )
        fresh = False
        while not self.registered:
            try:
                fresh = fresh or await self._is_fresh()
                outcome = await self.proposer.propose(command, REGISTER_TIMEOUT_S)
            except (DistroMLError, NotLeader, Overloaded, TimeoutError):
                await asyncio.sleep(REGISTER_PAUSE_S)
                continue
            except _Reincarnates:
                return
            if outcome.error:
                self._reincarnate()
                return
            self.registered = self.proposer.registered = True

    async def _is_fresh(self) -> bool:
        """As `Node._is_fresh`: nobody has used this incarnation before, whatever was lost on disk."""
        await self.raft.read_index(REGISTER_TIMEOUT_S)
        if self._known_incarnation() >= self.incarnation:
            self._reincarnate()
            raise _Reincarnates
        return True

    def _known_incarnation(self) -> int:
        known = self.replica.state.proposers.get(self.name)
        return known.incarnation if known else 0

    def _reincarnate(self) -> None:
        at_least = max(self._known_incarnation(), self.incarnation) + 1
        self.cluster.exits(self.name, "reincarnates", at_least=at_least)

    def _on_role(self) -> None:
        if self.raft.failure and self.alive:
            self.cluster.world.violate(f"{self.name} stops for good: {self.raft.failure}")
        self.proposer.on_leader_change()

    def _execute(self, call: Any) -> tuple[float, Any, Exception | None]:
        duration_s = self.cluster.disk_s(self.name, self._disk_rng)
        now = self.cluster.world.now
        self.disk_until = now + duration_s
        result, error = self.disk.execute(call, now, duration_s, self._disk_rng)
        return duration_s, result, error


class _CheckedReplica(Replica):
    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self._checker = process.cluster.checker
        self.listen(self._heard)

    def _heard(self, entry: Any, outcome: Any, _events: Any) -> None:
        if self._process.alive:
            self._checker.heard(self._process, entry, outcome)

    def apply(self, index: int, data: bytes) -> None:
        if self._process.passes("apply", after=False):
            self._checker.before_apply(self._process, index, data)
        super().apply(index, data)
        self._process.passes("apply", after=True)

    def snapshot(self) -> bytes:
        self._process.passes("snapshot", after=False)
        return super().snapshot()

    def restore(self, index: int, blob: bytes) -> None:
        self._process.passes("restore", after=False)
        super().restore(index, blob)
        self._process.passes("restore", after=True)


def _observed_links(process: Process, cluster: Cluster) -> Any:
    """The process's links, whose outgoing promises are shown to the checker."""
    network = cluster.network
    links: PeerLinks | LossyLinks
    if isinstance(network, Lossy):
        links = LossyLinks(network, process.loop, process.name, CLUSTER_ID)
    else:
        links = _stream_links(process, cluster, network)
    send, checker, disk = links.send, cluster.checker, process.disk

    def observed(peer: str, channel: Channel, body: bytes) -> bool:
        if disk.failpoint is not None:
            process.passes("send", after=False)
        if not process.alive:
            return False
        if channel is Channel.RAFT:
            kind = body[1]
            if kind in _TELLING:
                checker.tells(process, peer, decode(body))
            if kind not in _PROMISE_NOTHING:
                checker.speaks(process)
        cluster.sent += 1
        if cluster.tap is not None and not cluster.tap(process.name, peer, channel, body):
            return True
        taken = send(peer, channel, body)
        if disk.failpoint is not None:
            process.passes("send", after=True)
        return taken

    links.send = observed  # type: ignore[method-assign]
    return links


def _stream_links(process: Process, cluster: Cluster, streams: Streams) -> PeerLinks:
    streams.attach(process.loop)
    here = Address(process.name, 1)
    return PeerLinks(
        name=process.name,
        incarnation=process.incarnation,
        cluster_id=CLUSTER_ID,
        listen=here,
        advertise=here if process.learns else None,
        peers={name: Address(name, 1) for name in cluster.voters},
        limits=cluster.limits,
        security=LinkSecurity(keys=ClusterKeys(_KEY)) if cluster.config.keyed else None,
        rng=cluster.world.stream("links", process.life),
    )
