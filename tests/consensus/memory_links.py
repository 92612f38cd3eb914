"""Both ends of a peer link in memory, with an attacker between them who sees and changes every write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from distroml.consensus.authentication import LinkSecurity
from distroml.consensus.connections import Inbound, Outbound
from distroml.consensus.frames import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Channel,
    Hello,
    Lane,
    LinkLimits,
    hello_refusal,
    voters_digest,
)
from distroml.credentials import ClusterKeys

KEY, OTHER_KEY = bytes(range(32)), bytes(range(100, 132))
FRAMES = (b"first frame", b"second frame", b"third")
WITH_KEY = LinkSecurity(keys=ClusterKeys(KEY))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class End:
    """One node's side: what its connection asks of `PeerLinks`, kept as data."""

    def __init__(self, name: str, security: LinkSecurity) -> None:
        self.name = name
        self.incarnation = 3
        self.limits = LinkLimits()
        self.security = security
        self.counters: dict[str, int] = {}
        self.delivered: list[bytes] = []
        self.established = False

    def count(self, counter: str, by: int = 1) -> int:
        self.counters[counter] = total = self.counters.get(counter, 0) + by
        return total

    def count_loudly(self, counter: str, peer: str) -> tuple[int, bool]:
        return self.count(counter), True

    def admit(self, connection: Inbound, hello: Hello) -> str | None:
        return hello_refusal(
            hello,
            name=self.name,
            cluster_id="test",
            peers=frozenset("ab") - {self.name},
            voters=voters_digest("ab"),
        )

    def established_inbound(self, connection: Inbound) -> None:
        self.established = True

    def closed_inbound(self, connection: Inbound) -> None:
        pass

    def frame(self, connection: Inbound, channel: int, body: bytes) -> None:
        self.delivered.append(body)

    @property
    def refusals(self) -> set[str]:
        return {counter for counter in self.counters if counter.startswith("refused_")}


class Memory(asyncio.Transport):
    """A transport that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0


Change = Callable[[int, bytes], list[bytes]]
"""From the number of a write and its bytes to what arrives instead."""


class Wire:
    """A dialer `a` and an acceptor `b` whose writes pass through the hands of an attacker."""

    def __init__(self, a: LinkSecurity = WITH_KEY, b: LinkSecurity = WITH_KEY) -> None:
        self.a, self.b = End("a", a), End("b", b)
        self.sent: list[tuple[str, bytes]] = []

    def hello(self, **changes: object) -> Hello:
        hello = Hello(
            PROTOCOL_VERSION, "test", "a", "b", 3, 7, Lane.CONTROL, b"n" * NONCE_BYTES,
            voters=voters_digest("ab"),
        )  # fmt: skip
        return msgspec.structs.replace(hello, **changes)

    def run(self, change: Change | None = None, frames: tuple[bytes, ...] = FRAMES) -> None:
        asyncio.run(self._run(change or (lambda _, data: [data]), frames))

    async def _run(self, change: Change, frames: tuple[bytes, ...]) -> None:
        dialer, acceptor = Outbound(self.a, self.hello()), Inbound(self.b)
        from_a, from_b = Memory(), Memory()
        acceptor.connection_made(from_b)
        dialer.connection_made(from_a)

        def pump() -> None:
            while from_a.written or from_b.written:
                for source, target, name in ((from_a, acceptor, "a"), (from_b, dialer, "b")):
                    while source.written:
                        data = source.written.pop(0)
                        self.sent.append((name, data))
                        for arriving in change(len(self.sent) - 1, data):
                            if not target.closing:
                                target.data_received(arriving)

        pump()
        if dialer.established:
            for frame in frames:
                dialer.send(Channel.RAFT, frame, 10**6)
            pump()
        dialer.connection_lost(None)
        acceptor.connection_lost(None)
