"""The links between nodes: who is connected, and frames to and from subscribers.

Each node dials every peer, once per lane, and sends only on connections it dialed; it receives on
those it accepted. A peer is *connected* while its control lane stands both ways. Of several
connections of one peer and lane the newest counts, so frames of an old one are never delivered.
Everything is bounded: frames, queues, handshakes, reconnect attempts per second.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Mapping
from typing import Final

from distroml.consensus.authentication import LinkSecurity
from distroml.consensus.connections import Inbound, Outbound
from distroml.consensus.frames import (
    HEADER_BYTES,
    LANE_OF,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Address,
    Channel,
    Hello,
    Lane,
    LinkLimits,
    hello_refusal,
    voters_digest,
)
from distroml.consensus.learner_table import LearnerTable

__all__ = ["Address", "Channel", "Lane", "LinkLimits", "LinkSecurity", "PeerLinks"]

logger = logging.getLogger(__name__)

WARN_AGAIN_S: Final = 60.0
"""A refusal that goes on is logged at least this often."""

FrameHandler = Callable[[str, bytes], None]
LinkHandler = Callable[[str, bool], None]


class PeerLinks:
    """All connections of one node. Methods are for the event loop that `start` ran in."""

    def __init__(
        self,
        *,
        name: str,
        incarnation: int,
        cluster_id: str,
        listen: Address,
        peers: Mapping[str, Address],
        advertise: Address | None = None,
        limits: LinkLimits | None = None,
        security: LinkSecurity | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.cluster_id = cluster_id
        self.listen = listen
        self._advertise = advertise
        """Where the peers reach this learner; None: they know this node from their settings."""
        self.peers = {peer: address for peer, address in peers.items() if peer != name}
        self._voters = b"" if advertise else voters_digest({name, *peers})
        self.limits = limits or LinkLimits()
        self.security = security or LinkSecurity()
        self.counters: dict[str, int] = {"frames_in": 0, "frames_out": 0}
        """frames_in, frames_out, bytes_in, bytes_out, dropped_<lane>, refused_<reason>, …"""
        self._rng = rng or random.Random()
        self._epoch = 0
        self._handlers: dict[int, FrameHandler] = {}
        self._link_handlers: list[LinkHandler] = []
        self._server: asyncio.Server | None = None
        self._tasks: dict[tuple[str, Lane], asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._pending: set[Inbound] = set()
        self._inbound: dict[tuple[str, Lane], Inbound] = {}
        self._outbound: dict[tuple[str, Lane], Outbound] = {}
        self._nudges: dict[tuple[str, Lane], asyncio.Event] = {}
        self._up: set[str] = set()
        self.learners = LearnerTable(self.connected)
        self._warned: dict[tuple[str, str], tuple[int, float]] = {}
        self._closed = False

    # ------------------------------------------------------------------ use

    def subscribe(self, channel: Channel, handler: FrameHandler) -> None:
        """`handler(peer, body)` receives the frames of `channel`; one handler per channel."""
        self._handlers[channel] = handler

    def on_link(self, handler: LinkHandler) -> None:
        """`handler(peer, up)` is called in the loop when a peer's pair of connections came or went."""
        self._link_handlers.append(handler)

    def connected(self, peer: str) -> bool:
        return peer in self._up

    def connected_peers(self) -> list[str]:
        """Names of the peers that are connected now, in order."""
        return sorted(self._up)

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        """Queues one frame. Never blocks; False (counted) if the peer is down or its lane is full.

        Raises ValueError for a body over the frame limit: that is a defect of the sender.
        """
        if len(body) > self.limits.frame_bytes:
            raise ValueError(f"frame of {len(body)} bytes; the limit is {self.limits.frame_bytes}")
        lane = LANE_OF[channel]
        connection = self._outbound.get((peer, lane))
        limit = self._queue_bytes(lane)
        if connection is None or not connection.send(channel, body, limit):
            self.count(f"dropped_{lane.name.lower()}")
            return False
        self.counters["frames_out"] += 1
        self.count("bytes_out", len(body) + HEADER_BYTES)
        return True

    def _queue_bytes(self, lane: Lane) -> int:
        if lane is Lane.CONTROL:
            return self.limits.control_queue_bytes
        return self.limits.bulk_queue_bytes

    async def start(self) -> None:
        """Listens and begins to dial. Raises OSError where the address can not be bound."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._accept, self.listen.host, self.listen.port, reuse_address=True
        )
        if self.listen.port == 0:
            bound = self._server.sockets[0].getsockname()
            self.listen = Address(self.listen.host, bound[1])
        for peer in sorted(self.peers):
            self._begin_to_dial(peer)
        self._watching = asyncio.create_task(self._watch(), name="links-watch")

    async def close(self) -> None:
        """Closes everything at once; unsent frames are lost, as they would be in a crash."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        tasks = [*self._tasks.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connections = [*self._pending, *self._inbound.values(), *self._outbound.values()]
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.closed for connection in connections))

    def count(self, counter: str, by: int = 1) -> int:
        self.counters[counter] = total = self.counters.get(counter, 0) + by
        return total

    def count_loudly(self, counter: str, peer: str) -> tuple[int, bool]:
        """Counts; the total, and whether to warn of this peer ("": all strangers together).

        So it is at the 1st, 2nd, 4th, 8th … time, and after `WARN_AGAIN_S` without a warning.
        """
        now = asyncio.get_running_loop().time()
        times, warned_at = self._warned.get((counter, peer), (0, now))
        times += 1
        loud = times & (times - 1) == 0 or now - warned_at >= WARN_AGAIN_S
        self._warned[counter, peer] = (times, now if loud else warned_at)
        return self.count(counter), loud

    # ------------------------------------------------------------------ dialing

    def _begin_to_dial(self, peer: str) -> None:
        for lane in Lane:
            self._nudges[peer, lane] = asyncio.Event()
            dialing = self._dial_always(peer, lane)
            self._tasks[peer, lane] = asyncio.create_task(dialing, name=f"dial-{peer}-{lane.name}")

    def _cease_to_dial(self, peer: str) -> None:
        for lane in Lane:
            self._tasks.pop((peer, lane)).cancel()
            del self._nudges[peer, lane]
            outbound = self._outbound.pop((peer, lane), None)
            if outbound is not None:
                outbound.abort()
        self._refresh(peer)

    async def _dial_always(self, peer: str, lane: Lane) -> None:
        nudge = self._nudges[peer, lane]
        backoff_s = self.limits.backoff_min_s
        while True:
            connection = await self._dial(peer, lane)
            if connection is not None:
                backoff_s = self.limits.backoff_min_s
                self._outbound[peer, lane] = connection
                self._refresh(peer)
                await asyncio.shield(connection.closed)
                self._outbound.pop((peer, lane), None)
                self._refresh(peer)
            # A peer that has just connected to us is surely up: it nudges, and we do not wait.
            nudge.clear()
            pause_s = backoff_s * self._rng.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(pause_s):
                    await nudge.wait()
            except TimeoutError:
                backoff_s = min(backoff_s * 2, self.limits.backoff_max_s)

    async def _dial(self, peer: str, lane: Lane) -> Outbound | None:
        """One attempt: an established connection, or None."""
        self._epoch += 1
        address = self.peers[peer]
        at = str(self._advertise) if self._advertise else None
        hello = Hello(
            version=PROTOCOL_VERSION,
            cluster_id=self.cluster_id,
            name=self.name,
            target=peer,
            incarnation=self.incarnation,
            epoch=self._epoch,
            lane=lane,
            nonce=secrets.token_bytes(NONCE_BYTES),
            learner_at=at,
            voters=self._voters,
        )
        loop = asyncio.get_running_loop()
        connection: Outbound | None = None
        try:
            async with asyncio.timeout(self.limits.connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Outbound(self, hello), address.host, address.port
                )
            if await connection.ready:
                return connection
        except (OSError, TimeoutError, UnicodeError) as error:
            logger.debug("%s cannot reach %s at %s: %s", self.name, peer, address, error)
        except asyncio.CancelledError:
            if connection is not None:
                connection.abort()
            raise
        self.count("dials_failed")
        return None

    # ------------------------------------------------------------------ accepting

    def _accept(self) -> Inbound:
        connection = Inbound(self)
        if len(self._pending) >= self.limits.pending_handshakes:
            oldest = min(self._pending, key=lambda pending: pending.last_heard)
            self.count("refused_too_many")
            oldest.abort()
        self._pending.add(connection)
        return connection

    def admit(self, connection: Inbound, hello: Hello) -> str | None:
        lasting = frozenset(peer for peer in self.peers if peer not in self.learners)
        reason = hello_refusal(
            hello,
            name=self.name,
            cluster_id=self.cluster_id,
            peers=lasting,
            voters=self._voters,
        )
        if reason is None and hello.learner_at:
            reason = "unknown_peer" if self._advertise else self.learners.refusal(hello)
        if reason is not None:
            return reason
        current = self._inbound.get((hello.name, hello.lane))
        if current is None or current.hello is None:
            return None
        if hello.incarnation < current.hello.incarnation:
            return "stale_incarnation"
        if hello.incarnation == current.hello.incarnation and hello.epoch <= current.hello.epoch:
            return "stale_epoch"
        return None

    def established_inbound(self, connection: Inbound) -> None:
        hello = connection.hello
        if hello is None or self._closed:
            connection.abort()
            return
        # Asked again: between hello and proof a newer connection, or another learner of this name, came.
        reason = self.admit(connection, hello)
        if reason is not None:
            connection.refuse(reason, f"{connection.other} has proved itself too late")
            return
        self._pending.discard(connection)
        if hello.learner_at:
            self._take_in(hello)
        key = (connection.peer, connection.lane)
        older = self._inbound.get(key)
        self._inbound[key] = connection
        if older is not None:
            # What the peer sent on the older one after we stopped listening is lost: say "down".
            older.abort()
            self._refresh(connection.peer, broken=connection.lane is Lane.CONTROL)
        self._drop_links_to_older_process(connection.peer, hello.incarnation)
        for lane in Lane:
            self._nudges[connection.peer, lane].set()
        self._refresh(connection.peer)

    def _take_in(self, hello: Hello) -> None:
        """A learner has proved itself: it is a peer from now on, until it has been away for long."""
        if not self.learners.enter(hello, asyncio.get_running_loop().time()):
            return
        if hello.name in self.peers:
            self._cease_to_dial(hello.name)
        self.peers[hello.name] = self.learners.address(hello.name)
        self._begin_to_dial(hello.name)

    def _forget_learners(self, now: float) -> None:
        for name in self.learners.forgettable(now):
            self._cease_to_dial(name)
            for lane in Lane:
                # One that reaches us, yet is not reached, has to come anew, or nobody would dial it again.
                inbound = self._inbound.get((name, lane))
                if inbound is not None:
                    inbound.abort()
            self._warned = {key: told for key, told in self._warned.items() if key[1] != name}
            self.learners.forget(name)
            del self.peers[name]
            self.count("learners_forgotten")

    def _drop_links_to_older_process(self, peer: str, incarnation: int) -> None:
        for lane in Lane:
            outbound = self._outbound.get((peer, lane))
            if outbound is not None and outbound.peer_incarnation < incarnation:
                outbound.abort()

    def closed_inbound(self, connection: Inbound) -> None:
        self._pending.discard(connection)
        key = (connection.peer, connection.lane)
        if self._inbound.get(key) is connection:
            del self._inbound[key]
            self._refresh(connection.peer)

    def frame(self, connection: Inbound, channel: int, body: bytes) -> None:
        if self._inbound.get((connection.peer, connection.lane)) is not connection:
            self.count("dropped_old_connection")
            return
        handler = self._handlers.get(channel)
        if handler is None:
            self.count("dropped_no_subscriber")
            return
        if LANE_OF[channel] is not connection.lane:
            connection.refuse("garbage", f"channel {channel} came on the wrong lane")
            return
        self.counters["frames_in"] += 1
        try:
            handler(connection.peer, body)
        except Exception:
            self.count("handler_errors")
            logger.exception("the handler of channel %d failed on a frame", channel)

    # ------------------------------------------------------------------ up and down

    def _refresh(self, peer: str, *, broken: bool = False) -> None:
        """Tells subscribers when the pair of control connections came up or went down."""
        both = (peer, Lane.CONTROL) in self._inbound and (peer, Lane.CONTROL) in self._outbound
        if peer in self._up and (broken or not both):
            self._up.discard(peer)
            self._tell(peer, False)
        if both and peer not in self._up:
            self._up.add(peer)
            self._tell(peer, True)

    def _tell(self, peer: str, up: bool) -> None:
        self.count("links_up" if up else "links_down")
        if self._closed:
            return
        for handler in self._link_handlers:
            try:
                handler(peer, up)
            except Exception:
                self.count("handler_errors")
                logger.exception("a link handler failed for %s", peer)

    async def _watch(self) -> None:
        """Pings what is idle, and gives up on what has been silent for too long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.limits.ping_s)
            for outbound in list(self._outbound.values()):
                outbound.ping()
            now = loop.time()
            self._forget_learners(now)
            for inbound in list(self._inbound.values()):
                if inbound.last_heard < now - self.limits.idle_timeout_s:
                    self.count("idle_closed")
                    inbound.abort()
                elif inbound.last_frame < now - self.limits.frame_timeout_s:
                    self.count("stalled_closed")
                    inbound.abort()
