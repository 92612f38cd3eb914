"""Running statistics (BatchNorm and the like): the same on all ranks, and as if nothing had been cut.

Each logical shard's forward pass starts from the statistics that the step began with. Those of all shards are then
averaged, weighted by samples and added in shard order. They are linear in each batch's statistics, so this is what
the whole batch would have added. A step that is cut short puts back what it began with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The persistent buffers of a model during a step.

    Elements that are equal in all shards (constants) keep their bits, and counters take the value of the first
    shard that had samples. A shard without samples weighs nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [
            tensor
            for tensor in model.state_dict(keep_vars=True).values()
            if not isinstance(tensor, nn.Parameter)
        ]
        # widest first, so that each lies at a multiple of its own size among the packed bytes
        self._buffers = sorted(buffers, key=lambda buffer: -buffer.element_size())
        self.size_bytes = sum(buffer.nbytes for buffer in self._buffers)
        """Of one shard's statistics, packed."""
        self._before = torch.empty(self.size_bytes, dtype=torch.uint8)

    def remember(self) -> None:
        """A step begins."""
        self.pack(self._before)

    def restore(self) -> None:
        """As when the step began."""
        self._write(self._before)

    def pack(self, target: Tensor) -> None:
        """Copy the present values to the bytes of ``target``."""
        at = 0
        for buffer in self._buffers:
            target[at : at + buffer.nbytes].copy_(_bytes_of(buffer))
            at += buffer.nbytes

    def combine(self, packed: Tensor, samples: list[float]) -> None:
        """Take the mean over the shards' values.

        Args:
            packed: uint8 of shape [shards, size_bytes], in shard order.
            samples: of each shard.
        """
        if not self._buffers:
            return
        holders = [shard for shard, count in enumerate(samples) if count > 0]
        shares = torch.tensor([samples[shard] for shard in holders], dtype=torch.float64)
        shares /= shares.sum()
        packed, at = packed[holders].contiguous(), 0
        for buffer in self._buffers:
            rows = packed[:, at : at + buffer.nbytes].contiguous().view(buffer.dtype)
            at += buffer.nbytes
            combined = rows[0]
            if rows.is_floating_point() and len(holders) > 1:
                mean = rows[0].double() * shares[0]
                for row, share in zip(rows[1:], shares[1:], strict=True):
                    mean += row.double() * share
                same = (rows == rows[0]).all(dim=0)
                combined = torch.where(same, combined, mean.to(buffer.dtype))
            buffer.data.copy_(combined.view(buffer.shape))

    def _write(self, packed: Tensor) -> None:
        at = 0
        for buffer in self._buffers:
            values = packed[at : at + buffer.nbytes].clone().view(buffer.dtype)
            buffer.data.copy_(values.view(buffer.shape))
            at += buffer.nbytes


def _bytes_of(buffer: Tensor) -> Tensor:
    return buffer.detach().reshape(-1).view(torch.uint8)
