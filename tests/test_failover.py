"""The client's retry policy: which node is next, how long to wait, when to give up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.errors import ConfigError, OutcomeUnknown, Unavailable
from distroml.failover import (
    BACKOFF_CAP_S,
    DEFAULT_URL,
    MAX_ATTEMPTS,
    UNREACHED_ROUNDS,
    Failover,
    parse_urls,
)

A, B, C = "http://a:1", "http://b:1", "http://c:1"


def failover(*urls: str, start: int = 0, deadline: float = 30.0, persist: bool = False) -> Failover:
    return Failover(urls, start=start, deadline=deadline, random=lambda: 1.0, persist=persist)


def test_a_round_asks_each_node_once_without_waiting() -> None:
    policy = failover(A, B, C, start=1)
    attempts = []
    for _ in range(3):
        attempt = policy.next(0.0)
        assert attempt is not None
        attempts.append(attempt)
        policy.failed("refused", reached=False)
    assert [a.url for a in attempts] == [B, C, A]
    assert [a.wait_s for a in attempts] == [0.0, 0.0, 0.0]
    again = policy.next(0.0)
    assert again is not None
    assert again.url == B
    assert again.wait_s > 0


def test_unreachable_nodes_are_given_up_early_but_living_ones_get_the_whole_time() -> None:
    def rounds(*, reached: bool, persist: bool = False) -> float:
        policy, now, last = failover(A, B, persist=persist), 0.0, 0.0
        while (attempt := policy.next(now)) is not None:
            now += attempt.wait_s
            last = now
            policy.failed("x", reached=reached)
        return last

    assert rounds(reached=False) < 2.0
    assert rounds(reached=True) > 20.0
    assert rounds(reached=False, persist=True) > 20.0


def test_what_a_node_asks_for_is_waited_but_not_more_than_the_cap() -> None:
    policy = failover(A)
    policy.next(0.0)
    policy.failed("busy", reached=True, retry_after_s=1.0)
    attempt = policy.next(0.0)
    assert attempt is not None
    assert attempt.wait_s == 1.0
    policy.failed("busy", reached=True, retry_after_s=3600.0)
    attempt = policy.next(0.0)
    assert attempt is not None
    assert attempt.wait_s == BACKOFF_CAP_S


def test_after_a_success_the_next_node_is_asked_at_once() -> None:
    policy = failover(A, B, C)
    policy.next(0.0)
    policy.failed("refused", reached=False)
    policy.next(0.0)
    policy.renew(deadline=100.0)
    policy.failed("closed", reached=True)
    attempt = policy.next(90.0)
    assert attempt is not None
    assert (attempt.url, attempt.wait_s) == (C, 0.0)


def test_the_error_names_every_url_and_says_whether_a_write_may_have_happened() -> None:
    policy = failover(A, B)
    policy.next(0.0)
    policy.failed("Connection refused", reached=False)
    policy.next(0.0)
    policy.failed("no answer in time", reached=True, maybe_done=True)
    read, write = policy.error("GET /x"), policy.error("POST /x", key="k-1")
    assert type(read) is Unavailable
    assert type(write) is OutcomeUnknown
    for error in (read, write):
        assert f"{A} (Connection refused)" in error.detail
        assert f"{B} (no answer in time)" in error.detail
    assert "k-1" in write.detail


@given(
    count=st.integers(1, 5),
    start=st.integers(0, 10),
    deadline=st.floats(0.01, 1000.0),
    draws=st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=5),
    costs=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=5),
    reached=st.booleans(),
)
def test_any_call_ends_within_its_deadline_and_is_fair(
    count: int,
    start: int,
    deadline: float,
    draws: list[float],
    costs: list[float],
    reached: bool,
) -> None:
    urls = [f"http://n{number}" for number in range(count)]
    turns = iter(range(10**9))
    policy = Failover(
        urls, start=start, deadline=deadline, random=lambda: draws[next(turns) % len(draws)]
    )
    now, asked = 0.0, []
    while (attempt := policy.next(now)) is not None:
        now += attempt.wait_s
        assert now < deadline
        assert 0 < attempt.timeout_s <= deadline
        assert attempt.wait_s <= BACKOFF_CAP_S
        now += min(costs[len(asked) % len(costs)], attempt.timeout_s)
        asked.append(attempt.url)
        policy.failed("x", reached=reached)
    assert len(asked) <= (MAX_ATTEMPTS if reached else UNREACHED_ROUNDS * count)
    assert asked == [urls[(start + i) % count] for i in range(len(asked))]


def test_urls_are_normalised() -> None:
    assert parse_urls(" http://a:1/ ,b:2,,https://c,b:2") == (
        "http://a:1",
        "http://b:2",
        "https://c",
    )


@pytest.mark.parametrize("text", ["", " , ", "ftp://a", "http://", "http://:80", "a b"])
def test_what_is_no_url_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=DEFAULT_URL):
        parse_urls(text)
