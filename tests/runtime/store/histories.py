"""Keys, records and a cluster of stores with fake links, for the tests of this directory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from distroml.consensus.frames import Channel
from distroml.runtime.control import MetricRecord
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import Kind, StreamKey, encode_log, encode_metric
from distroml.runtime.store.replication import HistoryReplicator
from distroml.runtime.store.retention import HistoryLimits

JOB = "job-1"


def key(
    rank: int = 0,
    generation: int = 1,
    kind: Kind = "logs",
    job_id: str = JOB,
    run_id: str = "run-1",
) -> StreamKey:
    return StreamKey(job_id, run_id, generation, rank, kind)


def metric(step: int, at: float | None = None, **values: float) -> bytes:
    return encode_metric(
        MetricRecord(step=step, epoch=0, at=float(step) if at is None else at, values=values)
    )


def lines(start: int, end: int, at: float = 0.0) -> list[bytes]:
    return [encode_log(float(at + number), f"line {number}") for number in range(start, end)]


def content(store: HistoryStore, job_id: str = JOB) -> dict[StreamKey, tuple[int, list[bytes]]]:
    """First sequence number and all records of each stream."""
    found: dict[StreamKey, tuple[int, list[bytes]]] = {}
    for stream, (first, head) in store.spans(job_id).items():
        records: list[bytes] = []
        while first + len(records) < head:
            records += store.read(stream, first + len(records))
        found[stream] = (first, records)
    return found


class FakeLinks:
    """One node's end of a ``Wire``."""

    def __init__(self, name: str, wire: Wire) -> None:
        self.name = name
        self.wire = wire
        self.on_body: Callable[[str, bytes], None] | None = None
        self.on_change: Callable[[str, bool], None] | None = None

    def subscribe(self, channel: Channel, handler: Callable[[str, bytes], None]) -> None:
        assert channel is Channel.STORE
        self.on_body = handler

    def on_link(self, handler: Callable[[str, bool], None]) -> None:
        self.on_change = handler

    def connected(self, peer: str) -> bool:
        return self.wire.joined(self.name, peer)

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        return self.wire.post(self.name, peer, body)


class Wire:
    """Carries bodies between nodes; may lose, double and reorder them."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.ends: dict[str, FakeLinks] = {}
        self.cut: set[frozenset[str]] = set()
        self.letters: list[tuple[str, str, bytes]] = []
        self.loss = self.doubling = 0.0
        self.reorder = False

    def joined(self, one: str, other: str) -> bool:
        return one in self.ends and other in self.ends and frozenset((one, other)) not in self.cut

    def post(self, sender: str, to: str, body: bytes) -> bool:
        if not self.joined(sender, to):
            return False
        if self.random.random() >= self.loss:
            self.letters.append((sender, to, body))
            if self.random.random() < self.doubling:
                self.letters.append((sender, to, body))
        return True

    def deliver(self) -> bool:
        """Deliver one letter; False when there is none."""
        if not self.letters:
            return False
        index = self.random.randrange(len(self.letters)) if self.reorder else 0
        sender, to, body = self.letters.pop(index)
        if self.joined(sender, to):
            handler = self.ends[to].on_body
            assert handler is not None
            handler(sender, body)
        return True

    def set_link(self, one: str, other: str, up: bool) -> None:
        pair = frozenset((one, other))
        if self.joined(one, other) == up or not {one, other} <= self.ends.keys():
            return
        self.cut.discard(pair) if up else self.cut.add(pair)
        self._tell(one, other, up)

    def join(self, links: FakeLinks) -> None:
        self.ends[links.name] = links
        for other in list(self.ends):
            if other != links.name and self.joined(links.name, other):
                self._tell(links.name, other, True)

    def leave(self, name: str) -> None:
        for other in list(self.ends):
            if other != name and self.joined(name, other):
                self._tell(name, other, False)
        del self.ends[name]
        self.letters = [letter for letter in self.letters if name not in letter[:2]]

    def _tell(self, one: str, other: str, up: bool) -> None:
        for end, peer in ((one, other), (other, one)):
            if handler := self.ends[end].on_change:
                handler(peer, up)


class Cluster:
    """Nodes that replicate history over a ``Wire``, driven by hand in virtual time."""

    def __init__(
        self,
        directory: Path,
        names: str = "abc",
        seed: int = 0,
        limits: HistoryLimits | None = None,
    ) -> None:
        self.directory = directory
        self.names = list(names)
        self.limits = limits
        self.now = 0.0
        self.wire = Wire(seed)
        self.known: set[str] = {JOB}
        self.stores: dict[str, HistoryStore] = {}
        self.replicators: dict[str, HistoryReplicator] = {}
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> None:
        store = HistoryStore(self.directory / name, self.limits, clock=lambda: self.now)
        links = FakeLinks(name, self.wire)
        self.stores[name] = store
        self.replicators[name] = HistoryReplicator(
            name,
            store,
            links,
            lambda: self.names,
            lambda: self.known,
            clock=lambda: self.now,
        )
        self.wire.join(links)

    def crash(self, name: str) -> None:
        """What was accepted but not flushed is gone."""
        self.wire.leave(name)
        del self.stores[name], self.replicators[name]

    def step(self, seconds: float = 0.1, deliveries: int = 10_000) -> None:
        self.now += seconds
        for store in self.stores.values():
            store.flush()
        for replicator in self.replicators.values():
            replicator.tick()
        while deliveries and self.wire.deliver():
            deliveries -= 1

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def run_until(self, condition: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
        end = self.now + limit_s
        while not condition():
            assert self.now < end, f"{limit_s} virtual seconds passed without: {what}"
            self.step()


def originate(cluster: Cluster, name: str, stream: StreamKey, count: int) -> None:
    """A node records so many lines more of a stream."""
    store = cluster.stores[name]
    start = store.next_seq(stream)
    store.append(stream, start, lines(start, start + count))
