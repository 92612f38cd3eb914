"""Sums over all logical shards, in shard order: the same bits for any number of ranks and any layout.

Every element is added as ((shard 0 + shard 1) + shard 2) + …, whoever holds which shard and however the elements lie
in buckets; an all-reduce promises neither. Large buckets: all_to_all gives each rank its part of every shard, it
adds them, all_gather spreads the sums. Small ones: everybody gets everything and adds it itself, in one exchange
instead of two.

``FastSum`` gives up the bits where that is faster: a rank adds its own shards first and sends their sum, however many
there are, and buckets that are too large for all_to_all are all-reduced.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distroml.runtime.worker.buckets import BUCKET_BYTES, Bucket
from distroml.runtime.worker.logical_shards import LogicalShards

SMALL_BYTES = 256 * 1024
"""Up to this size latency is what counts."""
ALIGNMENT = 8


class Line(Protocol):
    """What exchanges the memory in which buckets lie: the ``RankGroup`` or the ``DeviceGroup`` of a generation."""

    def all_to_all(
        self, output: Tensor, values: Tensor, received: list[int], sent: list[int]
    ) -> None: ...

    def all_gather_into(self, output: Tensor, copies: Tensor) -> None: ...

    def all_reduce(self, values: Tensor) -> None: ...


class OrderedSum:
    """Reduces buckets over the shards of one generation; keeps the memory that it needs between steps."""

    def __init__(self, line: Line, shards: LogicalShards) -> None:
        self._line, self._shards = line, shards
        self._scratch: dict[tuple[int, str], Tensor] = {}

    def reduce(self, bucket: Bucket) -> None:
        """Leave the sum in the first row of ``bucket``.

        Raises:
            CollectiveBroken: a rank is gone.
        """
        if self._shards.world_size == 1:
            _add_in_order(bucket.rows[: len(self._shards.mine), : bucket.count])
        elif bucket.size_bytes <= SMALL_BYTES:
            self._reduce_small(bucket)
        else:
            self._reduce_large(bucket)

    def reduce_with_note(self, bucket: Bucket, notes: Tensor) -> Tensor:
        """``reduce`` for a small bucket, with a few bytes of each shard in the same exchange.

        Args:
            notes: uint8 of shape [shards of this rank, note size], a multiple of ``ALIGNMENT``.

        Returns:
            The notes of all shards, uint8 of shape [shards, note size]; valid until the next exchange.
        """
        note_bytes, end = notes.shape[1], notes.shape[1] + bucket.size_bytes
        width = -(-end // ALIGNMENT) * ALIGNMENT
        shards = self._shards
        world = shards.world_size
        copies = self._memory(bucket, "copies", world * shards.most * width, torch.uint8)
        packed = copies[: shards.most * width].view(-1, width)
        for place in range(len(shards.mine)):
            packed[place, :note_bytes].copy_(notes[place])
            row = bucket.rows[place, : bucket.count]
            packed[place, note_bytes:end].copy_(row.view(torch.uint8))
        gathered = self._memory(bucket, "gathered", copies.numel(), torch.uint8)
        self._line.all_gather_into(gathered, _first_for_all(copies.view(world, -1)))
        rows = (
            gathered.view(-1, width)[shards.rows()] if shards.most > 1 else gathered.view(-1, width)
        )
        rows = rows[: shards.count]
        values = rows[:, note_bytes:end].view(bucket.rows.dtype)
        bucket.rows[0, : bucket.count].copy_(_add_in_order(values))
        return rows[:, :note_bytes]

    def _reduce_small(self, bucket: Bucket) -> None:
        nothing = torch.empty((len(self._shards.mine), 0), dtype=torch.uint8)
        self.reduce_with_note(bucket, nothing)

    def _reduce_large(self, bucket: Bucket) -> None:
        shards = self._shards
        world, own = shards.world_size, len(shards.mine)
        part = -(-bucket.count // world)
        dtype = bucket.rows.dtype
        if own == 1:
            sent = bucket.rows[0, : part * world]
        else:  # by destination first
            sent = self._memory(bucket, "sent", own * part * world, dtype)
            by_rank = bucket.rows[:own, : part * world].view(own, world, part).transpose(0, 1)
            sent.view(world, own, part).copy_(by_rank)
        received = self._memory(bucket, "received", shards.count * part, dtype)
        self._line.all_to_all(
            received, sent, [size * part for size in shards.sizes], [own * part] * world
        )
        parts = received.view(shards.count, part)
        _add_in_order(parts)
        self._line.all_gather_into(bucket.rows[0, : part * world], _first_for_all(parts[:world]))

    def _memory(self, bucket: Bucket, use: str, size: int, dtype: torch.dtype) -> Tensor:
        """Touched once, then reused: fresh memory costs more than the copy into it."""
        key = (id(bucket), use)
        if key not in self._scratch or self._scratch[key].numel() != size:
            self._scratch[key] = torch.zeros(size, dtype=dtype, device=bucket.rows.device)
        return self._scratch[key]


class FastSum:
    """As ``OrderedSum``, but the sum depends on the number of ranks."""

    def __init__(self, line: Line, shards: LogicalShards) -> None:
        self._line = line
        world = shards.world_size
        self._of_ranks = OrderedSum(line, LogicalShards(world, shards.rank, world))

    def reduce(self, bucket: Bucket) -> None:
        """See ``OrderedSum.reduce``."""
        own = _add_in_order(bucket.rows[:, : bucket.count])
        if bucket.size_bytes > BUCKET_BYTES:
            self._line.all_reduce(own)
        else:
            self._of_ranks.reduce(bucket)


def _first_for_all(rows: Tensor) -> Tensor:
    """The rows, after each of them took the value of the first."""
    rows[1:].copy_(rows[0].expand_as(rows[1:]))
    return rows


def _add_in_order(rows: Tensor) -> Tensor:
    """The sum of the rows, from the first to the last, in place of the first."""
    total = rows[0]
    for row in rows[1:]:
        total.add_(row)
    return total
