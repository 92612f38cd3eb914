from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.runtime.data.order import round_keys, sample_at
from distroml.runtime.worker.sample_order import BLOCK_POSITIONS, SampleOrder, permute


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 10**9), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_numpy_gives_the_same_bits_as_the_reference(
    samples: int, seed: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, samples - 1), max_size=20))
    keys = round_keys("data", seed, 1)
    got = permute(np.array(positions, dtype=np.int64), samples, keys)
    assert got.tolist() == [sample_at(position, samples, keys) for position in positions]


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (0, 7),
        (BLOCK_POSITIONS - 3, BLOCK_POSITIONS + 3),
        (BLOCK_POSITIONS - 3, 3 * BLOCK_POSITIONS + 1),
        (5, 5),
        (3 * BLOCK_POSITIONS, 3 * BLOCK_POSITIONS + 10),
    ],
)
def test_any_stretch_is_seekable(begin: int, end: int) -> None:
    samples = 3 * BLOCK_POSITIONS + 10
    keys = round_keys("data", 4, 2)
    order = SampleOrder(samples, "data", 4)
    got = order.indices(2, begin, end).tolist()
    wanted = [begin, (begin + end) // 2, end - 1] if end > begin else []
    assert len(got) == end - begin
    assert [got[p - begin] for p in wanted] == [sample_at(p, samples, keys) for p in wanted]


def test_steps_forward_and_back_agree() -> None:
    order = SampleOrder(100, "data", 0)
    first = order.indices(0, 10, 20).tolist()
    assert order.indices(1, 10, 20).tolist() != first
    assert order.indices(0, 10, 20).tolist() == first
