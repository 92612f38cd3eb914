from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.reports import DataCursor
from distroml.runtime.data.order import (
    Schedule,
    batch_indices,
    half_bits,
    rank_slice,
    round_keys,
    sample_at,
)

seeds = st.integers(0, 2**63 - 1)
PINNED = [6, 9, 7, 2, 3, 8, 0, 4, 5, 1]
PINNED_LARGE = [73250873, 888151832, 593959500]


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 600), seed=seeds, epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    keys = round_keys("data", seed, epoch)
    seen = sorted(sample_at(i, samples, keys) for i in range(samples))
    assert seen == list(range(samples))


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 10**9), seed=seeds, data=st.data())
def test_large_epochs_stay_in_range(samples: int, seed: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, samples - 1))
    assert 0 <= sample_at(position, samples, round_keys("data", seed, 0)) < samples


@settings(deadline=None)
@given(samples=st.integers(1, 10**12))
def test_domain_holds_all_samples_and_walks_few_cycles(samples: int) -> None:
    domain = 4 ** half_bits(samples)
    assert samples <= domain <= max(4, 4 * samples)


def test_order_is_pinned() -> None:
    """A change of these numbers changes the result of every resumed run."""
    keys = round_keys("digest", 7, 3)
    assert [sample_at(i, 10, keys) for i in range(10)] == PINNED
    assert [sample_at(i, 10**9, keys) for i in range(3)] == PINNED_LARGE


@pytest.mark.parametrize(
    "other", [("other", 1, 1), ("data", 2, 1), ("data", 1, 2)], ids=["dataset", "seed", "epoch"]
)
def test_order_depends_on_dataset_seed_and_epoch(other: tuple[str, int, int]) -> None:
    def order(keys: tuple[int, ...]) -> list[int]:
        return [sample_at(i, 200, keys) for i in range(200)]

    assert order(round_keys("data", 1, 1)) != order(round_keys(*other))


def test_order_mixes_evenly() -> None:
    """Where a sample lands says nothing of where it came from."""
    samples, epochs, quarters = 64, 200, [[0] * 4 for _ in range(4)]
    for epoch in range(epochs):
        keys = round_keys("data", 0, epoch)
        for position in range(samples):
            quarters[position // 16][sample_at(position, samples, keys) // 16] += 1
    expected = samples * epochs / 16
    assert all(abs(count - expected) < 0.15 * expected for row in quarters for count in row)


@pytest.mark.parametrize("position", [-1, 10])
def test_position_outside_of_the_epoch_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match="not in an epoch of 10 samples"):
        sample_at(position, 10, round_keys("data", 0, 0))


@settings(deadline=None)
@given(count=st.integers(0, 10**6), world_size=st.integers(1, 1024))
def test_rank_slices_partition_evenly(count: int, world_size: int) -> None:
    slices = [rank_slice(count, rank, world_size) for rank in range(world_size)]
    assert slices[0][0] == 0
    assert slices[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(slices))
    sizes = [end - begin for begin, end in slices]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    world_size=st.integers(1, 9),
    step=st.integers(0, 400),
)
def test_ranks_of_any_world_share_the_same_batch(
    samples: int, batch_size: int, world_size: int, step: int
) -> None:
    schedule = Schedule(samples, batch_size)
    whole = batch_indices(schedule, step, 0, 1, "data", 5)
    parts = [batch_indices(schedule, step, r, world_size, "data", 5) for r in range(world_size)]
    assert [index for part in parts for index in part] == whole


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 150), batch_size=st.integers(1, 40), epoch=st.integers(0, 3))
def test_each_sample_counts_once_per_epoch(samples: int, batch_size: int, epoch: int) -> None:
    schedule = Schedule(samples, batch_size)
    first = epoch * schedule.batches_per_epoch
    seen: list[int] = []
    for step in range(first, first + schedule.batches_per_epoch):
        assert schedule.cursor(step).epoch == epoch
        seen += batch_indices(schedule, step, 0, 1, "data", 0)
    assert sorted(seen) == list(range(samples))


def test_cursor_points_at_the_next_batch() -> None:
    schedule = Schedule(samples=10, batch_size=4)
    assert schedule.batches_per_epoch == 3
    assert schedule.cursor(2) == DataCursor(epoch=0, batch=2)
    assert schedule.cursor(3) == DataCursor(epoch=1, batch=0)
    assert schedule.span(DataCursor(epoch=5, batch=2)) == (8, 10)
