"""Simulated TCP under the product's own `PeerLinks`: ordered bytes, resets, silence.

A cut direction does not break a connection, it only holds what was sent until it is mended, as a router that
drops packets does. Processes that die reset their connections; through a cut even that is heard only later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.loop import NodeLoop
from tests.sim.world import World

KERNEL_BUFFER_BYTES = 256 * 1024
"""What leaves a process at once; only beyond it does a transport count bytes as unsent."""
SYN_RETRY_S = 1.0
LATE_SHARE = 0.01
SPLIT_SHARE = 0.02
"""Of the writes that arrive in two parts."""


class Cuts:
    """Which directions between which nodes carry nothing now. Faults may overlap."""

    def __init__(self) -> None:
        self._depth: dict[tuple[str, str], int] = {}
        self.slow_s: dict[tuple[str, str], float] = {}
        """Extra delay by direction."""
        self.on_mend: Callable[[str, str], None] = lambda _source, _target: None

    def __contains__(self, direction: tuple[str, str]) -> bool:
        return direction in self._depth

    def __len__(self) -> int:
        return len(self._depth)

    def cut(self, source: str, target: str) -> None:
        self._depth[source, target] = self._depth.get((source, target), 0) + 1

    def mend(self, source: str, target: str) -> None:
        depth = self._depth.get((source, target), 0) - 1
        if depth > 0:
            self._depth[source, target] = depth
        elif self._depth.pop((source, target), None) is not None:
            self.on_mend(source, target)

    def mend_all(self) -> None:
        self.slow_s.clear()
        for source, target in sorted(self._depth):
            self._depth[source, target] = 1
            self.mend(source, target)


class Streams:
    """All connections of a cluster."""

    def __init__(self, world: World, cuts: Cuts) -> None:
        self.world, self.cuts = world, cuts
        self.rng = world.stream("network")
        self.connections = 0
        self._listeners: dict[str, tuple[NodeLoop, Callable[[], Any]]] = {}
        self._ends: dict[str, dict[Stream, None]] = {}
        self._held: dict[tuple[str, str], deque[_Pipe]] = {}
        cuts.on_mend = self._mended

    def attach(self, loop: NodeLoop) -> None:
        """Gives a process its sockets."""

        async def connect(factory: Callable[[], Any], host: str, _port: int) -> Any:
            future = loop.create_future()
            self._syn(loop, factory, host, future)
            return await future

        async def listen(factory: Callable[[], Any], _host: str, _port: int) -> _Listener:
            self._listeners[loop.name] = (loop, factory)
            return _Listener()

        loop.connect, loop.listen = connect, listen
        self._ends[loop.name] = {}

    def kill(self, name: str) -> None:
        """The process is gone: the kernel resets what it had open."""
        self._listeners.pop(name, None)
        for end in list(self._ends.pop(name, {})):
            end.dies()

    def reset(self, one: str, other: str) -> None:
        for end in [*self._ends.get(one, {})]:
            if end.there == other and not end.gone:
                end.breaks()
                end.peer.breaks()

    def delay_s(self, source: str, target: str) -> float:
        random = self.rng.random
        delay_s = 0.0001 + 0.0019 * random()
        if random() < LATE_SHARE:
            delay_s *= 20
        slow_s = self.cuts.slow_s
        return delay_s + slow_s.get((source, target), 0.0) if slow_s else delay_s

    def _syn(self, loop: NodeLoop, factory: Any, host: str, future: asyncio.Future[Any]) -> None:
        self.world.later(
            self.delay_s(loop.name, host), self._syn_arrives, loop, factory, host, future
        )

    def _syn_arrives(
        self, loop: NodeLoop, factory: Any, host: str, future: asyncio.Future[Any]
    ) -> None:
        if loop.dead or future.done():
            return
        if (loop.name, host) in self.cuts or (host, loop.name) in self.cuts:
            self.world.later(SYN_RETRY_S, self._syn_arrives, loop, factory, host, future)
            return
        back_s = self.delay_s(host, loop.name)
        listener = self._listeners.get(host)
        if listener is None:
            self.world.later(back_s, loop.enter, _refuse, future)
            return
        self.connections += 1
        server_loop, accept = listener
        client, server = Stream(self, loop, host), Stream(self, server_loop, loop.name)
        client.peer, server.peer = server, client
        client.pipe, server.pipe = _Pipe(self, client, server), _Pipe(self, server, client)
        self._ends[loop.name][client] = None
        self._ends[host][server] = None
        server_loop.enter(server.open, accept)
        self.world.later(back_s, loop.enter, self._connected, client, factory, future)

    def _connected(self, client: Stream, factory: Any, future: asyncio.Future[Any]) -> None:
        if future.done():
            client.gone = True
            client.pipe.push(None)
            return
        client.open(factory)
        future.set_result((client, client.protocol))

    def hold(self, pipe: _Pipe) -> None:
        self._held.setdefault(pipe.direction, deque()).append(pipe)

    def _mended(self, source: str, target: str) -> None:
        for pipe in self._held.pop((source, target), ()):
            at = self.world.now + self.delay_s(source, target)
            pipe.receiver.loop.enter_at(at, pipe.arrive)

    def forget(self, end: Stream) -> None:
        self._ends.get(end.loop.name, {}).pop(end, None)


class _Listener:
    sockets = ()

    def close(self) -> None:
        pass


class _Pipe:
    """One direction of one connection. Each arrival takes the oldest chunk, so order is kept."""

    def __init__(self, streams: Streams, sender: Stream, receiver: Stream) -> None:
        self.streams, self.receiver = streams, receiver
        self.direction = (sender.loop.name, receiver.loop.name)
        self._mark = int.from_bytes("".join(self.direction).encode()[-8:], "little", signed=True)
        self.broken = False
        self.unread = 0
        self._chunks: deque[bytes | None] = deque()
        self._written_at = -1.0
        self._last_at = 0.0

    def push(self, data: bytes | None) -> None:
        now, chunks = self.streams.world.now, self._chunks
        if data is not None:
            self.unread += len(data)
            if self._written_at == now and chunks and chunks[-1] is not None:
                chunks[-1] += data
                return
            if self.streams.rng.random() < SPLIT_SHARE:
                self._send(data[: len(data) // 2], now)
                data = data[len(data) // 2 :]
        self._send(data, now)

    def _send(self, data: bytes | None, now: float) -> None:
        self._written_at = now
        at = now + self.streams.delay_s(*self.direction)
        if at > self._last_at:
            self._last_at = at
        self._chunks.append(data)
        self.receiver.loop.enter_at(self._last_at, self.arrive)

    def arrive(self) -> None:
        """The next chunk reaches the receiving process, in whose loop this runs."""
        cuts = self.streams.cuts
        if cuts and self.direction in cuts:
            self.streams.hold(self)
            return
        chunk = self._chunks.popleft()
        receiver = self.receiver
        if chunk is None:
            receiver.peer_closed()
            return
        self.unread -= len(chunk)
        if not self.broken and not receiver.gone and receiver.protocol is not None:
            self.streams.world.note(1, len(chunk), self._mark)
            receiver.protocol.data_received(chunk)


class Stream(asyncio.Transport):
    """One end of a connection."""

    peer: Stream
    pipe: _Pipe

    def __init__(self, streams: Streams, loop: NodeLoop, there: str) -> None:
        super().__init__()
        self.streams, self.loop, self.there = streams, loop, there
        self.protocol: Any = None
        self.gone = False
        """Closed, aborted or broken on this side."""
        self._told = False

    def open(self, factory: Callable[[], Any]) -> None:
        """The connection is there; it may have ended already, which the protocol then hears next."""
        self.protocol = factory()
        self.protocol.connection_made(self)
        if self.gone:
            self._lose(None)

    def peer_closed(self) -> None:
        self._lose(None)

    def breaks(self) -> None:
        """A reset from outside."""
        self.pipe.broken = True
        self.loop.enter(self._lose, ConnectionResetError("reset"))

    def dies(self) -> None:
        """Our process was killed; what it had sent may still arrive, or not."""
        if not self.gone:
            self.gone = True
            self.pipe.broken = self.streams.rng.random() < 0.5
            self.pipe.push(None)

    def _lose(self, error: Exception | None) -> None:
        self.gone = True
        self.streams.forget(self)
        if not self._told and self.protocol is not None:
            self._told = True
            self.loop.call_soon(self.protocol.connection_lost, error)

    # ------------------------------------------------------------------ asyncio.Transport

    def write(self, data: Any) -> None:
        if not self.gone:
            self.pipe.push(data if type(data) is bytes else bytes(data))

    def close(self) -> None:
        if not self.gone:
            self.pipe.push(None)
            self._lose(None)

    def abort(self) -> None:
        if not self.gone:
            self.pipe.broken = self.streams.rng.random() < 0.5
            self.pipe.push(None)
            self._lose(None)

    def is_closing(self) -> bool:
        return self.gone

    def get_write_buffer_size(self) -> int:
        waiting = self.pipe.unread - KERNEL_BUFFER_BYTES
        return waiting if waiting > 0 else 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


def _refuse(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(ConnectionRefusedError("nobody listens"))
