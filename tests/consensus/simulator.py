"""A deterministic cluster of `RaftCore`s: virtual clock, modelled network and disk, no sockets.

One seed gives one run. `Cluster` checks the invariants of Raft after every turn and collects what it
finds in `violations`. Directed tests drive it by hand; `nemesis.Nemesis` injects random faults.
"""

from __future__ import annotations

import heapq
import itertools
import random
import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from distroml.consensus.messages import Message, decode, encode
from distroml.consensus.raft_core import RaftCore, Turn
from distroml.consensus.raft_log import (
    AppendRecords,
    DiskOp,
    LogImage,
    RewriteLog,
    StoreSnapshot,
    apply_record,
    blank_image,
)
from distroml.consensus.raft_types import RaftSettings, Role
from distroml.consensus.snapshot import Snapshot
from distroml.consensus.storage import Recovered, join

START_S = 1_000.0


class Ledger:
    """A state machine that remembers each operation once, in order."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.known: set[bytes] = set()
        self.chain = 0
        self.on_apply: Callable[[int, bytes], None] = lambda _index, _entry: None

    def apply(self, index: int, entry: bytes) -> None:
        if entry not in self.known:
            self.known.add(entry)
            self.entries.append(entry)
            self.chain = zlib.crc32(entry, self.chain)
        self.on_apply(index, entry)

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode((self.entries, self.chain))

    def restore(self, index: int, blob: bytes) -> None:
        self.entries, self.chain = msgspec.msgpack.decode(blob, type=tuple[list[bytes], int])
        self.known = set(self.entries)


class SimDisk:
    """What survives a crash: the operations that were performed, each of them atomic."""

    def __init__(self) -> None:
        self.image: LogImage | None = None
        self.snapshot: Snapshot | None = None

    def perform(self, op: DiskOp) -> None:
        match op:
            case AppendRecords():
                assert self.image is not None
                for record in op.records:
                    apply_record(self.image, record)
            case StoreSnapshot():
                self.snapshot = op.snapshot
            case RewriteLog():
                self.image = op.image.copy()

    def recover(self) -> Recovered:
        if self.image is None:
            self.image = blank_image()
        self.image = join(self.image, self.snapshot, "disk").copy()
        return Recovered(self.image.copy(), self.snapshot, [])


class SimNode:
    """One life of one node."""

    def __init__(self, cluster: Cluster, name: str, disk: SimDisk) -> None:
        self.cluster, self.name, self.disk = cluster, name, disk
        self.ledger = Ledger()
        self.core = RaftCore(
            name=name,
            voters=tuple(cluster.names),
            settings=cluster.settings,
            machine=self.ledger,
            recovered=disk.recover(),
            clock=lambda: cluster.now,
            rng=random.Random(cluster.rng.getrandbits(64)),
        )
        self.ledger.on_apply = self._applied
        self.inputs: list[Callable[[], object]] = []
        self.busy_until = 0.0
        self.alive = True
        self.seen_commit = self.core.raft.commit_index
        self.seen_term = self.core.raft.term
        self.led_term = 0
        self.turns = 0
        self.awake = False

    @property
    def raft(self) -> Any:
        return self.core.raft

    def _applied(self, index: int, entry: bytes) -> None:
        self.cluster.check_applied(self, index, entry)


class Cluster:
    def __init__(
        self,
        seed: int,
        size: int = 3,
        *,
        settings: RaftSettings | None = None,
        lossy: bool = False,
        disk_delay_s: float = 0.0005,
        start: bool = True,
    ) -> None:
        self.rng = random.Random(seed)
        self.settings = settings or RaftSettings()
        self.lossy = lossy
        self.disk_delay_s = disk_delay_s
        self.now = START_S
        self.names = [f"n{place}" for place in range(size)]
        self.disks = {name: SimDisk() for name in self.names}
        self.nodes: dict[str, SimNode] = {}
        self.cut: set[tuple[str, str]] = set()
        self.linked: dict[tuple[str, str], int] = {}
        self.violations: list[str] = []
        self.messages: list[tuple[str, str, Message]] = []
        self.trace: Callable[[str, str, Message], bool] = lambda _src, _dst, _message: True
        """Decides on each message that is about to be sent; False drops it."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._fifo: dict[tuple[str, str], float] = {}
        self._epochs = itertools.count(1)
        self.applied: dict[int, bytes] = {}
        self.entries: dict[tuple[int, int], bytes] = {}
        self.committed: dict[int, tuple[bytes, int, int]] = {}
        self.leaders: dict[int, str] = {}
        self.acked: dict[bytes, int] = {}
        self.pending: dict[bytes, str] = {}
        self.reads = 0
        self._tokens = itertools.count(1)
        self._open_reads: dict[tuple[str, int], int] = {}
        if start:
            for name in self.names:
                self.boot(name)

    # ------------------------------------------------------------------ events

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), action))

    def run(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], limit_s: float = 10.0) -> bool:
        """Runs events until `condition`; False if `limit_s` of virtual time passed first."""
        end = self.now + limit_s
        while not self.violations:
            if condition():
                return True
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return condition()
            self.now, _, action = heapq.heappop(self._queue)
            action()
        raise AssertionError(f"at {self.now - START_S:.3f} s: {self.violations}")

    # ------------------------------------------------------------------ nodes

    def boot(self, name: str) -> SimNode:
        node = self.nodes[name] = SimNode(self, name, self.disks[name])
        for other in self.names:
            if other != name and other in self.nodes:
                self.connect(name, other)
        self.wake(node)
        return node

    def kill(self, name: str) -> None:
        """The node dies now; its peers see the connection break."""
        node = self.nodes.pop(name)
        node.alive = False
        for other in self.names:
            if other != name:
                self.disconnect(name, other)

    def wipe(self, name: str) -> None:
        self.disks[name] = SimDisk()

    def leader(self) -> SimNode | None:
        leaders = [n for n in self.nodes.values() if n.core.role is Role.LEADER]
        return max(leaders, key=lambda n: n.raft.term, default=None)

    def elect(self, limit_s: float = 5.0) -> SimNode:
        """Runs until one node leads and has committed an entry of its own term."""

        def settled() -> bool:
            leader = self.leader()
            return leader is not None and leader.raft.commit_index >= (leader.raft.noop_index or 0)

        assert self.run_until(settled, limit_s), "no leader was elected in time"
        leader = self.leader()
        assert leader is not None
        return leader

    def give(self, node: SimNode, action: Callable[[], object]) -> None:
        node.inputs.append(action)
        self.wake(node)

    def wake(self, node: SimNode) -> None:
        if not node.awake:
            node.awake = True
            self.later(max(0.0, node.busy_until - self.now), lambda: self._turn(node))

    def _turn(self, node: SimNode) -> None:
        if not node.alive:
            return
        node.awake = False
        if self.now < node.busy_until:
            self.wake(node)
            return
        node.core.begin()
        inputs, node.inputs = node.inputs, []
        for action in inputs:
            action()
        turn = node.core.finish_turn()
        node.turns += 1
        self.check(node)
        self._answer(node, turn)
        delay_s = self.rng.uniform(0.5, 2.0) * self.disk_delay_s if turn.disk else 0.0
        node.busy_until = self.now + delay_s
        for peer, message in turn.early:
            self.send(node.name, peer, message)
        self.later(delay_s, lambda: self._finish(node, turn))
        self._perform(node, turn)

    def _perform(self, node: SimNode, turn: Turn) -> None:
        """Spreads the turn's operations over its disk time: a crash finds any prefix of them."""
        for place, op in enumerate(turn.disk):
            share = (place + self.rng.random()) / len(turn.disk)
            delay_s = share * (node.busy_until - self.now)

            def perform(op: DiskOp = op) -> None:
                if node.alive:
                    node.disk.perform(op)

            self.later(delay_s, perform)

    def _finish(self, node: SimNode, turn: Turn) -> None:
        if not node.alive:
            return
        for peer, message in turn.messages:
            self.send(node.name, peer, message)
        if turn.again or node.inputs:
            self.wake(node)
        number = node.turns
        delay_s = max(1e-6, turn.wake_at - self.now)
        self.later(delay_s, lambda: self._turn(node) if node.turns == number else None)

    # ------------------------------------------------------------------ network

    def connect(self, one: str, other: str) -> None:
        if (one, other) in self.cut or (other, one) in self.cut:
            return
        epoch = next(self._epochs)
        for source, target in ((one, other), (other, one)):
            if (source, target) not in self.linked:
                self.linked[source, target] = epoch
                node = self.nodes[source]
                self.give(node, lambda node=node, peer=target: node.core.set_link(peer, True))

    def disconnect(self, one: str, other: str) -> None:
        for source, target in ((one, other), (other, one)):
            if self.linked.pop((source, target), None) is not None and source in self.nodes:
                node = self.nodes[source]
                self.give(node, lambda node=node, peer=target: node.core.set_link(peer, False))

    def isolate(self, *names: str) -> None:
        """Cuts `names` off from all others, with their connections reset."""
        for one in names:
            for other in self.names:
                if other not in names:
                    self.cut |= {(one, other), (other, one)}
                    self.disconnect(one, other)

    def heal(self) -> None:
        self.cut.clear()
        for one, other in itertools.combinations(self.names, 2):
            if one in self.nodes and other in self.nodes:
                self.connect(one, other)

    def send(self, source: str, target: str, message: Message) -> None:
        message = decode(encode(message))
        if not self.trace(source, target, message):
            return
        epoch = self.linked.get((source, target))
        if epoch is None or (source, target) in self.cut:
            return
        rng = self.rng
        if not self.lossy:
            arrival = self.now + rng.uniform(0.0001, 0.002) * (20 if rng.random() < 0.01 else 1)
            arrival = max(arrival, self._fifo.get((source, target), 0.0))
            self._fifo[source, target] = arrival
            self.later(arrival - self.now, lambda: self._deliver(source, target, message, epoch))
            return
        if rng.random() < 0.02:
            return
        for _ in range(2 if rng.random() < 0.05 else 1):
            delay_s = rng.uniform(0.05, 2.5) if rng.random() < 0.05 else rng.uniform(0.0002, 0.01)
            self.later(delay_s, lambda: self._deliver(source, target, message, None))

    def _deliver(self, source: str, target: str, message: Message, epoch: int | None) -> None:
        node = self.nodes.get(target)
        if node is None or (source, target) in self.cut:
            return
        if epoch is not None and self.linked.get((source, target)) != epoch:
            return
        self.give(node, lambda: node.core.receive(source, message))

    # ------------------------------------------------------------------ clients

    def submit(self, entry: bytes, name: str | None = None) -> bool:
        """Gives an entry to the leader, or to `name`; acknowledged when that very node applies it."""
        node = self.leader() if name is None else self.nodes.get(name)
        if node is None or node.core.role is not Role.LEADER:
            return False
        self.pending[entry] = node.name
        self.give(node, lambda: node.core.submit(entry))
        return True

    def read(self, name: str) -> None:
        """A linearizable read: its index must cover all that was acknowledged before."""
        node, token = self.nodes[name], next(self._tokens)
        self._open_reads[name, token] = max(self.acked.values(), default=0)
        self.give(node, lambda: node.core.request_read(token))

    def _answer(self, node: SimNode, turn: Turn) -> None:
        for token, index in turn.reads:
            floor = self._open_reads.pop((node.name, token), 0)
            if index:
                self.reads += 1
                if index < floor:
                    self.violations.append(f"stale read on {node.name}: {index} < {floor}")

    # ------------------------------------------------------------------ invariants

    def check_applied(self, node: SimNode, index: int, entry: bytes) -> None:
        known = self.applied.setdefault(index, entry)
        if known != entry:
            self.violations.append(f"state machine safety: {node.name} at {index}")
        if self.pending.get(entry) == node.name:
            self.acked.setdefault(entry, index)

    def check(self, node: SimNode) -> None:
        raft, name = node.raft, node.name
        entries = raft.log.entries
        for command, index, term in entries[-64:]:
            if (
                index > raft.log.anchor_index
                and self.entries.setdefault((index, term), command) != command
            ):
                self.violations.append(f"log matching: {name} at {index}/{term}")
        if raft.term < node.seen_term or raft.commit_index < node.seen_commit:
            self.violations.append(f"{name}: term or commit index went back")
        if raft.commit_index > raft.log.last_index or raft.applied_index > raft.commit_index:
            self.violations.append(f"{name}: applied <= committed <= log end does not hold")
        first = max(node.seen_commit, raft.log.anchor_index) + 1
        for index in range(first, raft.commit_index + 1):
            command, _, term = entries[index - raft.log.anchor_index]
            known = self.committed.setdefault(index, (command, term, raft.term))
            if known[:2] != (command, term):
                self.violations.append(f"commit differs: {name} at {index}")
        node.seen_term, node.seen_commit = raft.term, raft.commit_index
        if node.core.role is Role.LEADER and node.led_term != raft.term:
            node.led_term = raft.term
            if self.leaders.setdefault(raft.term, name) != name:
                self.violations.append(f"two leaders of term {raft.term}")
            self._check_completeness(node)

    def _check_completeness(self, node: SimNode) -> None:
        raft = node.raft
        for index, (command, term, seen_in) in self.committed.items():
            if seen_in >= raft.term or index <= raft.log.anchor_index:
                continue
            position = index - raft.log.anchor_index
            entries = raft.log.entries
            if position >= len(entries) or (entries[position][0], entries[position][2]) != (
                command,
                term,
            ):
                self.violations.append(f"leader {node.name} lacks committed entry {index}")
                return

    def check_converged(self) -> None:
        """All nodes hold the same state, and in it every acknowledged entry exactly once."""
        chains = {node.ledger.chain for node in self.nodes.values()}
        assert len(self.nodes) == len(self.names), "a node is down"
        assert len(chains) == 1, {n.name: n.raft.applied_index for n in self.nodes.values()}
        for node in self.nodes.values():
            lost = [entry for entry in self.acked if entry not in node.ledger.known]
            assert not lost, f"{node.name} lost {len(lost)} acknowledged entries: {lost[:3]}"
            assert len(node.ledger.entries) == len(node.ledger.known)
