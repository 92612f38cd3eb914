"""The newest report of each node counts, whatever order, whoever sends, whatever the bytes."""

from __future__ import annotations

import msgspec
import pytest

from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime import observations as module
from distroml.runtime.observations import NOTHING, Observations


class World:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.seen = Observations(name="a", monotonic=lambda: self.now_s)

    def hears(self, name: str, incarnation: int, sequence: int, peer: str = "") -> bool:
        body = msgspec.msgpack.encode(report(name, incarnation, sequence))
        return bool(self.seen.receive(peer or name, body).reports)

    def newest(self, name: str) -> tuple[int, int]:
        found = self.seen.report(name)
        assert found is not None
        return found.incarnation, found.sequence


def report(name: str, incarnation: int, sequence: int) -> NodeReport:
    return NodeReport(node=name, incarnation=incarnation, sequence=sequence, at=0.0, slots=1)


@pytest.fixture
def world() -> World:
    return World()


def test_a_newer_report_replaces_an_older_one_and_never_the_other_way(world: World) -> None:
    assert world.hears("b", 1, 5)
    assert not world.hears("b", 1, 5), "the same one again"
    assert not world.hears("b", 1, 4), "one that was overtaken"
    assert world.hears("b", 2, 1), "the next life counts from 1 again"
    assert not world.hears("b", 1, 99), "a late word of the former life"
    assert world.newest("b") == (2, 1)


def test_an_old_report_does_not_make_a_node_look_alive(world: World) -> None:
    world.hears("b", 2, 1)
    world.now_s += 9
    world.hears("b", 1, 99)
    assert world.seen.observations({"b": 2})["b"].last_heard_s == 100.0
    assert world.seen.age_s("b", world.now_s) == 9.0


def test_nobody_speaks_for_another(world: World) -> None:
    assert not world.hears("b", 1, 1, peer="c")
    assert world.seen.report("b") is None
    assert world.seen.refused == 1


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x91" * 100_000, b"\xa1\xff"])
def test_bytes_that_are_no_report_are_refused_and_counted(world: World, body: bytes) -> None:
    assert world.seen.receive("b", body) == NOTHING
    assert world.seen.refused == 1


class TestManyNodes:
    """With room for three, of which one is the node's own."""

    @pytest.fixture(autouse=True)
    def _small(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_NODES", 3)
        assert world.seen.take(report("a", 1, 1))

    def _known(self, world: World) -> set[str]:
        return set(world.seen.view())

    def test_nobody_who_is_connected_makes_room(self, world: World) -> None:
        for name in "bcd":
            world.seen.link(name, True)
        assert [world.hears(name, 1, 1) for name in "bcd"] == [True, True, False]
        assert world.seen.refused == 1
        assert world.hears("b", 1, 2), "those known go on"

    def test_who_was_unheard_for_longest_makes_room(self, world: World) -> None:
        for name in "cb":
            world.seen.link(name, True)
            world.hears(name, 1, 1)
            world.now_s += 1
        for name in "bc":
            world.seen.link(name, False)
        assert world.hears("d", 1, 1)
        assert self._known(world) == {"a", "b", "d"}
        world.seen.link("c", True)
        assert world.hears("c", 1, 2), "and who comes back is heard as any other"
        assert self._known(world) == {"a", "c", "d"}

    def test_any_number_of_names_can_come_and_go(self, world: World) -> None:
        for number in range(20):
            name = f"pod-{number}"
            world.seen.link(name, True)
            assert world.hears(name, 1, 1)
            world.seen.link(name, False)
            world.seen.link(f"mute-{number}", False)
        assert "a" in self._known(world)
        assert world.seen.take(report("a", 1, 2)), "its own reports always count"
        assert len(world.seen._heard) <= 3
        assert len(world.seen._down_since_s) <= 3

    def test_who_is_registered_no_more_is_forgotten(self, world: World) -> None:
        for name in "bc":
            world.hears(name, 1, 1)
            world.seen.link(name, False)
        world.seen.registered({"b": 1})
        assert self._known(world) == {"a", "b", "c"}, "c may be about to register"
        world.seen.registered({"b": 1, "c": 1})
        world.seen.registered({"c": 1})
        assert self._known(world) == {"a", "c"}
        assert set(world.seen._down_since_s) == {"c"}


def test_a_connection_is_down_since_it_was_first_seen_so(world: World) -> None:
    world.seen.link("b", True)
    world.hears("b", 1, 1)
    world.now_s = 110.0
    world.seen.link("b", False)
    world.now_s = 120.0
    world.seen.link("b", False)
    seen = world.seen.observations({"b": 1})["b"]
    assert (seen.connected, seen.down_since_s) == (False, 110.0)
    assert not world.seen.view()["b"].connected
    world.seen.link("b", True)
    seen = world.seen.observations({"b": 1})["b"]
    assert (seen.connected, seen.down_since_s) == (True, None)


def test_a_node_that_never_spoke_has_its_registered_incarnation(world: World) -> None:
    seen = world.seen.observations({"b": 7})["b"]
    assert (seen.incarnation, seen.last_heard_s) == (7, None)
    assert world.seen.age_s("b", world.now_s) == 0.0


def test_a_node_is_connected_to_itself(world: World) -> None:
    assert world.seen.take(report("a", 1, 1))
    assert world.seen.view()["a"].connected


WORKER = WorkerFact(job_id="j", run_id="r", generation=1, rank=0, phase=WorkerPhase.TRAINING)


def news(before: NodeReport, after: NodeReport) -> bool:
    """Whether the second of two reports is news."""
    seen = Observations(name="a", monotonic=lambda: 0.0)
    assert seen.receive("b", msgspec.msgpack.encode(before)).news, "the first word always is"
    later = msgspec.structs.replace(after, sequence=before.sequence + 1)
    return seen.receive("b", msgspec.msgpack.encode(later)).news


@pytest.mark.parametrize(
    "change",
    [
        {"phase": WorkerPhase.FAILED},
        {"pid": 7},
        {"exit_code": -9},
        {"generation": 2},
        {"abandoned": ((5, "disk full"),)},
    ],
)
def test_a_workers_change_is_news_and_a_step_is_not(change: dict[str, object]) -> None:
    before = msgspec.structs.replace(report("b", 1, 1), workers=(WORKER,))
    step = msgspec.structs.replace(WORKER, step=9, epoch=1)
    assert not news(before, msgspec.structs.replace(before, workers=(step,)))
    changed = msgspec.structs.replace(step, **change)
    assert news(before, msgspec.structs.replace(before, workers=(changed,)))
    assert news(before, msgspec.structs.replace(before, workers=()))


@pytest.mark.parametrize(
    "change",
    [{"incarnation": 2}, {"slots": 2}, {"applied_index": 9}, {"draining": True}, {"ready": False}],
)
def test_a_nodes_change_is_news(change: dict[str, object]) -> None:
    before = report("b", 1, 1)
    assert not news(before, msgspec.structs.replace(before, at=9.0, memory_bytes=1))
    assert news(before, msgspec.structs.replace(before, **change))
