from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distroml.errors import DistroMLError
from distroml.runtime.worker import gradient_sync
from distroml.runtime.worker.dist import Dist, StatisticsSync
from distroml.runtime.worker.gradient_sync import (
    GradientSync,
    Scratch,
    SmallScratch,
    ordered_sum,
    ordered_sum_small,
)
from distroml.runtime.worker.process_group import RankGroup
from tests.runtime.worker.rank_threads import run_ranks


def values_of(rank: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (count,), generator=generator
    )


def in_rank_order(world_size: int, count: int) -> torch.Tensor:
    total = values_of(0, count)
    for rank in range(1, world_size):
        total = total + values_of(rank, count)
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("world_size", [2, 3])
def test_both_ways_of_adding_give_the_bits_of_rank_order(world_size: int, count: int) -> None:
    def work(group: RankGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        large, small = values_of(group.rank, count), values_of(group.rank, count)
        ordered_sum(group, large, Scratch.for_values(large, group.world_size))
        note = torch.tensor([group.rank, 0.5], dtype=torch.float64)
        scratch = SmallScratch.for_values(small, note, group.world_size)
        return large, small, ordered_sum_small(group, small, note, scratch)

    expected = in_rank_order(world_size, count)
    for large, small, notes in run_ranks(world_size, work):
        assert torch.equal(large, expected)
        assert torch.equal(small, expected)
        assert notes.tolist() == [[rank, 0.5] for rank in range(world_size)]


torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 3))


def make_model() -> nn.Module:
    return copy.deepcopy(MODEL)  # not seeded per call: the rank threads share torch's generator


def train(
    group: RankGroup,
    reduction: str,
    counts: list[list[int]],
    rewrap_at: int | None = None,
) -> dict[str, torch.Tensor]:
    """Steps in which rank r holds ``counts[step][r]`` samples; the gradients of the last one."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist = Dist(group)
    generator = torch.Generator().manual_seed(1)
    for step, shares in enumerate(counts):
        if step in (0, rewrap_at):
            dist.sync = GradientSync(group, reduction)
            module = dist.sync.wrap(model, False)
        total = sum(shares)
        inputs = torch.randn(total, 6, generator=generator)
        targets = torch.randint(0, 3, (total,), generator=generator)
        begin = sum(shares[: group.rank])
        mine = slice(begin, begin + shares[group.rank]) if shares[group.rank] else slice(0, 2)
        dist.begin_step(step, 0, shares[group.rank], total, False)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs[mine]), targets[mine])
        dist.backward(loss)
        optimizer.step()
        mean, _ = dist.end_step(None)
    return {"loss": torch.tensor(mean)} | {n: p.detach() for n, p in model.named_parameters()}


def alone(counts: list[list[int]]) -> dict[str, torch.Tensor]:
    """The same steps in a world of one rank."""
    group = RankGroup(1, 0, 1, "127.0.0.1", lambda key, value: None)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dist = Dist(group)
    generator = torch.Generator().manual_seed(1)
    for step, shares in enumerate(counts):
        total = sum(shares)
        inputs = torch.randn(total, 6, generator=generator)
        targets = torch.randint(0, 3, (total,), generator=generator)
        dist.begin_step(step, 0, total, total, False)
        optimizer.zero_grad()
        dist.backward(nn.functional.cross_entropy(model(inputs), targets))
        optimizer.step()
        mean, _ = dist.end_step(None)
    return {"loss": torch.tensor(mean)} | {n: p.detach() for n, p in model.named_parameters()}


UNEVEN = [[4, 4, 4], [5, 4, 4], [3, 1, 0], [1, 0, 0], [4, 4, 4]]


@pytest.mark.parametrize("reduction", ["deterministic", "fast"])
def test_uneven_and_empty_ranks_give_the_mean_over_the_global_batch(reduction: str) -> None:
    results = run_ranks(3, lambda group: train(group, reduction, UNEVEN))
    expected = alone(UNEVEN)
    for result in results:
        for name, value in expected.items():
            assert torch.equal(result[name], results[0][name]), name
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("small_bytes", [0, 1 << 20], ids=["two exchanges", "one exchange"])
def test_wrapping_anew_keeps_the_bits(small_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(gradient_sync, "SMALL_BUCKET_BYTES", small_bytes)
    counts = [[3, 3, 2]] * 6
    whole = run_ranks(3, lambda group: train(group, "deterministic", counts))[0]
    again = run_ranks(3, lambda group: train(group, "deterministic", counts, rewrap_at=3))[0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_many_buckets_overlap_and_give_the_same_bits(monkeypatch) -> None:
    counts = [[2, 2]] * 4
    one = run_ranks(2, lambda group: train(group, "deterministic", counts))[0]
    monkeypatch.setattr(gradient_sync, "BUCKET_MIB", 0.001)
    many = run_ranks(2, lambda group: train(group, "deterministic", counts))[0]
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_plain_backward_is_refused_with_what_to_do() -> None:
    def work(group: RankGroup) -> str:
        dist = Dist(group)
        dist.sync = GradientSync(group, "deterministic")
        module = dist.sync.wrap(make_model(), False)
        dist.begin_step(0, 0, 2, 4, False)
        module(torch.ones(2, 6)).sum().backward()
        with pytest.raises(DistroMLError, match=r"must call dist\.backward\(loss\)") as caught:
            dist.end_step(None)
        return caught.value.detail

    assert len(set(run_ranks(2, work))) == 1


def test_any_rank_stops_all() -> None:
    def work(group: RankGroup) -> bool:
        dist = Dist(group)
        dist.begin_step(0, 0, 1, 3, stop=group.rank == 2)
        return dist.end_step(1.0)[1]

    assert run_ranks(3, work) == [True, True, True]


def test_statistics_become_the_weighted_mean_and_constants_keep_their_bits() -> None:
    samples = [3.0, 0.0, 1.0]

    def work(group: RankGroup) -> list[torch.Tensor]:
        rank = group.rank
        buffers = [
            torch.tensor([1.0, 5.0]) * (rank + 1),
            torch.tensor(7 if rank == 1 else 4),
            torch.full((3,), 0.1),
            torch.tensor([True, False]),
        ]
        sync = StatisticsSync(group, buffers)
        sync.start()
        sync.finish(samples)
        return buffers

    for mean, counter, constant, flags in run_ranks(3, work):
        assert mean.tolist() == [1.0 * 0.75 + 3.0 * 0.25, 5.0 * 0.75 + 15.0 * 0.25]
        assert counter.item() == 4
        assert torch.equal(constant, torch.full((3,), 0.1))
        assert flags.tolist() == [True, False]
