from __future__ import annotations

import pytest
import torch
from torch import nn

from distroml.errors import DistroMLError
from distroml.runtime.worker.statistics import RunningStatistics


class Buffered(nn.Module):
    def __init__(self, shard: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, 5.0]) * (shard + 1))
        self.register_buffer("counter", torch.tensor(7 if shard == 1 else 4))
        self.register_buffer("constant", torch.full((3,), 0.1))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("strided", (torch.arange(6.0).view(2, 3) + shard).t())


def packed(statistics: RunningStatistics) -> torch.Tensor:
    target = torch.zeros(statistics.size_bytes, dtype=torch.uint8)
    statistics.pack(target)
    return target


def test_the_mean_is_weighted_by_samples_and_constants_keep_their_bits() -> None:
    shards = torch.stack([packed(RunningStatistics(Buffered(shard))) for shard in range(3)])
    model = Buffered(1)
    RunningStatistics(model).combine(shards, [3.0, 0.0, 1.0])
    assert model.mean.tolist() == [1.0 * 0.75 + 3.0 * 0.25, 5.0 * 0.75 + 15.0 * 0.25]
    assert model.counter.item() == 4
    assert torch.equal(model.constant, torch.full((3,), 0.1))
    assert model.flags.tolist() == [True, False]
    assert torch.equal(model.strided, (torch.arange(6.0).view(2, 3) + 0.5).t())


def test_a_step_that_is_cut_short_leaves_no_trace() -> None:
    model, untouched = Buffered(0), Buffered(0)
    statistics = RunningStatistics(model)
    statistics.remember()
    model.mean.add_(1)
    model.counter.add_(1)
    model.strided.mul_(2)
    statistics.restore()
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


class Reassigning(nn.Module):
    """Puts new tensors in the place of its buffers, as many modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("latest", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.center = self.center * 0.5 + inputs.mean(0)
        self.latest = self.weight.detach()
        return inputs * self.weight


def test_a_buffer_that_was_reassigned_is_put_back_and_nothing_else() -> None:
    model = nn.Sequential(Reassigning())
    statistics = RunningStatistics(model)
    statistics.remember()
    for _ in range(2):
        model(torch.ones(3, 2))
        statistics.restore()
        assert model[0].center.tolist() == model[0].latest.tolist() == [0.0, 0.0]
        assert model[0].weight.tolist() == [1.0, 1.0], "one buffer was the same memory"


def test_a_buffer_that_was_reassigned_takes_the_mean_over_the_shards() -> None:
    rows = []
    for shard in range(2):
        other = Reassigning()
        statistics = RunningStatistics(other)
        other(torch.full((3, 2), float(shard)))
        rows.append(packed(statistics))
    model = Reassigning()
    statistics = RunningStatistics(model)
    model(torch.full((3, 2), 7.0))
    statistics.combine(torch.stack(rows), [3.0, 1.0])
    assert model.center.tolist() == [0.25, 0.25]
    assert packed(statistics).equal(packed(RunningStatistics(model)))


def test_a_buffer_that_changed_its_shape_is_named() -> None:
    model = nn.Sequential(Reassigning())
    statistics = RunningStatistics(model)
    model[0].center = torch.zeros(3)
    with pytest.raises(DistroMLError, match=r"buffer '0\.center' .* torch\.float32 \[3\]"):
        statistics.remember()
