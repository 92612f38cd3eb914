"""Running statistics (BatchNorm and the like): the same on all ranks, and as if nothing had been cut.

Each logical shard's forward pass starts from the statistics that the step began with. Those of all shards are then
averaged, weighted by samples and added in shard order. They are linear in each batch's statistics, so this is what
the whole batch would have added. A step that is cut short puts back what it began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distroml.errors import DistroMLError


class RunningStatistics:
    """The persistent buffers of a model during a step.

    Elements that are equal in all shards (constants) keep their bits, and counters take the value of the first
    shard that had samples. A shard without samples weighs nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        # widest first, so that each lies at a multiple of its own size among the packed bytes
        self._buffers = sorted(_buffers_of(model), key=lambda one: -one.first.element_size())
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
            present = buffer.present()
            target[at : at + buffer.nbytes].copy_(present.detach().reshape(-1).view(torch.uint8))
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
            rows = packed[:, at : at + buffer.nbytes].contiguous().view(buffer.first.dtype)
            at += buffer.nbytes
            combined = rows[0]
            if rows.is_floating_point() and len(holders) > 1:
                mean = rows[0].double() * shares[0]
                for row, share in zip(rows[1:], shares[1:], strict=True):
                    mean += row.double() * share
                same = (rows == rows[0]).all(dim=0)
                combined = torch.where(same, combined, mean.to(combined.dtype))
            buffer.put(combined)

    def _write(self, packed: Tensor) -> None:
        at = 0
        for buffer in self._buffers:
            buffer.put(packed[at : at + buffer.nbytes].clone().view(buffer.first.dtype))
            at += buffer.nbytes


@dataclass(frozen=True)
class _Buffer:
    """A place in the model. Its module may put another tensor there in any forward pass."""

    module: nn.Module
    name: str
    path: str
    first: Tensor
    """What was there first. Values are put into this one: the memory of another may belong to something else."""

    @property
    def nbytes(self) -> int:
        return self.first.nbytes

    def present(self) -> Tensor:
        """What is there now."""
        tensor = self.module._buffers[self.name]
        if tensor is None or (tensor.dtype, tensor.shape) != (self.first.dtype, self.first.shape):
            raise DistroMLError(
                f"The buffer '{self.path}' was {_form_of(self.first)} and became {_form_of(tensor)}; "
                "register it as it is to be in the end."
            )
        return tensor

    def put(self, values: Tensor) -> None:
        self.first.data.copy_(values.view(self.first.shape))
        self.module._buffers[self.name] = self.first


def _buffers_of(model: nn.Module) -> Iterator[_Buffer]:
    for prefix, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield _Buffer(module, name, f"{prefix}.{name}" if prefix else name, tensor)


def _form_of(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
