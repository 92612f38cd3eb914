"""Whole nodes in this process: real sockets on loopback, real files, the real clock."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from distroml.consensus.disk import Disk
from distroml.consensus.peers import Address, PeerLinks
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import RaftSettings

PATIENT = RaftSettings(election_min_s=1.0, election_max_s=2.0, heartbeat_s=0.1, check_quorum_s=2.0)
"""For machines that are busy with other tests: no leader changes but those that a test causes."""


async def until(condition: Callable[[], bool], awaited: str, limit_s: float = 10.0) -> None:
    """Waits for a condition; fails with what was awaited."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain until {awaited}"
        await asyncio.sleep(0.002)


def free_addresses(*names: str) -> dict[str, Address]:
    sockets = [socket.socket() for _ in names]
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
    addresses = {
        name: Address("127.0.0.1", sock.getsockname()[1])
        for name, sock in zip(names, sockets, strict=True)
    }
    for sock in sockets:
        sock.close()
    return addresses


class Journal:
    """A state machine that keeps every entry."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.restored = 0

    def apply(self, index: int, entry: bytes) -> None:
        self.entries.append(entry)

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode(self.entries)

    def restore(self, index: int, blob: bytes) -> None:
        self.entries = msgspec.msgpack.decode(blob, type=list[bytes])
        self.restored += 1


class LiveNode:
    def __init__(self, node: RaftNode, links: PeerLinks, journal: Journal) -> None:
        self.node, self.links, self.journal = node, links, journal

    @property
    def entries(self) -> list[bytes]:
        return self.journal.entries


class LiveCluster:
    def __init__(self, directory: Path, *names: str, settings: RaftSettings | None = None) -> None:
        self.directory = directory
        self.addresses = free_addresses(*names)
        self.settings = settings or PATIENT
        self.nodes: dict[str, LiveNode] = {}
        self.lives = 0

    def learner(self, name: str) -> LiveNode:
        """A node that is no voter."""
        (at,) = free_addresses(name).values()
        return self.make(name, at=at)

    def make(self, name: str, disk: Disk | None = None, at: Address | None = None) -> LiveNode:
        """`at`: where a learner listens."""
        self.lives += 1
        links = PeerLinks(
            name=name,
            incarnation=self.lives,
            cluster_id="test",
            listen=at or self.addresses[name],
            peers=self.addresses,
            advertise=at,
        )
        journal = Journal()
        node = RaftNode(
            name=name,
            voters=sorted(self.addresses),
            data_dir=self.directory / name,
            links=links,
            machine=journal,
            settings=self.settings,
            disk=disk,
        )
        (self.directory / name).mkdir(exist_ok=True)
        return LiveNode(node, links, journal)

    async def start(self, name: str, disk: Disk | None = None) -> LiveNode:
        live = self.make(name, disk)
        await live.links.start()
        await live.node.start()
        self.nodes[name] = live
        return live

    async def start_all(self) -> None:
        for name in self.addresses:
            await self.start(name)

    async def kill(self, name: str) -> None:
        """As abrupt as it gets inside one process: the sockets break first, nothing is flushed."""
        live = self.nodes.pop(name)
        await live.links.close()
        await live.node.stop()

    async def close(self) -> None:
        for name in list(self.nodes):
            await self.kill(name)

    def leaders(self) -> list[LiveNode]:
        return [live for live in self.nodes.values() if live.node.is_leader]

    async def leader(self) -> LiveNode:
        await until(lambda: len(self.leaders()) == 1, "one node leads")
        return self.leaders()[0]

    async def commit(self, *entries: bytes) -> None:
        """Appends on the leader and waits until every running node has applied."""
        leader = await self.leader()
        for entry in entries:
            leader.node.append(entry)
        for name, live in self.nodes.items():
            await until(
                lambda live=live: all(entry in live.entries for entry in entries[-1:]),
                f"node {name} applied {entries[-1]!r}",
            )
