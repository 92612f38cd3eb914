"""A barrier in bare asyncio, of the same shape as the product's: what the sockets and the event loop cost by themselves.

Workers write one byte to their agent over a Unix socket, agents one byte to the server over TCP once all theirs have,
and the server answers all once it has heard of all. No names, no fencing, no loss: not a barrier to use.
"""

from __future__ import annotations

import array
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.players import take_orders
from bench.processes import until

BYTE = b"\x01"


class Counting(asyncio.Protocol):
    """Hears bytes of ``expected`` connections, and answers all of them once told."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._hall.connections.append(transport)

    def data_received(self, data: bytes) -> None:
        self._hall.hear(len(data))


class Hall:
    """Where ``expected`` connections meet; by itself it answers them, an agent asks the server first."""

    def __init__(self, expected: int) -> None:
        self._expected, self._heard = expected, 0
        self.connections: list[asyncio.WriteTransport] = []
        self.upstream: asyncio.WriteTransport | None = None

    def hear(self, count: int) -> None:
        self._heard += count
        if self._heard == self._expected:
            self._heard = 0
            if self.upstream is None:
                self.answer()
            else:
                self.upstream.write(BYTE)

    def answer(self) -> None:
        for connection in self.connections:
            connection.write(BYTE)


class Upstream(asyncio.Protocol):
    """An agent's connection with the server."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._hall.upstream = transport

    def data_received(self, data: bytes) -> None:
        self._hall.answer()


class BareWorker(asyncio.Protocol):
    """Writes a byte and notes when one comes back."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self.arrived_s = array.array("d")
        self.released_s = array.array("d")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def arrive(self) -> None:
        assert self._transport is not None
        self.arrived_s.append(time.monotonic())
        self._transport.write(BYTE)

    def data_received(self, data: bytes) -> None:
        self.released_s.append(time.monotonic())


class Orders:
    """What the benchmark may ask."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._workers: list[BareWorker] = []
        self._servers: list[asyncio.Server] = []

    async def serve(self, agents: int) -> int:
        """Be the server; returns its port."""
        hall = Hall(agents)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Counting(hall), "127.0.0.1", 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def employ(self, port: int, workers: list[int]) -> None:
        """Be agents with that many workers each."""
        loop = asyncio.get_running_loop()
        for number, count in enumerate(workers):
            hall = Hall(count)
            path = os.fspath(self._directory / str(number))
            self._servers.append(await loop.create_unix_server(lambda h=hall: Counting(h), path))  # type: ignore[misc]
            await loop.create_connection(lambda h=hall: Upstream(h), "127.0.0.1", port)  # type: ignore[misc]
            for _ in range(count):
                worker = BareWorker()
                await loop.create_unix_connection(lambda w=worker: w, path)  # type: ignore[misc]
                self._workers.append(worker)

    async def meet(
        self, name: str, rounds: int, first_s: float, period_s: float
    ) -> list[list[list[float]]]:
        """As ``agents_process``; ``name`` is not needed."""
        for worker in self._workers:
            del worker.arrived_s[:], worker.released_s[:]
        for number in range(rounds):
            await asyncio.sleep(max(0.0, first_s + number * period_s - time.monotonic()))
            for worker in self._workers:
                worker.arrive()
            await until(
                lambda number=number: all(len(w.released_s) > number for w in self._workers),  # type: ignore[misc]
                f"all workers to pass barrier {number}",
            )
        return [[list(worker.arrived_s), list(worker.released_s)] for worker in self._workers]


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        orders = Orders(Path(directory))
        await take_orders({name: getattr(orders, name) for name in ("serve", "employ", "meet")})


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
