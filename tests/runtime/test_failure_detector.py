"""The failure detector: when a node counts as lost, and what is said about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.runtime.failure_detector import (
    DetectorSettings,
    Health,
    Listening,
    NodeObservation,
    Verdict,
    assess,
    judge,
)

NOW_S = 1000.0
LONG_AGO = Listening(own_node="me", leader_since_s=0.0)


def seen(
    heard_ago_s: float | None, *, closed_ago_s: float | None = None, node: str = "b"
) -> NodeObservation:
    return NodeObservation(
        node=node,
        incarnation=1,
        last_heard_s=None if heard_ago_s is None else NOW_S - heard_ago_s,
        connected=closed_ago_s is None,
        down_since_s=None if closed_ago_s is None else NOW_S - closed_ago_s,
    )


def verdict(observation: NodeObservation, listening: Listening = LONG_AGO) -> Verdict:
    return judge(observation, now_s=NOW_S, listening=listening)


@pytest.mark.parametrize(
    ("observation", "health", "reason"),
    [
        (seen(0.1), Health.ALIVE, "heard"),
        (seen(1.2), Health.SUSPECT, "silent for 1.2 s"),
        (seen(3.1), Health.LOST, "silent for 3.1 s"),
        (seen(0.3, closed_ago_s=0.2), Health.SUSPECT, "connection closed and silent for 0.2 s"),
        (seen(0.7, closed_ago_s=0.7), Health.LOST, "connection closed and silent for 0.7 s"),
        (seen(0.1, closed_ago_s=0.7), Health.SUSPECT, "connection closed and silent for 0.1 s"),
        (seen(None), Health.LOST, "never heard in 1000.0 s since the election"),
        (seen(99.0, closed_ago_s=99.0, node="me"), Health.ALIVE, "this node leads"),
    ],
)
def test_the_thresholds_and_what_is_said(
    observation: NodeObservation, health: Health, reason: str
) -> None:
    found = verdict(observation)
    assert (found.health, found.reason) == (health, reason)


def test_a_new_leader_gives_everyone_time_to_speak() -> None:
    elected = Listening(own_node="me", leader_since_s=NOW_S - 0.1)
    assert verdict(seen(None), elected).health is Health.SUSPECT
    assert verdict(seen(60.0), elected).health is Health.ALIVE


def test_a_new_leader_need_not_wait_for_a_node_whose_connection_closed() -> None:
    elected = Listening(own_node="me", leader_since_s=NOW_S - 0.1)
    assert verdict(seen(1.0, closed_ago_s=1.0), elected).health is Health.LOST


def test_what_a_leader_missed_while_it_stood_still_is_not_held_against_others() -> None:
    woke = Listening(own_node="me", leader_since_s=0.0, awake_since_s=NOW_S - 0.1)
    for observation in (seen(10.0), seen(10.0, closed_ago_s=9.0), seen(None)):
        assert verdict(observation, woke).health is not Health.LOST


_times = st.none() | st.floats(0.0, NOW_S, allow_nan=False)
_observations = st.builds(
    NodeObservation,
    node=st.sampled_from(["a", "b", "c", "me"]),
    incarnation=st.integers(1, 3),
    last_heard_s=_times,
    connected=st.booleans(),
    down_since_s=_times,
)


@given(_observations, st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_a_silent_node_never_recovers_by_waiting(
    observation: NodeObservation, earlier_s: float, later_s: float
) -> None:
    earlier_s, later_s = sorted((earlier_s, later_s))
    order = [Health.ALIVE, Health.SUSPECT, Health.LOST]
    first, second = (
        order.index(judge(observation, now_s=NOW_S + s, listening=LONG_AGO).health)
        for s in (earlier_s, later_s)
    )
    assert first <= second


@given(_observations)
def test_every_silent_node_is_lost_in_bounded_time(observation: NodeObservation) -> None:
    settings = DetectorSettings()
    limit_s = max(settings.silence_s, settings.closed_silence_s, settings.first_word_s)
    found = judge(observation, now_s=NOW_S + limit_s, listening=LONG_AGO, settings=settings)
    assert found.health is (Health.ALIVE if observation.node == "me" else Health.LOST)


@given(st.lists(_observations, unique_by=lambda o: o.node))
def test_verdicts_do_not_depend_on_the_order_of_observations(
    observations: list[NodeObservation],
) -> None:
    forward = assess(observations, now_s=NOW_S, listening=LONG_AGO)
    backward = assess(reversed(observations), now_s=NOW_S, listening=LONG_AGO)
    assert list(forward.items()) == list(backward.items())
    assert all(one.reason for one in forward.values())
