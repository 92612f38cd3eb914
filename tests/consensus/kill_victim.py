"""One consensus node in a process of its own, to be killed: `python -m tests.consensus.kill_victim`.

Arguments: name, data directory, then `peer=port` of all voters. Commands are lines on standard input
(`append TEXT`); `acked TEXT` and `leader` are printed as they happen, `log N` after each `count`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from distroml.consensus.peers import Address, PeerLinks
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import ConsensusError, RaftSettings
from tests.consensus.live import Journal


class Announcer(Journal):
    """Says what was applied; on the leader that is what a client would be told."""

    leads = False

    def apply(self, index: int, entry: bytes) -> None:
        super().apply(index, entry)
        if self.leads:
            print("acked", entry.decode(), flush=True)


async def main(name: str, directory: str, *voters: str) -> None:
    peers = {
        peer: Address("127.0.0.1", int(port))
        for peer, _, port in (v.partition("=") for v in voters)
    }
    links = PeerLinks(name=name, incarnation=1, cluster_id="kill", listen=peers[name], peers=peers)
    machine = Announcer()
    node = RaftNode(
        name=name,
        voters=sorted(peers),
        data_dir=Path(directory),
        links=links,
        machine=machine,
        settings=RaftSettings(compaction_entries=200, trailing_entries=20),
    )

    def on_role(_status: object) -> None:
        if node.is_leader and not machine.leads:
            print("leader", flush=True)
        machine.leads = node.is_leader

    node.on_role(on_role)
    await links.start()
    await node.start()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        word, _, text = line.decode().strip().partition(" ")
        if word == "append":
            try:
                node.append(text.encode())
            except ConsensusError as error:
                print("refused", text, type(error).__name__, flush=True)
        elif word == "dump":
            print("entries", *(entry.decode() for entry in machine.entries), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
