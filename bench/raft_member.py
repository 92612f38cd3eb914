"""One voter without HTTP, agent or workers: links, log, fsync, state machine and proposer, as a node has them.

Run by ``bench.raft_trio`` as a process of its own. Commands come as lines of JSON on standard input, answers go as
lines of JSON to standard output; the end of the input ends the process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from bench.http_load import Load
from distroml.commands import RegisterNode, SetNodeStatus
from distroml.config import raft_settings
from distroml.consensus.peers import Address, Channel, PeerLinks
from distroml.consensus.proposer import Proposer
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import EntryTooLarge, NotLeader, Overloaded
from distroml.consensus.replica import Replica
from distroml.errors import Unavailable
from distroml.model import NodeStatus
from distroml.settings import NodeSettings

VALUE_BYTES = 256
"""Payload of a command, as of etcd's values."""
INCARNATION = 1
PROPOSE_TIMEOUT_S = 30.0
REGISTER_PAUSE_S = 0.05
MAX_LINE_BYTES = 64 * 1024 * 1024
"""The latencies of one load are one line."""


class Ask(Struct, frozen=True):
    """Propose with ``clients`` at once for ``seconds``; 0 clients: only say whether this member leads."""

    clients: int = 0
    seconds: float = 0.0


class Answer(Struct, frozen=True):
    leads: bool
    load: Load | None = None


class Member:
    """What of a node takes part in consensus."""

    def __init__(self, name: str, peers: dict[str, Address], data_dir: Path) -> None:
        self.name = name
        self.links = PeerLinks(
            name=name,
            incarnation=INCARNATION,
            cluster_id="bench",
            listen=peers[name],
            peers=peers,
        )
        self.replica = Replica()
        self.raft = RaftNode(
            name=name,
            voters=tuple(peers),
            data_dir=data_dir,
            links=self.links,
            machine=self.replica,
            settings=raft_settings(NodeSettings()),
        )
        self.proposer = Proposer(
            name=name,
            incarnation=INCARNATION,
            raft=self.raft,
            links=self.links,
            refusal=(NotLeader, Overloaded, EntryTooLarge),
        )

    async def start(self) -> None:
        self.links.subscribe(Channel.PROPOSE, self.proposer.on_forwarded)
        self.replica.listen(self.proposer.on_applied)
        self.raft.on_role(lambda status: self.proposer.on_leader_change())
        await self.links.start()
        await self.raft.start()
        command = RegisterNode(name=self.name, incarnation=INCARNATION, http="", slots=0)
        while not self.proposer.registered:
            try:
                await self.proposer.propose(command, PROPOSE_TIMEOUT_S)
                self.proposer.registered = True
            except Unavailable:
                await asyncio.sleep(REGISTER_PAUSE_S)
        gc.freeze()  # as a node does

    async def stop(self) -> None:
        await self.raft.stop()
        await self.links.close()

    async def load(self, clients: int, seconds: float) -> Load:
        """A closed loop of proposals; each one is applied here before the next of its client."""
        command = SetNodeStatus(
            name=self.name,
            incarnation=INCARNATION,
            status=NodeStatus.ALIVE,
            reason="x" * VALUE_BYTES,
        )
        latencies_s: list[float] = []
        began = time.perf_counter()

        async def client() -> None:
            while (sent_at := time.perf_counter()) < began + seconds:
                outcome = await self.proposer.propose(command, PROPOSE_TIMEOUT_S)
                if outcome.error:
                    raise RuntimeError(f"a proposal was refused: {outcome.detail}")
                latencies_s.append(time.perf_counter() - sent_at)

        await asyncio.gather(*(client() for _ in range(clients)))
        return Load(latencies_s, time.perf_counter() - began)


async def serve(name: str, peers: dict[str, Address], data_dir: Path) -> None:
    """Answer until the input ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    member = Member(name, peers, data_dir)
    await member.start()
    try:
        while line := await lines.readline():
            ask = msgspec.json.decode(line, type=Ask)
            load = await member.load(ask.clients, ask.seconds) if ask.clients else None
            answer = Answer(leads=member.raft.is_leader, load=load)
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()
    finally:
        await member.stop()


def main() -> None:
    """The command line of one member."""
    parser = argparse.ArgumentParser(prog="python -m bench.raft_member")
    parser.add_argument("name")
    parser.add_argument("peers", help="name=host:port,...")
    parser.add_argument("data_dir", type=Path)
    given = parser.parse_args()
    pairs = (entry.partition("=") for entry in given.peers.split(","))
    peers = {name: Address.parse(at) for name, _, at in pairs}
    asyncio.run(serve(given.name, peers, given.data_dir))


if __name__ == "__main__":
    main()
