"""Schedules are data: the same seed draws the same one, and none asks for more than a cluster survives."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.faults import INFLICT
from chaos.kinds import BY_NAME, KINDS, Family, Need, UnknownFault, chosen, possible
from chaos.schedule import (
    CALM_S,
    FIRST_S,
    MOST_OPEN,
    Schedule,
    draw,
    minority,
)

SEEDS = st.integers(0, 2**32)
DURATIONS_S = st.floats(5, 900)
NODES = st.sampled_from((3, 5))


@given(SEEDS, DURATIONS_S, NODES)
def test_the_same_seed_draws_the_same_schedule(seed: int, duration_s: float, nodes: int) -> None:
    first = draw(seed, duration_s, nodes, KINDS)

    assert draw(seed, duration_s, nodes, KINDS) == first
    assert msgspec.json.decode(msgspec.json.encode(first), type=Schedule) == first


@given(SEEDS, DURATIONS_S, NODES)
def test_everything_strikes_and_ends_within_the_run(
    seed: int, duration_s: float, nodes: int
) -> None:
    planned = draw(seed, duration_s, nodes, KINDS).planned

    times = [one.at_s for one in planned]
    assert times == sorted(times)
    for one in planned:
        shortest_s, longest_s = BY_NAME[one.kind].lasts_s
        assert FIRST_S <= one.at_s <= duration_s - CALM_S + 0.001
        assert one.until_s <= duration_s - CALM_S + 0.11
        assert (one.lasts_s > 0) == (longest_s > 0)
        assert one.lasts_s <= longest_s
        assert shortest_s <= one.lasts_s or one.until_s >= duration_s - CALM_S - 0.01
        assert one.choices.keys() == BY_NAME[one.kind].choices.keys()
        for name, value in one.choices.items():
            assert value in BY_NAME[one.kind].choices[name]


@given(SEEDS, DURATIONS_S, NODES)
def test_few_faults_are_open_at_once_and_a_minority_loses_its_directory(
    seed: int, duration_s: float, nodes: int
) -> None:
    planned = draw(seed, duration_s, nodes, KINDS).planned

    for one in planned:
        still_open = [other for other in planned if other.at_s <= one.at_s < other.until_s]
        assert len(still_open) <= MOST_OPEN
    lost = [one for one in planned if one.kind == "directory-lost"]
    assert len(lost) <= minority(nodes)
    assert 2 * minority(nodes) < nodes


@given(SEEDS, st.sets(st.sampled_from(sorted(Family)), min_size=1))
def test_families_take_turns(seed: int, families: set[Family]) -> None:
    kinds = [kind for kind in KINDS if kind.family in families]
    planned = draw(seed, 600, 3, kinds).planned

    first_round = {BY_NAME[one.kind].family for one in planned[: len(families)]}
    assert first_round == families


def test_a_kind_that_may_come_once_does_not_end_the_schedule() -> None:
    lost_only = draw(1, 600, 3, [BY_NAME["directory-lost"]])
    with_another = draw(1, 600, 3, [BY_NAME["directory-lost"], BY_NAME["disk-full"]])

    assert len(lost_only.planned) == 1
    assert len(with_another.planned) > 20


def test_every_kind_can_be_inflicted_and_says_what_it_does() -> None:
    assert INFLICT.keys() == BY_NAME.keys()
    assert len(BY_NAME) == len(KINDS)
    assert all(kind.does for kind in KINDS)


def test_what_was_asked_for_is_found_by_family_and_by_name() -> None:
    assert chosen("all") == KINDS
    assert {kind.name for kind in chosen("time, worker-kill")} == {"clock-jump", "worker-kill"}
    with pytest.raises(UnknownFault, match="worker-kil: neither a family"):
        chosen("worker-kil")
    with pytest.raises(UnknownFault):
        chosen(" , ")


def test_what_the_machine_cannot_do_is_left_out() -> None:
    usable = possible(KINDS, {Need.DISKS})

    assert not any(kind.family is Family.NETWORK for kind in usable)
    assert "disk-full" in {kind.name for kind in usable}
    assert possible(KINDS, set(Need)) == KINDS
