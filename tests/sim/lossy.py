"""A worse network than TCP, in place of `PeerLinks`: frames are dropped, repeated and overtake each other.

What links promise even so, and what the core relies on: a frame of one process never reaches, or comes from,
a later life of either end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from distroml.consensus.frames import Channel, LinkLimits
from tests.sim.loop import NodeLoop
from tests.sim.streams import Cuts
from tests.sim.world import World

RECONNECT_S = 0.2


class Lossy:
    """All links of a cluster."""

    def __init__(
        self,
        world: World,
        cuts: Cuts,
        voters: Iterable[str],
        *,
        drop: float,
        repeat: float,
        late: float,
    ) -> None:
        self.world, self.cuts = world, cuts
        self.drop, self.repeat, self.late = drop, repeat, late
        self._voters = frozenset(voters)
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
            if links.name not in self._voters and other not in self._voters:
                continue  # learners have no links among themselves
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

    def send(self, source: LossyLinks, target: str, channel: int, body: bytes) -> None:
        receiver, cuts, random = self.links.get(target), self.cuts, self.rng.random
        if receiver is None or random() < self.drop:
            return
        if cuts and (source.name, target) in cuts:
            return
        at = self.world.now
        if cuts.slow_s:
            at += cuts.slow_s.get((source.name, target), 0.0)
        for _ in range(2 if random() < self.repeat else 1):
            late = random() < self.late
            delay_s = 0.05 + 2.45 * random() if late else 0.0002 + 0.0098 * random()
            receiver.loop.enter_at(at + delay_s, self._arrive, source, receiver, channel, body)

    def _arrive(self, source: LossyLinks, receiver: LossyLinks, channel: int, body: bytes) -> None:
        """A frame reaches the receiving process, in whose loop this runs."""
        cuts = self.cuts
        if source.loop.dead or (cuts and (source.name, receiver.name) in cuts):
            return
        self.world.note(2, len(body), receiver.mark ^ source.mark << 32)
        receiver.deliver(source.name, channel, body)


class LossyLinks:
    """What `RaftNode` and `Proposer` use of `PeerLinks`."""

    def __init__(self, lossy: Lossy, loop: NodeLoop, name: str, cluster_id: str) -> None:
        self.name, self.cluster_id, self.loop = name, cluster_id, loop
        self.mark = int.from_bytes(name.encode()[-4:], "little")
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
        if peer not in self._up:
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
