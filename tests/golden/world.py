"""The cores of one script, their clocks, disks and the messages between them. Nothing moves by itself.

Each node has its own clock, which only `tick` moves, and draws the middle of each random range unless the script
says otherwise. Its disk is as good as its word: a turn's operations are durable before its messages leave. What is
sent lies in flight until the script delivers, drops, repeats or holds it. Every turn is checked by the simulator's
invariants (`tests.sim.invariants`), so that no expectation can bless what Raft forbids.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from distroml.consensus.messages import Message, decode, encode
from distroml.consensus.raft_core import RaftCore, Turn
from distroml.consensus.raft_log import LogImage, RewriteLog
from distroml.consensus.raft_types import ConsensusError, RaftSettings, SafetyViolation
from tests.consensus.ledger import Ledger
from tests.golden import wording
from tests.golden.disk import Disk
from tests.sim.invariants import Checker

START_S: Final = 100.0
TURNS: Final = 100
"""Turns without input that one input may cause, at most."""
DELIVERIES: Final = 500
"""Messages that one `settle` may deliver, at most."""


class Violated(AssertionError):
    """An invariant of Raft does not hold, whatever the script expects."""


class _Draws(random.Random):
    """Every random number is `share` of its range."""

    share = 0.5
    life = 0

    def random(self) -> float:
        return self.share

    def getrandbits(self, _bits: int) -> int:
        return self.life  # nonces: in the order in which nodes first start


class Node:
    """One life of one node."""

    def __init__(self, world: World, name: str, disk: Disk) -> None:
        self.name, self.disk, self.life = name, disk, name
        self.now = START_S
        self.draws = _Draws(0)
        self.draws.life = world.lives
        self.ledger = Ledger()
        self.applied: list[str] = []
        self.core = RaftCore(
            name=name,
            voters=tuple(world.voters),
            settings=world.settings,
            machine=self.ledger,
            recovered=disk.recover(),
            clock=lambda: self.now,
            rng=self.draws,
        )
        self.ledger.on_apply = self._note
        self.last: Turn | None = None
        self.seen: Any = None
        self.started = True
        self.learns = name in world.learners

    @property
    def log(self) -> Any:
        return self.core.raft.log

    def _note(self, index: int, data: bytes) -> None:
        self.applied.append(f'{index} "{data.decode()}"')


class World:
    def __init__(self) -> None:
        self.voters: list[str] = []
        self.learners: list[str] = []
        self.settings = RaftSettings()
        self.disks: dict[str, Disk] = {}
        self.nodes: dict[str, Node] = {}
        """Those that run."""
        self.linked: set[tuple[str, str]] = set()
        """Pairs in name order."""
        self.cut: set[tuple[str, str]] = set()
        self.flight: list[tuple[str, str, Message]] = []
        """In the order of sending."""
        self.held: list[tuple[str, str, Message]] = []
        self.reads = 0
        self.lives = 0
        self.world = self  # what the checker expects of a cluster
        self.checker = Checker(self)  # type: ignore[arg-type]
        self.story: list[str] = []
        """What the command at hand has caused, as text."""

    # ------------------------------------------------------------------ what the checker calls

    @property
    def processes(self) -> dict[str, Node]:
        return self.nodes

    def violate(self, what: str) -> None:
        raise Violated(what)

    def note(self, *_: object) -> None: ...

    # ------------------------------------------------------------------ lives

    def found(self, voters: list[str], learners: list[str], settings: RaftSettings) -> None:
        self.voters, self.learners, self.settings = voters, learners, settings
        self.disks = {name: Disk() for name in (*voters, *learners)}

    def give(self, name: str, image: LogImage) -> None:
        """The node's disk holds this log before the script begins."""
        self.disks[name].perform(RewriteLog(image))
        self.checker.given(name, image)

    def start(self, name: str) -> None:
        node = self.nodes[name] = Node(self, name, self.disks[name])
        self.checker.started(node)  # type: ignore[arg-type]
        self.lives += 1
        view = wording.View(node.core)
        self.story.append(f"{name} starts as {view.role_line()}, log {view.log_line()}")
        self.turn(node, lambda: None)
        for other in sorted(self.nodes):
            if other != name:
                self.link(name, other)

    def crash(self, name: str) -> None:
        for other in sorted(self.nodes):
            if other != name:
                self.unlink(name, other, told=(other,))
        del self.nodes[name]

    def wipe(self, name: str) -> None:
        self.disks[name] = Disk()
        self.checker.wiped(name)

    # ------------------------------------------------------------------ turns

    def turn(self, node: Node, action: Callable[[], object]) -> None:
        """One input, and the turns that it makes necessary, with all they cause."""
        for _ in range(TURNS):
            before = wording.View(node.core)
            try:
                node.core.begin()
                action()
                turn = node.last = node.core.finish_turn()
            except SafetyViolation as error:
                raise Violated(f"{node.name} stopped itself: {error}") from error
            except ConsensusError:
                raise  # a refusal
            except Exception as error:
                raise Violated(f"{node.name} broke: {error!r}") from error
            self._perform(node, turn)
            self.checker.after_turn(node, turn)  # type: ignore[arg-type]
            self._show_what_leaves(node, turn)
            self._tell(node, before, turn)
            if not turn.again:
                return
            action = lambda: None  # noqa: E731
        raise Violated(f"{node.name} wants turn after turn, more than {TURNS}")

    def _perform(self, node: Node, turn: Turn) -> None:
        for op in turn.disk:
            node.disk.perform(op)

    def _show_what_leaves(self, node: Node, turn: Turn) -> None:
        for peer, message in (*turn.early, *turn.messages):
            self.checker.speaks(node)  # type: ignore[arg-type]
            self.checker.tells(node, peer, message)  # type: ignore[arg-type]

    def _tell(self, node: Node, before: wording.View, turn: Turn) -> None:
        lines = wording.changes(before, wording.View(node.core))
        if node.applied:
            lines.append(f"applies {', '.join(node.applied)}")
            node.applied.clear()
        for token, index in turn.reads:
            lines.append(f"answers read {token} at {index}" if index else f"refuses read {token}")
        self.story += [f"  {node.name} {line}" for line in lines]
        for peer, message in (*turn.early, *turn.messages):
            self.story.append(f"  {node.name} -> {peer}: {wording.message(message)}")
            if self.reachable(node.name, peer):
                self.flight.append((node.name, peer, decode(encode(message))))

    def tick(self, node: Node, seconds: float) -> None:
        """The node's clock moves on; it has its turns when it asked for them, and one at the end."""
        end = node.now + seconds
        assert node.last is not None
        while node.now < end:
            node.now = min(end, max(node.now + 1e-4, node.last.wake_at))
            told = len(self.story)
            self.turn(node, lambda: None)
            if len(self.story) > told and self.story[told].startswith("  "):
                at_ms = (node.now - end + seconds) * 1000
                self.story.insert(told, f"after {at_ms:.0f} ms")

    # ------------------------------------------------------------------ network

    def reachable(self, source: str, target: str) -> bool:
        return _pair(source, target) in self.linked

    def link(self, one: str, other: str) -> None:
        pair = _pair(one, other)
        both_learn = one in self.learners and other in self.learners
        if pair in self.cut or pair in self.linked or both_learn:
            return
        self.linked.add(pair)
        for name, peer in (pair, pair[::-1]):
            node = self.nodes[name]
            self.turn(node, lambda node=node, peer=peer: node.core.set_link(peer, True))

    def unlink(self, one: str, other: str, told: tuple[str, ...]) -> None:
        """The connection breaks: what was in flight is lost, and those `told` notice."""
        pair = _pair(one, other)
        if pair not in self.linked:
            return
        self.linked.discard(pair)
        self.flight = [item for item in self.flight if _pair(*item[:2]) != pair]
        for name, peer in (pair, pair[::-1]):
            if name in told:
                node = self.nodes[name]
                self.turn(node, lambda node=node, peer=peer: node.core.set_link(peer, False))

    def deliver(self, source: str, target: str, message: Message) -> None:
        node = self.nodes[target]
        self.story.append(f"{target} gets from {source}: {wording.message(message)}")
        self.turn(node, lambda: node.core.receive(source, message))

    def settle(self) -> None:
        """Delivers everything, and what that causes, in the order of sending."""
        for _ in range(DELIVERIES):
            if not self.flight:
                return
            self.deliver(*self.flight.pop(0))
        raise Violated(f"the network does not come to rest within {DELIVERIES} messages")


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)
