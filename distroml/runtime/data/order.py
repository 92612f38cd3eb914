"""The order of samples as a pure function of (dataset digest, seed, epoch), with O(1) seek.

Each epoch is a keyed pseudo-random permutation of ``range(samples)``: a balanced Feistel network over the
smallest even-bit domain that holds all samples, with cycle walking back into range (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Nothing is stored and nothing is shuffled, so a worker
that starts in the middle of epoch 9 computes only the positions it needs, and any two workers agree without
talking. Batch k of an epoch is positions ``k * batch_size`` and up; step k consumes exactly batch k.

This module is the reference. ``worker.sample_order`` computes the same numbers many at a time.
"""

from __future__ import annotations

import hashlib

from msgspec import Struct

from distroml.reports import DataCursor

ROUNDS = 8
MASK_64 = (1 << 64) - 1
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


def round_keys(dataset_digest: str, seed: int, epoch: int) -> tuple[int, ...]:
    """``ROUNDS`` 64-bit keys of one epoch's permutation."""
    key = hashlib.sha512(f"distroml-order/1\n{dataset_digest}\n{seed}\n{epoch}".encode()).digest()
    return tuple(int.from_bytes(key[8 * i : 8 * i + 8], "big") for i in range(ROUNDS))


def half_bits(samples: int) -> int:
    """Bits of each Feistel half: the smallest whose square domain holds ``samples``."""
    return max(1, ((samples - 1).bit_length() + 1) // 2)


def mix(value: int) -> int:
    """A 64-bit finaliser (Steele, Lea and Flood, "Fast Splittable PRNGs", OOPSLA 2014)."""
    value = ((value ^ (value >> 30)) * MULTIPLIER_1) & MASK_64
    value = ((value ^ (value >> 27)) * MULTIPLIER_2) & MASK_64
    return value ^ (value >> 31)


def sample_at(position: int, samples: int, keys: tuple[int, ...]) -> int:
    """The sample that stands at ``position`` of an epoch with these ``round_keys``.

    Raises:
        IndexError: ``position`` is not in ``range(samples)``.
    """
    if not 0 <= position < samples:
        raise IndexError(f"position {position} is not in an epoch of {samples} samples")
    bits = half_bits(samples)
    mask = (1 << bits) - 1
    value = position
    while True:
        left, right = value >> bits, value & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        value = (left << bits) | right
        if value < samples:
            return value


def rank_slice(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Begin and end of ``rank``'s contiguous share of ``count`` items; the first ranks hold one more.

    Over all ranks the shares follow each other without gap or overlap and differ by at most one.
    """
    share, extra = divmod(count, world_size)
    begin = rank * share + min(rank, extra)
    return begin, begin + share + (rank < extra)


class Schedule(Struct, frozen=True):
    """Which positions each step consumes. Steps are 0-based here and never end; epochs follow each other."""

    samples: int
    """Samples of the dataset."""
    batch_size: int
    """Global batch in samples; the last batch of an epoch holds what is left."""

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    def cursor(self, step: int) -> DataCursor:
        """Where step ``step`` reads: the cursor of a state that has completed ``step`` steps."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return DataCursor(epoch=epoch, batch=batch)

    def span(self, cursor: DataCursor) -> tuple[int, int]:
        """Begin and end positions, within its epoch, of the batch at ``cursor``."""
        begin = cursor.batch * self.batch_size
        return begin, min(self.samples, begin + self.batch_size)

    def rank_span(self, cursor: DataCursor, rank: int, world_size: int) -> tuple[int, int]:
        """Begin and end positions of ``rank``'s share of the batch at ``cursor``; may be empty."""
        begin, end = self.span(cursor)
        first, last = rank_slice(end - begin, rank, world_size)
        return begin + first, begin + last


def batch_indices(
    schedule: Schedule, step: int, rank: int, world_size: int, dataset_digest: str, seed: int
) -> list[int]:
    """The samples that ``rank`` trains on in 0-based step ``step``, in order."""
    cursor = schedule.cursor(step)
    keys = round_keys(dataset_digest, seed, cursor.epoch)
    begin, end = schedule.rank_span(cursor, rank, world_size)
    return [sample_at(position, schedule.samples, keys) for position in range(begin, end)]
