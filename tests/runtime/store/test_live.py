"""With real processes and real links: SIGKILL loses nothing that was readable; nodes exchange history."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from distroml.consensus.frames import Address
from distroml.consensus.peers import PeerLinks
from distroml.runtime.store.following import follow
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.replication import HistoryReplicator, Links
from distroml.runtime.store.retention import HistoryLimits
from tests.runtime.store.histories import JOB, key, lines

LIMIT_S = 20.0

WRITER = """
    import asyncio, sys
    from pathlib import Path
    from distroml.runtime.store.history import HistoryStore
    from distroml.runtime.store.retention import HistoryLimits
    from tests.runtime.store.histories import key, lines

    async def main() -> None:
        limits = HistoryLimits(flush_s=0.001, segment_bytes=2000)
        async with HistoryStore(Path(sys.argv[1]), limits) as store:
            store.listen(lambda written, local: print(written.next_seq, flush=True))
            seq = 0
            while True:
                seq = store.append(key(), seq, lines(seq, seq + 7))
                await asyncio.sleep(0)

    asyncio.run(main())
"""


def test_what_was_readable_survives_sigkill(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    told = 0
    try:
        while told < 500:
            line = writer.stdout.readline()
            assert line, "the writer ended by itself"
            told = int(line)
    finally:
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate(timeout=LIMIT_S)
    whole = [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    told = max([told, *map(int, whole)])
    store = HistoryStore(tmp_path)
    head = store.heads(JOB)[key()]
    assert head >= told
    found: list[bytes] = []
    while part := store.read(key(), len(found)):
        found += part
    assert found == lines(0, head)


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_S} s for: {what}"
        await asyncio.sleep(0.01)


class LiveNode:
    """A store, its replicator and real links on loopback."""

    def __init__(self, directory: Path, name: str, ports: dict[str, int], incarnation: int) -> None:
        addresses = {peer: Address("127.0.0.1", port) for peer, port in ports.items()}
        self.peer_links = PeerLinks(
            name=name,
            incarnation=incarnation,
            cluster_id="history-test",
            listen=addresses[name],
            peers=addresses,
        )
        links: Links = self.peer_links
        self.store = HistoryStore(directory / name, HistoryLimits(flush_s=0.005))
        self.replicator = HistoryReplicator(name, self.store, links, lambda: ports, lambda: {JOB})

    async def start(self) -> None:
        await self.store.start()
        await self.peer_links.start()
        self.replicator.start()

    async def close(self) -> None:
        await self.replicator.close()
        await self.peer_links.close()
        await self.store.close()


async def test_two_nodes_over_real_links(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    ports = {name: unused_tcp_port_factory() for name in "ab"}
    one, other = (LiveNode(tmp_path, name, ports, 1) for name in "ab")
    await one.start()
    one.store.append(key(0), 0, lines(0, 500))  # while the other is not up yet
    await other.start()
    try:
        await until(lambda: other.store.heads(JOB).get(key(0)) == 500, "b has caught up")
        follower = follow(other.store, JOB, from_now=True, kinds=("metrics",))
        one.store.append(key(1, kind="metrics"), 0, lines(0, 3))
        async with asyncio.timeout(LIMIT_S):
            seqs = [(await anext(follower)).seq for _ in range(3)]
        assert seqs == [0, 1, 2]
        other.store.append(key(2), 0, lines(0, 5))
        await until(lambda: one.store.heads(JOB) == other.store.heads(JOB), "both are alike")
        await other.close()
        one.store.append(key(0), 500, lines(500, 600))
        other = LiveNode(tmp_path, "b", ports, 2)
        await other.start()
        await until(lambda: other.store.heads(JOB).get(key(0)) == 600, "b has what it missed")
    finally:
        await one.close()
        await other.close()
