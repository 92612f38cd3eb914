"""Nodes that keep copies for each other over links in memory, which tests cut, slow down and tamper with."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from distroml.consensus.frames import Channel
from distroml.consensus.state import ClusterState
from distroml.model import Checkpoint, Job, JobStatus, Node, NodeStatus
from distroml.runtime.checkpoint.reader import read_manifest
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.interface import exists
from distroml.runtime.replicas import wire
from distroml.runtime.replicas.bringing import manifest_file, shard_files
from distroml.runtime.replicas.copies import Copies
from distroml.runtime.replicas.wire import File, Message
from distroml.spec import Checkpointing, JobSpec
from tests.runtime.checkpoint.shards import JOB, RUN, committed

Tamper = Callable[[str, str, Message], Message | None]
"""What becomes of a message from one node to another; None: it is lost."""


class FakeLinks:
    """One node's links."""

    def __init__(self, name: str, network: Network) -> None:
        self.name, self._network = name, network
        self.handler: Callable[[str, bytes], None] | None = None
        self.on_change: Callable[[str, bool], None] = lambda peer, up: None

    def subscribe(self, channel: Channel, handler: Callable[[str, bytes], None]) -> None:
        assert channel is Channel.COPIES
        self.handler = handler

    def on_link(self, handler: Callable[[str, bool], None]) -> None:
        self.on_change = handler

    def connected_peers(self) -> list[str]:
        return [
            peer for peer in sorted(self._network.links) if self._network.linked(self.name, peer)
        ]

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        if not self._network.linked(self.name, peer):
            return False
        message = self._network.tamper(self.name, peer, wire.decode(body))
        if message is not None:
            asyncio.get_running_loop().call_soon(self._arrive, peer, wire.encode(message))
        return True

    def _arrive(self, peer: str, body: bytes) -> None:
        there = self._network.links.get(peer)
        if (
            there is not None
            and there.handler is not None
            and self._network.linked(self.name, peer)
        ):
            there.handler(self.name, body)


class Network:
    """Who reaches whom."""

    def __init__(self, voters: frozenset[str]) -> None:
        self.links: dict[str, FakeLinks] = {}
        self.down: set[str] = set()
        self.tamper: Tamper = lambda sender, target, message: message
        self._voters = voters

    def linked(self, one: str, other: str) -> bool:
        there = {one, other} <= self.links.keys() and one != other
        return there and not {one, other} & self.down and bool({one, other} & self._voters)

    def cut(self, name: str) -> None:
        """All of its links break."""
        for peer, links in self.links.items():
            if self.linked(name, peer):
                self.links[name].on_change(peer, False)
                links.on_change(name, False)
        self.down.add(name)


class World:
    """``async with World(directory, "abc")``: nodes a, b and c; ``learners`` are further ones."""

    def __init__(
        self, root: Path, voters: str = "abc", learners: str = "", replicas: int | None = None
    ) -> None:
        self.root, self.voters = root, frozenset(voters)
        self.network = Network(self.voters)
        self.leader = voters[0]
        names = [*voters, *learners]
        job = Job(
            job_id=JOB, run_id=RUN, spec=JobSpec(checkpointing=Checkpointing(replicas=replicas)),
            status=JobStatus.RUNNING, reason="", created_at=0.0, changed_at=0.0, submit_index=1,
            change_index=1,
        )  # fmt: skip
        nodes = {name: Node(name=name, incarnation=1, http="", slots=1) for name in names}
        self.state = ClusterState(jobs={JOB: job}, nodes=nodes)
        self.unaware: set[str] = set()
        """Nodes that have just begun and not applied their log again."""
        self.records_shared = asyncio.Event()
        """Whether what nodes recorded of jobs is on others."""
        self.records_shared.set()
        self.nodes: dict[str, Copies] = {}
        self.landed: list[tuple[str, str]] = []

    async def __aenter__(self) -> World:
        for name in self.state.nodes:
            self.start(name)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self.nodes):
            await self.stop(name)

    def start(self, name: str) -> Copies:
        """Its process begins; rounds of upkeep are the test's to make."""
        links = self.network.links[name] = FakeLinks(name, self.network)
        self.network.down.discard(name)
        copies = self.nodes[name] = Copies(
            node=name,
            voters=self.voters,
            directory=self.root / name,
            links=links,
            state=lambda: ClusterState() if name in self.unaware else self.state,
            current=lambda: name not in self.unaware,
            leads=lambda: name == self.leader,
            shared=self._shared,
            landed=lambda path: self.landed.append((name, path)),
        )
        copies.upkeep.start = lambda: None  # type: ignore[method-assign]
        copies.start()
        return copies

    async def stop(self, name: str) -> None:
        """Its process ends; its disk stays."""
        self.network.cut(name)
        copies = self.nodes.pop(name)
        del self.network.links[name]
        await copies.stop()

    async def lose(self, name: str) -> None:
        """Its host is gone, with its disk, and the cluster knows."""
        await self.stop(name)
        shutil.rmtree(self.root / name, ignore_errors=True)
        self.set_status(name, NodeStatus.LOST)

    async def _shared(self, job_id: str) -> None:
        await self.records_shared.wait()

    def catch_up(self, name: str) -> None:
        """It has applied its log again."""
        self.unaware.discard(name)
        self.nodes[name].for_workers.on_applied()

    def set_status(self, name: str, status: NodeStatus, at: float = 0.0) -> None:
        node = msgspec.structs.replace(self.state.nodes[name], status=status, changed_at=at)
        nodes = {**self.state.nodes, name: node}
        self.state = msgspec.structs.replace(self.state, nodes=nodes)

    def forget(self, name: str) -> None:
        """The log knows it no more."""
        nodes = {one: node for one, node in self.state.nodes.items() if one != name}
        self.state = msgspec.structs.replace(self.state, nodes=nodes)

    def commit(self, *checkpoints: Checkpoint) -> None:
        job = msgspec.structs.replace(self.state.jobs[JOB], checkpoints=checkpoints)
        self.state = msgspec.structs.replace(self.state, jobs={JOB: job})

    def store(self, name: str) -> FileStore:
        return FileStore(self.root / name)

    def holders(self, file: File) -> str:
        """Nodes whose disks have the file, every byte as it should be."""
        return "".join(
            name
            for name, copies in sorted(self.nodes.items())
            if exists(copies.own.store, file.path) and not copies.own.damage(file)
        )


def saved_at(world: World, name: str, **options: object) -> tuple[Checkpoint, list[File]]:
    """A whole checkpoint on the disk of one node only, and its files, the manifest first."""
    store = world.store(name)
    checkpoint = committed(store, **options)  # type: ignore[arg-type]
    files = shard_files(checkpoint, read_manifest(store, checkpoint))
    return checkpoint, [manifest_file(checkpoint), *files]


def flip(path: Path, at: int) -> None:
    """One bit of a file is another one."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@asynccontextmanager
async def within(seconds: float = 20.0) -> AsyncIterator[None]:
    """The test fails if this takes longer."""
    async with asyncio.timeout(seconds):
        yield


async def until(holds: Callable[[], bool]) -> None:
    """For use ``within`` a time."""
    for _ in range(100_000):
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never held")
