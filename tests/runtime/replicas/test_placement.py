"""Where copies belong: as many as wanted, the writer among them, and few that move when nodes come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distroml.runtime.replicas import placement

NAMES = st.sets(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=12)
PATHS = st.integers(0, 10_000).map(
    lambda n: f"job/run/checkpoints/ckpt_step_{n:08d}/worker_0.safetensors"
)


@given(PATHS, NAMES)
def test_every_node_has_one_place_in_the_order_of_a_file(path: str, nodes: set[str]) -> None:
    found = placement.order(path, nodes)
    assert sorted(found) == sorted(nodes)
    assert found == placement.order(path, sorted(nodes, reverse=True))


@given(PATHS, NAMES, st.text("xyz", min_size=1, max_size=3), st.integers(1, 5))
def test_a_node_that_comes_takes_over_at_most_its_own_place(
    path: str, nodes: set[str], newcomer: str, copies: int
) -> None:
    before = placement.order(path, nodes)[:copies]
    after = placement.order(path, nodes | {newcomer})[:copies]
    assert set(after) - set(before) <= {newcomer}
    assert [node for node in after if node != newcomer] == before[
        : len(after) - (newcomer in after)
    ]


@given(PATHS, NAMES, st.data())
def test_a_node_that_goes_moves_only_what_it_had(
    path: str, nodes: set[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(nodes)))
    copies = data.draw(st.integers(1, 5))
    before = placement.order(path, nodes)[:copies]
    after = placement.order(path, nodes - {gone})[:copies]
    if gone in before:
        assert set(before) - {gone} <= set(after)
    else:
        assert after == before


def test_files_are_spread_over_the_nodes() -> None:
    nodes = [f"n{number}" for number in range(5)]
    first = [placement.order(f"job/{number}", nodes)[0] for number in range(1000)]
    assert all(150 < first.count(node) < 250 for node in nodes)


def test_two_copies_are_usual_and_one_where_there_is_one_node() -> None:
    assert placement.wanted(None, 1) == 1
    assert placement.wanted(None, 2) == placement.wanted(None, 9) == 2
    assert placement.wanted(3, 2) == 2
    assert placement.wanted(1, 9) == 1
    assert placement.wanted(None, 0) == 1


@given(PATHS, NAMES, st.data())
def test_repairs_make_up_for_what_is_lost_and_for_no_more(
    path: str, staying: set[str], data: st.DataObject
) -> None:
    everyone = staying | data.draw(NAMES)
    held_by = data.draw(st.sets(st.sampled_from(sorted(everyone))))
    central = data.draw(st.sets(st.sampled_from(sorted(everyone))))
    copies = data.draw(st.integers(1, 4))
    found = placement.repairs(path, held_by, staying, copies, central)
    targets = {one.target for one in found}
    assert len(targets) == len(found)
    assert targets <= staying - held_by
    lack = placement.lacking(held_by, staying, copies, central)
    assert lack >= copies - len(held_by & staying)
    assert len(targets) <= lack <= max(1, copies - len(held_by & staying))
    for one in found:
        assert set(one.sources) == held_by
        assert one.target in central or held_by & central, "nobody it can reach has the file"
    if held_by & central:
        wanted = min(copies, len(staying))
        assert len(held_by & staying) + len(targets) >= wanted, "a copy is missing for good"
    if held_by and staying & central:
        assert (held_by & staying | targets) & central, "some nodes can reach none of its holders"
