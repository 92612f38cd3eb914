"""``runtime.data.order`` computed with numpy, a block of positions at a time, for the step loop.

A worker asks for a few consecutive positions per step. The permutation of a whole block costs little more than
that of one position, so blocks are computed when first touched and kept until the loop leaves them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distroml.runtime.data.order import MULTIPLIER_1, MULTIPLIER_2, half_bits, round_keys

BLOCK_POSITIONS = 16_384
Indices = NDArray[np.int64]


def permute(positions: Indices, samples: int, keys: tuple[int, ...]) -> Indices:
    """``order.sample_at`` of each position; same shape."""
    bits = np.uint64(half_bits(samples))
    mask = np.uint64((1 << int(bits)) - 1)
    values = positions.astype(np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], bits, mask, keys)
        outside = outside[values[outside] >= samples]
    return values.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], bits: np.uint64, mask: np.uint64, keys: tuple[int, ...]
) -> NDArray[np.uint64]:
    left, right = values >> bits, values & mask
    for key in keys:
        mixed = right ^ np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
        mixed ^= mixed >> np.uint64(31)
        left, right = right, left ^ (mixed & mask)
    return (left << bits) | right


class SampleOrder:
    """The order of one dataset under one seed, seekable to any (epoch, position)."""

    def __init__(self, samples: int, dataset_digest: str, seed: int) -> None:
        self.samples = samples
        self._digest = dataset_digest
        self._seed = seed
        self._epoch = -1
        self._keys: tuple[int, ...] = ()
        self._blocks: dict[int, Indices] = {}

    def indices(self, epoch: int, begin: int, end: int) -> Indices:
        """Samples at positions ``begin`` up to ``end`` of ``epoch``, as int64 of shape [end - begin]."""
        if epoch != self._epoch:
            self._epoch, self._keys = epoch, round_keys(self._digest, self._seed, epoch)
            self._blocks = {}
        first, last = begin // BLOCK_POSITIONS, max(begin, end - 1) // BLOCK_POSITIONS
        if first == last:
            base = first * BLOCK_POSITIONS
            return self._block(first)[begin - base : end - base]
        parts = np.concatenate([self._block(number) for number in range(first, last + 1)])
        return parts[begin - first * BLOCK_POSITIONS : end - first * BLOCK_POSITIONS]

    def _block(self, number: int) -> Indices:
        block = self._blocks.get(number)
        if block is None:
            # Steps only move forward: blocks behind the previous one are not needed again.
            self._blocks = {n: kept for n, kept in self._blocks.items() if n >= number - 1}
            begin = number * BLOCK_POSITIONS
            positions = np.arange(begin, min(self.samples, begin + BLOCK_POSITIONS))
            block = self._blocks[number] = permute(positions, self.samples, self._keys)
        return block
