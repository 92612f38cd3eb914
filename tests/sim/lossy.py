"""A worse network than TCP, in place of `PeerLinks`: frames are dropped, repeated and overtake each other.

What links promise even so, and what the core relies on: a frame of one process never reaches, or comes from,
a later life of either end (`epochs`; a mutant takes that away).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from distroml.consensus.frames import Channel, LinkLimits
from tests.sim.loop import NodeLoop
from tests.sim.streams import Cuts, hash_of
from tests.sim.world import World

RECONNECT_S = 0.2


class Lossy:
    """All links of a cluster."""

    def __init__(
        self, world: World, cuts: Cuts, *, drop: float, repeat: float, late: float
    ) -> None:
        self.world, self.cuts = world, cuts
        self.drop, self.repeat, self.late = drop, repeat, late
        self.epochs = True
        self.rng: random.Random = world.stream("network")
        self.links: dict[str, LossyLinks] = {}
        self._connected: dict[tuple[str, str], None] = {}
        self._told_at: dict[tuple[str, str], float] = {}

    def kill(self, name: str) -> None:
        self.links.pop(name, None)
        for pair in [pair for pair in self._connected if name in pair]:
            self._disconnect(pair)

    def reset(self, one: str, other: str) -> None:
        pair = (min(one, other), max(one, other))
        if pair in self._connected:
            self._disconnect(pair)
            self.world.later(RECONNECT_S * self.rng.uniform(0.1, 2.0), self.connect, *pair)

    def join(self, links: LossyLinks) -> None:
        for other in sorted(self.links):
            self.world.later(self.rng.uniform(0.001, 0.05), self.connect, links.name, other)
        self.links[links.name] = links

    def connect(self, one: str, other: str) -> None:
        pair = (min(one, other), max(one, other))
        if pair in self._connected or one not in self.links or other not in self.links:
            return
        if pair in self.cuts or pair[::-1] in self.cuts:
            self.world.later(RECONNECT_S, self.connect, one, other)
            return
        self._connected[pair] = None
        self._tell(pair, True)

    def _disconnect(self, pair: tuple[str, str]) -> None:
        del self._connected[pair]
        self._tell(pair, False)

    def _tell(self, pair: tuple[str, str], up: bool) -> None:
        for here, there in (pair, pair[::-1]):
            links = self.links.get(here)
            if links is not None:
                # In order: who was told "down" after the "up" that followed it would stay down for ever.
                soonest = self._told_at.get((here, there), 0.0)
                told_at = max(soonest, self.world.now + self.rng.uniform(0.0001, 0.01))
                self._told_at[here, there] = told_at
                self.world.at(told_at, links.tell, there, up)

    def connected(self, here: str, there: str) -> bool:
        return (min(here, there), max(here, there)) in self._connected

    def send(self, source: LossyLinks, target: str, channel: int, body: bytes) -> None:
        receiver = self.links.get(target)
        rng = self.rng
        if receiver is None or (source.name, target) in self.cuts or rng.random() < self.drop:
            return
        extra_s = self.cuts.slow_s.get((source.name, target), 0.0)
        for _ in range(2 if rng.random() < self.repeat else 1):
            late = rng.random() < self.late
            delay_s = rng.uniform(0.05, 2.5) if late else rng.uniform(0.0002, 0.01)
            self.world.later(delay_s + extra_s, self._arrive, source, receiver, channel, body)

    def _arrive(self, source: LossyLinks, receiver: LossyLinks, channel: int, body: bytes) -> None:
        if (source.name, receiver.name) in self.cuts:
            return
        if self.epochs:
            if source.loop.dead or receiver.loop.dead:
                return
        else:
            newest = self.links.get(receiver.name)
            if newest is None:
                return
            receiver = newest
        self.world.note(2, len(body), hash_of(source.name, receiver.name))
        receiver.loop.enter(receiver.deliver, source.name, channel, body)


class LossyLinks:
    """What `RaftNode` and `Proposer` use of `PeerLinks`."""

    def __init__(self, lossy: Lossy, loop: NodeLoop, name: str, cluster_id: str) -> None:
        self.name, self.cluster_id, self.loop = name, cluster_id, loop
        self.limits = LinkLimits()
        self._lossy = lossy
        self._handlers: dict[int, Callable[[str, bytes], None]] = {}
        self._link_handlers: list[Callable[[str, bool], None]] = []
        self._up: dict[str, None] = {}

    async def start(self) -> None:
        self._lossy.join(self)

    def subscribe(self, channel: Channel, handler: Callable[[str, bytes], None]) -> None:
        self._handlers[int(channel)] = handler

    def on_link(self, handler: Callable[[str, bool], None]) -> None:
        self._link_handlers.append(handler)

    def connected_peers(self) -> list[str]:
        return sorted(self._up)

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        if not self._lossy.connected(self.name, peer):
            return False
        self._lossy.send(self, peer, int(channel), body)
        return True

    def tell(self, peer: str, up: bool) -> None:
        self.loop.enter(self._tell, peer, up)

    def _tell(self, peer: str, up: bool) -> None:
        if up is not (peer in self._up):
            if up:
                self._up[peer] = None
            else:
                del self._up[peer]
            for handler in self._link_handlers:
                handler(peer, up)

    def deliver(self, peer: str, channel: int, body: bytes) -> None:
        handler: Any = self._handlers.get(channel)
        if handler is not None:
            handler(peer, body)
