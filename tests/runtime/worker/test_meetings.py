"""A worker's side of barriers: arriving goes on at once, waiting ends with the release, the bound or the end."""

from __future__ import annotations

import threading

import pytest

from distroml.runtime.barrier import MAX_NAME_CHARS, MAX_OPEN
from distroml.runtime.control import Arrive, Awaited, Released
from distroml.runtime.worker.meetings import BarrierTimeout, Meetings, NotMet

WAIT_S = 20.0


@pytest.fixture
def sent() -> list[Arrive]:
    return []


@pytest.fixture
def meetings(sent: list[Arrive]) -> Meetings:
    return Meetings(sent.append)


def test_an_arrival_is_sent_once_and_its_value_taken_once(
    meetings: Meetings, sent: list[Arrive]
) -> None:
    meetings.arrive("drain", 3)
    meetings.arrive("drain", 4)
    assert sent == [Arrive(generation=0, name="drain", value=3)]
    assert meetings.agreed("drain") is None
    meetings.take(Released(generation=0, name="drain", value=5))
    meetings.take(Released(generation=0, name="drain", value=5))
    assert meetings.agreed("drain") == 5
    assert meetings.agreed("drain") is None
    with pytest.raises(ValueError, match="'drain'"):
        meetings.wait("drain", WAIT_S)


def test_a_release_or_the_end_wakes_who_waits() -> None:
    results: list[object] = []
    both = threading.Semaphore(0)
    meetings = Meetings(lambda arrival: both.release())

    def meet(name: str) -> None:
        try:
            results.append(meetings.meet(name, WAIT_S))
        except NotMet as error:
            results.append(str(error))

    waiting = [threading.Thread(target=meet, args=(name,)) for name in ("b", "c")]
    for thread in waiting:
        thread.start()
    assert [both.acquire(timeout=WAIT_S) for _ in waiting] == [True, True]
    meetings.take(Released(generation=0, name="b", value=0))
    waiting[0].join(WAIT_S)
    assert results == [0]
    meetings.end(0, "generation 3 failed")
    waiting[1].join(WAIT_S)
    assert results == [0, "generation 3 failed"]


def test_waiting_is_bounded_and_can_go_on(meetings: Meetings) -> None:
    meetings.arrive("a")
    with pytest.raises(BarrierTimeout, match=r"barrier 'a' .* no coordinator has said"):
        meetings.wait("a", 0.001)
    meetings.take(Released(generation=0, name="a", value=1))
    assert meetings.wait("a", WAIT_S) == 1


def test_a_name_has_bounds_and_so_has_their_number(meetings: Meetings) -> None:
    for name in ("", "n" * (MAX_NAME_CHARS + 1)):
        with pytest.raises(ValueError, match="characters"):
            meetings.arrive(name)
    for value in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            meetings.arrive("a", value)
    for number in range(MAX_OPEN):
        meetings.arrive(str(number))
    with pytest.raises(ValueError, match="'one more'"):
        meetings.arrive("one more")


def test_who_gives_up_is_told_who_was_missing_last(meetings: Meetings) -> None:
    meetings.arrive("a")
    for missing, told in (((1, 3), "ranks 1, 3 had"), ((3,), "rank 3 had")):
        meetings.take(Awaited(generation=0, name="a", missing=missing))
        with pytest.raises(BarrierTimeout, match=told):
            meetings.wait("a", 0.001)


def test_what_is_told_of_another_generation_changes_nothing(meetings: Meetings) -> None:
    meetings.join(2)
    meetings.arrive("a")
    meetings.take(Released(generation=1, name="a", value=1))
    meetings.take(Awaited(generation=1, name="a", missing=(9,)))
    meetings.end(1, "generation 1 is over")
    with pytest.raises(BarrierTimeout, match="no coordinator"):
        meetings.wait("a", 0.001)
    meetings.take(Released(generation=2, name="a", value=2))
    assert meetings.wait("a", WAIT_S) == 2


def test_what_is_not_released_is_said_to_an_agent_that_comes_back(
    meetings: Meetings, sent: list[Arrive]
) -> None:
    meetings.arrive("a", 1)
    meetings.arrive("b", 2)
    meetings.take(Released(generation=0, name="a", value=1))
    assert meetings.standing() == sent[1:]
    meetings.join(1)
    assert meetings.standing() == [], "those were barriers of the generation before"
