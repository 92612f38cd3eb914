"""Gradients in a few flat pieces of memory, the unit of exchange between ranks.

A parameter's place is fixed by the model alone. Each bucket has one row per logical shard of this rank, since
gradients of different shards must not be added before those of lower shards on other ranks have been.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BUCKET_BYTES = 25 * 1024 * 1024
"""all_to_all is as fast as all-reduce up to this size and falls behind above it."""
FIRST_BUCKET_BYTES = 1024 * 1024
"""The first one is small, so that the exchange begins while most of backward is still ahead."""


class Bucket:
    """Some parameters of one dtype and their gradients.

    Args:
        rows: logical shards of this rank.
        slack: elements beyond the gradients, so that a row can be cut into equal parts.
    """

    def __init__(self, parameters: list[nn.Parameter], rows: int, slack: int) -> None:
        self.parameters = parameters
        self.count = sum(parameter.numel() for parameter in parameters)
        """Elements of one row."""
        like = parameters[0]
        self.rows = torch.zeros((rows, self.count + slack), dtype=like.dtype, device=like.device)
        self._spans: list[tuple[int, int]] = []
        at = 0
        for parameter in parameters:
            self._spans.append((at, at + parameter.numel()))
            at += parameter.numel()
        self._views = [
            [self._view(row, place) for place in range(len(parameters))] for row in self.rows
        ]

    @property
    def size_bytes(self) -> int:
        """Of one shard's gradients."""
        return self.count * self.rows.element_size()

    def view(self, row: int, place: int) -> Tensor:
        """Where the gradient of the parameter at ``place`` lies for the shard at ``row``, in its shape."""
        return self._views[row][place]

    def _view(self, row: Tensor, place: int) -> Tensor:
        begin, end = self._spans[place]
        return row[begin:end].view(self.parameters[place].shape)


def make_buckets(parameters: Iterable[nn.Parameter], rows: int, slack: int) -> list[Bucket]:
    """All parameters that are trained, last ones first: in about the order in which backward reaches them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buckets: list[Bucket] = []
    group: list[nn.Parameter] = []
    size_bytes = 0
    for parameter in reversed(trained):
        limit = BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES
        full = size_bytes + parameter.nbytes > limit
        if group and (full or parameter.dtype != group[0].dtype):
            buckets.append(Bucket(group, rows, slack))
            group, size_bytes = [], 0
        group.append(parameter)
        size_bytes += parameter.nbytes
    if group:
        buckets.append(Bucket(group, rows, slack))
    return buckets
