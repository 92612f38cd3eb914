"""Barriers: whatever is lost, repeated or led by whomever, all ranks go on once all have arrived, and never before."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus.state import ClusterState
from distroml.runtime import barrier as module
from distroml.runtime import barrier_wire as wire_module
from distroml.runtime.barrier import ASK_S, MAX_GATHERED, MAX_OPEN, Arrived, NotTaken, Released
from tests.consensus.live import until
from tests.runtime.barrier_world import World, barrier

NAMES = ("drain", "step/1")


@pytest.fixture
async def world() -> World:
    """Ranks 0 and 1 on x, 2 on y; node v leads."""
    world = World(["x", "x", "y"], "v")
    for name in world.ends:
        world.follow(name, "v")
    return world


async def test_an_agent_speaks_once_all_its_ranks_are_there_and_hears_once(world: World) -> None:
    world.arrive(0, 5)
    assert world.frames == [], "the leader could do nothing with half of x's ranks"
    world.arrive(1, 7)
    world.arrive(2, 6)
    assert [(sender, to) for sender, to, _ in world.frames] == [("x", "v"), ("y", "v")]
    world.deliver()
    world.deliver()
    assert world.released == {}
    assert sorted((sender, to) for sender, to, _ in world.frames) == [("v", "x"), ("v", "y")]
    world.deliver()
    world.deliver()
    assert world.released == {(1, rank, "step/1"): 7 for rank in range(3)}
    assert world.frames == []


async def test_repeats_tell_a_leader_who_is_missing(world: World) -> None:
    world.arrive(0)
    world.settle()
    assert world.ends["v"].wire.missing() == {barrier(): (1, 2)}
    assert world.ends["v"].wire.counters["asks"] > 0


async def test_agents_that_repeat_hear_who_is_missing(world: World) -> None:
    world.arrive(2)
    world.deliver()
    assert world.frames == [], "the others may be about to come"
    world.settle()
    assert world.awaited == {("y", "step/1"): (0, 1)}
    world.arrive(0)
    world.settle()
    assert world.awaited["y", "step/1"] == (1,)
    world.arrive(1)
    world.settle()
    assert len(world.released) == 3


async def test_ranks_that_train_until_a_planned_change_still_meet() -> None:
    world = World(["x", "y"])
    world.plan_next()
    for rank in (0, 1):
        world.arrive(rank, rank)
    world.settle()
    assert world.released == {(1, rank, "step/1"): 1 for rank in (0, 1)}
    world.take_over()
    world.arrive(0, 5, "step/2")
    world.arrive(1, 5, "step/2")
    world.settle()
    assert len(world.released) == 2, "generation 1 has been relieved"
    for rank in (0, 1):
        world.arrive(rank, 7, "step/2", 2)
    world.settle()
    assert {rank for number, rank, _ in world.released if number == 2} == {0, 1}


async def test_an_agent_repeats_by_itself_what_is_overdue_and_stops_when_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "REPEAT_S", 0.001)
    wire = world.ends["y"].wire
    wire._pause_s = 0.001
    world.arrive(2)
    world.frames.clear()
    await until(lambda: len(world.frames) >= 2, "y to repeat twice")
    for rank in (0, 1):
        world.arrive(rank)
    while world.frames:
        world.deliver()
    assert len(world.released) == 3
    await until(lambda: wire._timer is None, "y to stop")
    assert world.frames == []


async def test_a_link_to_the_leader_that_came_back_is_used_at_once(world: World) -> None:
    world.arrive(2)
    world.frames.clear()
    world.ends["y"].wire.on_link("x")
    assert world.frames == []
    world.ends["y"].wire.on_link("v")
    assert [(sender, to) for sender, to, _ in world.frames] == [("y", "v")]


async def test_who_arrives_before_its_agent_knows_the_generation_is_told_of_once_it_does(
    world: World,
) -> None:
    """An agent that came back is greeted before it has learned what the log says."""
    back = world.ends["y"] = world.make("y")
    world.follow("y", "v")
    for state in (ClusterState(), world.states[0]):
        assert world.frames == []
        back.state = state
        back.wire.on_applied()
        if state is not world.states[0]:
            world.arrive(2, 6)
    assert [(sender, to) for sender, to, _ in world.frames] == [("y", "v")]
    for rank in (0, 1):
        world.arrive(rank, rank)
    world.settle()
    assert world.released == {(1, rank, "step/1"): 6 for rank in range(3)}
    assert "refused_stale" not in back.wire.counters


async def test_an_agent_that_came_back_tells_again_of_a_release(world: World) -> None:
    for rank in range(3):
        world.arrive(rank, rank)
    world.deliver()
    world.deliver()
    world.frames = [frame for frame in world.frames if frame[1] != "y"]  # y crashed before
    world.deliver()
    back = world.ends["y"] = world.make("y")
    back.state = ClusterState()
    world.follow("y", "v")
    world.arrive(2, 2)
    world.follow("v", "x")
    world.ends["v"] = world.make("v")
    world.follow("v", "v")
    back.state = world.states[0]
    back.wire.on_applied()
    world.settle()
    assert world.released == {(1, rank, "step/1"): 2 for rank in range(3)}


async def test_an_agent_that_is_a_generation_behind_keeps_who_arrives(world: World) -> None:
    wire = world.ends["y"].wire
    wire.arrive(barrier(number=2), 0, 1)
    world.ends["y"].state = world.states[1]
    wire.arrive(barrier(number=1), 2, 1)
    assert wire.counters == {"refused_stale": 1}
    wire.on_applied()
    assert [(sender, to) for sender, to, _ in world.frames] == [("y", "v")]


async def test_early_arrivals_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "MAX_EARLY", 2)
    world.ends["y"].state = ClusterState()
    for name in ("one", "two", "three"):
        world.arrive(2, name=name)
    world.ends["y"].state = world.states[0]
    world.ends["y"].wire.on_applied()
    assert len(world.frames) == 2
    assert world.ends["y"].wire.counters == {"refused_too_many_early": 1}


async def test_a_lost_release_is_told_again(world: World) -> None:
    for rank in range(3):
        world.arrive(rank)
    world.deliver()
    world.deliver()
    world.frames.clear()
    world.settle()
    assert len(world.released) == 3


async def test_a_new_leader_hears_at_once_who_waits(world: World) -> None:
    world.arrive(2)
    world.frames.clear()
    world.follow("y", "x")
    assert [(sender, to) for sender, to, _ in world.frames] == [("y", "x")]
    world.follow("y", None)
    assert len(world.frames) == 1, "nobody is there to be told"


async def test_a_new_leader_learns_from_those_that_have_passed(world: World) -> None:
    for rank in range(3):
        world.arrive(rank, rank)
    world.deliver()
    world.deliver()
    world.frames = [frame for frame in world.frames if frame[1] == "y"]
    world.deliver()
    assert set(world.released) == {(1, 2, "step/1")}, "x did not hear, and then v died"
    world.ends["v"] = world.make("v")
    world.follow("v", "v")
    world.settle()
    assert world.released == {(1, rank, "step/1"): 2 for rank in range(3)}


async def test_a_rank_that_arrives_again_is_released_again(world: World) -> None:
    for rank in range(3):
        world.arrive(rank, rank)
    world.settle()
    world.released.clear()
    world.arrive(2, 99)
    assert world.released == {(1, 2, "step/1"): 2}


async def test_the_leaders_own_ranks_meet_without_a_link() -> None:
    world = World(["x", "y"])
    world.arrive(0)
    world.arrive(1)
    world.deliver()
    assert set(world.released) == {(1, 0, "step/1")}
    world.deliver()
    assert len(world.released) == 2


async def test_ranks_of_another_node_and_other_bytes_are_refused_and_counted(world: World) -> None:
    leader = world.ends["v"].wire
    encode = msgspec.msgpack.encode
    leader.on_frame("y", encode(Arrived(barrier(), (0, 1, 2), 0)))
    leader.on_frame("v", encode(Arrived(barrier(), (2,), 0)))
    leader.on_frame("y", encode(Arrived(barrier(), (), 0)))
    leader.on_frame("y", b"\xc1")
    leader.on_frame("y", encode(Arrived(barrier("n" * 129), (2,), 0)))
    leader.on_frame("y", encode(Arrived(barrier(number=3), (2,), 0)))
    assert leader.counters == {
        "arrivals": 3,
        "refused_not_a_member": 3,
        "refused_garbage": 2,
        "refused_stale": 1,
    }
    assert leader.missing() == {}


async def test_a_generation_that_is_over_is_forgotten_everywhere(world: World) -> None:
    for rank in (0, 1):
        world.arrive(rank)
    world.deliver()
    for name in world.ends:
        world.catch_up(name)
    assert world.ends["v"].wire.missing() == {}
    world.settle()
    assert world.frames == []
    world.arrive(2)
    world.settle()
    assert world.released == {}, "x's ranks of generation 1 are no more"


async def test_a_rank_stands_at_a_bounded_number_of_barriers(world: World) -> None:
    for number in range(MAX_OPEN):
        world.arrive(2, name=f"step/{number}")
    world.arrive(2, name="step/0")
    with pytest.raises(NotTaken, match="too_many_open"):
        world.arrive(2, name="one more")


async def test_a_leader_gathers_a_bounded_number_of_barriers(world: World) -> None:
    leader = world.ends["v"].wire
    for number in range(MAX_GATHERED + 1):
        leader.on_frame("y", msgspec.msgpack.encode(Arrived(barrier(str(number)), (2,), 0)))
    assert len(leader.missing()) == MAX_GATHERED
    assert leader.counters["refused_too_many_open"] == 1


async def test_passed_barriers_are_remembered_up_to_a_bound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    for number in range(3):
        for rank in range(3):
            world.arrive(rank, name=f"step/{number}")
        world.settle()
    assert len(world.released) == 9
    asked = msgspec.msgpack.encode(module.Asked(barrier("step/0")))
    world.ends["y"].wire.on_frame("v", asked)
    assert world.frames == [], "that one is forgotten"
    asked = msgspec.msgpack.encode(module.Asked(barrier("step/1")))
    world.ends["y"].wire.on_frame("v", asked)
    assert msgspec.msgpack.decode(world.frames[0][2], type=Released) == Released(
        barrier("step/1"), 0
    )


# --- any interleaving ------------------------------------------------------------------------------------------

small = st.integers(0, 9)
HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), small, small, st.sampled_from(NAMES), st.sampled_from((1, 2))),
        st.tuples(st.just("meet"), st.sampled_from(NAMES), st.sampled_from((1, 2)), small),
        st.tuples(st.sampled_from(("deliver", "repeat_frame", "lose")), small),
        st.tuples(st.sampled_from(("deliver_all", "lose_all_to")), small),
        st.tuples(st.sampled_from(("repeat", "catch_up", "restart")), small),
        st.tuples(st.just("follow"), small, small),
        st.tuples(st.just("wait")),
    ),
    max_size=60,
)
LAYOUTS = st.lists(st.sampled_from("wxy"), min_size=1, max_size=5)


def happen(world: World, what: str, *numbers: Any) -> None:
    """One thing that may happen at any time; numbers choose who and which."""
    names = sorted(world.ends)
    match what:
        case "arrive":
            rank, value, name, number = numbers
            rank %= len(world.layout)
            world.arrive(rank, world.arrived.get((number, rank, name), value), name, number)
        case "meet":  # all arrive and the leader knows it, but one node does not hear of it
            name, number, deaf = numbers
            for rank in range(len(world.layout)):
                happen(world, "arrive", rank, rank, name, number)
            for step in ("deliver_all", "lose_all_to", "deliver_all"):
                happen(world, step, deaf)
        case "deliver_all":
            for _ in range(len(world.frames)):
                world.deliver()
        case "lose_all_to":
            deaf = names[numbers[0] % len(names)]
            world.frames = [frame for frame in world.frames if frame[1] != deaf]
        case "deliver" | "repeat_frame" if world.frames:
            world.deliver(numbers[0] % len(world.frames), again=what == "repeat_frame")
        case "lose" if world.frames:
            world.frames.pop(numbers[0] % len(world.frames))
        case "repeat":
            world.ends[names[numbers[0] % len(names)]].wire.on_leader_change()
        case "catch_up":
            world.catch_up(names[numbers[0] % len(names)])
        case "restart":  # with a node its ranks would end, and with them their generation
            name = "uv"[numbers[0] % 2]
            world.ends[name] = world.make(name)
        case "follow":
            world.follow(
                names[numbers[0] % len(names)], ([None, *names])[numbers[1] % (len(names) + 1)]
            )
        case "wait":
            world.now_s += ASK_S


@given(layout=LAYOUTS, happenings=HAPPENINGS, leader=small, absent=st.none() | small)
async def test_all_go_on_exactly_when_all_have_arrived(
    layout: list[str], happenings: list[tuple[Any, ...]], leader: int, absent: int | None
) -> None:
    world = World(layout, "u", "v")
    for one in happenings:
        happen(world, *one)  # the world itself checks that nobody goes on too early
    names = sorted(world.ends)
    for name in names:
        world.catch_up(name)
        world.follow(name, names[leader % len(names)])
    for rank in range(len(layout)):
        if rank != absent:
            world.arrive(rank, world.arrived.get((2, rank, "last"), rank), "last", 2)
    world.settle()
    for name in (*NAMES, "last"):
        goes = {rank for number, rank, barrier in world.released if (number, barrier) == (2, name)}
        assert goes == (set(range(len(layout))) if world.may_go_on(2, name) else set())
