"""Which parts of each global batch this rank computes, whatever the size of the world.

Each batch is cut into a fixed number of **logical shards**, by default as many as the job asked for workers. A shard
is computed as a unit: its samples, its randomness, its gradient. With as many ranks as shards each rank has one;
with fewer, some have several, one after the other. What is added up over the shards is added in their order. So the
result does not depend on how many ranks there are, nor on which of them computed what.
"""

from __future__ import annotations

from dataclasses import dataclass

from distroml.runtime.data.order import rank_slice


@dataclass(frozen=True)
class LogicalShards:
    """``count`` shards, dealt out in order: rank r has a contiguous range of them, the first ranks one more."""

    count: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= self.count:
            raise ValueError(
                f"{self.world_size} ranks cannot share {self.count} logical shards; each needs one"
            )

    def of_rank(self, rank: int) -> range:
        """The shards of a rank; never empty."""
        return range(*rank_slice(self.count, rank, self.world_size))

    @property
    def mine(self) -> range:
        return self.of_rank(self.rank)

    @property
    def most(self) -> int:
        """Shards of the rank that has most: rank 0."""
        return len(self.of_rank(0))

    @property
    def sizes(self) -> list[int]:
        """Shards of each rank."""
        return [len(self.of_rank(rank)) for rank in range(self.world_size)]

    def rows(self) -> list[int]:
        """Where, in rows gathered from all ranks with ``most`` from each, the shards are; in shard order."""
        return [
            rank * self.most + place
            for rank, size in enumerate(self.sizes)
            for place in range(size)
        ]
