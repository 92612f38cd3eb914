"""Nodes with the ends of barriers, and a network between them that the test plays: nothing moves by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from distroml import commands as c
from distroml.consensus.frames import Channel
from distroml.consensus.state import ClusterState
from distroml.runtime import control
from distroml.runtime.barrier import ASK_S, Barrier, RunGeneration
from distroml.runtime.barrier_wire import BarrierWire
from tests.builders import Log, fail, form, members, node, submit

Rank = tuple[int, int, str]
"""Generation, rank, name of the barrier."""


def generation(number: int = 1) -> RunGeneration:
    return RunGeneration("job", "run-job", number)


def barrier(name: str = "step/1", number: int = 1) -> Barrier:
    return Barrier(generation(number), name)


@dataclass
class End:
    """One node: what it believes, and its wire."""

    name: str
    state: ClusterState
    leader: str | None
    wire: BarrierWire = field(init=False)


class World:
    """Ranks of one job on nodes; ``layout`` names the node of each rank.

    Needs a running event loop, whose timers never get to run: the test repeats.
    """

    def __init__(self, layout: list[str], *others: str) -> None:
        self.layout = layout
        log = Log()
        names = sorted({*layout, *others})
        for name in names:
            log.ok(node(name, slots=len(layout)))
        log.ok(submit("job", workers=len(layout)))
        log.ok(form("job", 1, members(*layout)))
        self.states = [log.state]
        log.ok(fail("job", 1))
        log.ok(form("job", 2, members(*reversed(layout))))
        self.states.append(log.state)
        self.now_s = 0.0
        self.frames: list[tuple[str, str, bytes]] = []
        """From, to, body; any of them may be delivered next."""
        self.arrived: dict[Rank, int] = {}
        self.released: dict[Rank, int] = {}
        self.awaited: dict[tuple[str, str], tuple[int, ...]] = {}
        """Whom ranks of a node, at the barrier of that name, last heard to be missing."""
        self.ends = {name: self.make(name) for name in names}

    def make(self, name: str) -> End:
        """A node that knows nothing of barriers."""
        end = End(name, self.states[0], leader=self.layout[0])
        end.wire = BarrierWire(
            node=name,
            links=_Links(self, name),
            raft=end,
            state=lambda: end.state,
            told=lambda *news: self._on_news(name, *news),
            monotonic=lambda: self.now_s,
        )
        return end

    def host(self, rank: int, number: int) -> str:
        return (self.layout if number == 1 else self.layout[::-1])[rank]

    def arrive(self, rank: int, value: int = 0, name: str = "step/1", number: int = 1) -> None:
        end = self.ends[self.host(rank, number)]
        if number == 2:
            self.catch_up(end.name)  # its agent has started it
        self.arrived.setdefault((number, rank, name), value)
        end.wire.arrive(barrier(name, number), rank, value)

    def catch_up(self, name: str) -> None:
        """The node applies the next generation."""
        self.ends[name].state = self.states[1]
        self.ends[name].wire.on_applied()

    def plan_next(self) -> None:
        """Everybody learns that generation 2 is to relieve generation 1, which trains on till then."""
        log = Log()
        for name in self.ends:
            log.ok(node(name, slots=2 * len(self.layout)))
        log.ok(submit("job", workers=len(self.layout)))
        log.ok(form("job", 1, members(*self.layout)))
        log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=9))
        log.ok(form("job", 2, members(*reversed(self.layout)), planned=True))
        planned = log.state
        log.ok(c.MarkRunning(job_id="job", generation=2, total_steps=9))
        self.states = [planned, log.state]
        for end in self.ends.values():
            end.state = planned
            end.wire.on_applied()

    def take_over(self) -> None:
        """Generation 2 trains."""
        for name in self.ends:
            self.catch_up(name)

    def follow(self, name: str, leader: str | None) -> None:
        self.ends[name].leader = leader
        self.ends[name].wire.on_leader_change()

    def deliver(self, index: int = 0, *, again: bool = False) -> None:
        """One of the frames on their way, by any order; ``again``: and it stays on its way."""
        sender, to, body = self.frames[index] if again else self.frames.pop(index)
        self.ends[to].wire.on_frame(sender, body)

    def settle(self, rounds: int = 4) -> None:
        """All agents repeat and all frames arrive, for a while."""
        for _ in range(rounds):
            self.now_s += ASK_S
            for end in self.ends.values():
                end.wire.on_leader_change()
            while self.frames:
                self.deliver()

    def may_go_on(self, number: int, name: str) -> bool:
        return all((number, rank, name) in self.arrived for rank in range(len(self.layout)))

    def largest(self, number: int, name: str) -> int:
        return max(self.arrived[number, rank, name] for rank in range(len(self.layout)))

    def _on_news(
        self,
        node: str,
        of: RunGeneration,
        ranks: tuple[int, ...],
        news: control.Released | control.Awaited,
    ) -> None:
        name, number = news.name, of.number
        assert news.generation == number
        assert all((number, rank, name) in self.arrived for rank in ranks)
        if isinstance(news, control.Awaited):
            self.awaited[node, name] = news.missing
            return
        assert self.may_go_on(number, name), f"{name} was released before all ranks were there"
        assert news.value == self.largest(number, name)
        for rank in ranks:
            self.released[number, rank, name] = news.value


class _Links:
    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        assert channel is Channel.BARRIER
        assert peer != self._name
        self._world.frames.append((self._name, peer, body))
        return True
