from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distroml.errors import DistroMLError
from distroml.runtime.worker import buckets, gradient_sync, reduction
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import LocalBatch
from distroml.runtime.worker.buckets import Bucket
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.logical_shards import LogicalShards
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.reduction import Line, OrderedSum
from distroml.runtime.worker.state import TrainState
from distroml.runtime.worker.train import take_step
from distroml.spec import convert_spec
from tests.runtime.worker.rank_threads import run_ranks


def values_of(shard: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shard)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(
        -3, 4, (count,), generator=generator
    )


def in_shard_order(shards: int, count: int) -> torch.Tensor:
    total = values_of(0, count)
    for shard in range(1, shards):
        total = total + values_of(shard, count)
    return total


@pytest.mark.parametrize("count", [1, 3, 7, 1000])
@pytest.mark.parametrize(("shards", "world_size"), [(2, 2), (3, 3), (5, 3), (4, 1), (4, 3)])
def test_both_ways_of_adding_give_the_bits_of_shard_order(
    shards: int, world_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(group: RankGroup) -> list[Any]:
        mine = LogicalShards(shards, group.rank, world_size)
        ordered, summed = OrderedSum(group, mine), []
        for _ in ("large", "small"):
            bucket = Bucket([nn.Parameter(torch.zeros(count))], len(mine.mine), shards)
            for place, shard in enumerate(mine.mine):
                bucket.view(place, 0).copy_(values_of(shard, count))
            summed.append(bucket)
        if world_size > 1:
            ordered._reduce_large(summed[0])
            notes = torch.tensor([[shard] for shard in mine.mine], dtype=torch.float64)
            told = ordered.reduce_with_note(summed[1], notes.view(torch.uint8))
            assert told.contiguous().view(torch.float64).flatten().tolist() == list(range(shards))
        else:
            for bucket in summed:
                ordered.reduce(bucket)
        return [bucket.view(0, 0) for bucket in summed]

    expected = in_shard_order(shards, count)
    for results in run_ranks(world_size, work):
        for result in results:
            assert torch.equal(result, expected)


torch.manual_seed(0)
MODEL = nn.Sequential(
    nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 3)
)
UNEVEN = [[4, 4, 4], [5, 4, 4], [3, 1, 0], [1, 0, 2], [4, 4, 4]]


class Plain(FrameworkAdapter):
    spec = convert_spec({"entrypoint": "stub_adapters:Regression"})

    def build_model(self, spec: Any) -> nn.Module:
        return copy.deepcopy(MODEL)  # not seeded per call: the rank threads share torch's generator

    def build_optimizer(self, spec: Any, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)


def train(
    group: RankGroup,
    counts: list[list[int]],
    reduction: str = "deterministic",
    rejoin_at: int | None = None,
    adapter: FrameworkAdapter | None = None,
    line: Line | None = None,
) -> dict[str, torch.Tensor]:
    """Steps in which logical shard s holds ``counts[step][s]`` samples; the state after the last one."""
    adapter = adapter or Plain()
    state = adapter.new_state()
    dist = Dist(group, len(counts[0]))
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for step, shares in enumerate(counts):
        if step in (0, rejoin_at):
            dist.close()
            dist = Dist(group, len(counts[0]))
            unused_allowed = adapter.find_unused_parameters
            dist.attach(state.model, reduction, unused_allowed=unused_allowed, line=line)
        total = sum(shares)
        inputs = torch.randn(total + 2, 6, generator=generator)
        targets = torch.randint(0, 3, (total + 2,), generator=generator)
        parts = []
        for shard in dist.shards.mine:
            begin = sum(shares[:shard])
            shown = slice(begin, begin + (shares[shard] or 2))
            batch = (inputs[shown].repeat(2, 1), targets[shown].repeat(2))  # BatchNorm needs two
            parts.append(LocalBatch(batch, shares[shard], total, 0, False, (0.0, float(shard))))
        state.step = step
        state, totals, _ = take_step(adapter, state, dist, parts)
        loss = totals.loss
        assert totals.ids == tuple((0.0, float(shard)) for shard in range(len(shares)))
    dist.close()
    return {"loss": torch.tensor(loss)} | state.model.state_dict()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("small_bytes", [0, 1 << 20], ids=["large", "small"])
def test_the_bits_do_not_depend_on_the_number_of_ranks(
    world_size: int, small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_ranks(3, lambda group: train(group, UNEVEN))
    for module in (gradient_sync, reduction):
        monkeypatch.setattr(module, "SMALL_BYTES", small_bytes)
    fewer = run_ranks(world_size, lambda group: train(group, UNEVEN))
    for result in (*whole[1:], *fewer):
        equal(result, whole[0])


@pytest.mark.parametrize("bucket_bytes", [buckets.BUCKET_BYTES, 0], ids=["parts", "all-reduce"])
@pytest.mark.parametrize("small_bytes", [0, 1 << 20], ids=["large", "small"])
def test_fast_reduction_gives_the_mean_over_the_global_batch(
    bucket_bytes: int, small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "BUCKET_BYTES", bucket_bytes)
    for module in (gradient_sync, reduction):
        monkeypatch.setattr(module, "SMALL_BYTES", small_bytes)
    exact = run_ranks(3, lambda group: train(group, UNEVEN))[0]
    for world_size in (3, 2, 1):
        for result in run_ranks(world_size, lambda group: train(group, UNEVEN, "fast")):
            for name, value in exact.items():
                torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-5)


def test_joining_anew_keeps_the_bits() -> None:
    whole = run_ranks(3, lambda group: train(group, UNEVEN))[0]
    equal(run_ranks(3, lambda group: train(group, UNEVEN, rejoin_at=3))[0], whole)


def test_many_buckets_overlap_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    one = run_ranks(2, lambda group: train(group, UNEVEN))[0]
    for name in ("BUCKET_BYTES", "FIRST_BUCKET_BYTES"):
        monkeypatch.setattr(buckets, name, 1000)
    equal(run_ranks(2, lambda group: train(group, UNEVEN))[0], one)


class Partial(Plain):
    """Leaves a part of the model out, in a way that depends on the shard."""

    def __init__(self, leave_out: Callable[[int], bool]) -> None:
        self._leave_out = leave_out

    def train_step(
        self, state: TrainState, batch: Any, dist: Dist
    ) -> tuple[TrainState, dict[str, Any]]:
        state.optimizer.zero_grad()
        layers = list(state.model)
        if self._leave_out(dist.shard):
            layers.pop(3)
        loss = self.loss(nn.Sequential(*layers)(batch[0]), batch)
        dist.backward(loss)
        state.optimizer.step()
        return state, {}


class PartialAllowed(Partial):
    find_unused_parameters = True


def test_a_parameter_without_gradient_is_refused_by_name() -> None:
    with pytest.raises(DistroMLError, match=r"No gradient for 2 parameters \(3\.bias, 3\.weight\)"):
        run_ranks(2, lambda group: train(group, [[2, 2]], adapter=Partial(lambda shard: True)))


@pytest.mark.parametrize("world_size", [2, 1])
def test_parameters_may_be_left_out_where_that_is_allowed(world_size: int) -> None:
    counts = [[2, 2]] * 3

    def left_out(leave_out: Callable[[int], bool]) -> dict[str, torch.Tensor]:
        adapter = PartialAllowed(leave_out)
        return run_ranks(world_size, lambda group: train(group, counts, adapter=adapter))[0]

    nowhere_used = left_out(lambda shard: True)
    assert torch.equal(nowhere_used["3.weight"], MODEL.state_dict()["3.weight"])
    used_by_one = left_out(lambda shard: shard == 0)
    assert not torch.equal(used_by_one["3.weight"], MODEL.state_dict()["3.weight"])
    assert all(value.isfinite().all() for value in used_by_one.values())


class Unweighted(Plain):
    def train_step(
        self, state: TrainState, batch: Any, dist: Dist
    ) -> tuple[TrainState, dict[str, Any]]:
        self.loss(state.model(batch[0]), batch).backward()
        return state, {}


def test_a_plain_backward_is_refused_with_what_to_do() -> None:
    with pytest.raises(DistroMLError, match=r"must call dist\.backward\(loss\)"):
        run_ranks(2, lambda group: train(group, [[2, 2]], adapter=Unweighted()))


class Measured(Plain):
    """Gives backward a metric, and returns another."""

    def train_step(
        self, state: TrainState, batch: Any, dist: Dist
    ) -> tuple[TrainState, dict[str, Any]]:
        dist.backward(self.loss(state.model(batch[0]), batch), shard=float(dist.shard))
        return state, {"other": 1.0}


@pytest.mark.parametrize("world_size", [3, 2, 1])
def test_metrics_given_to_backward_are_means_over_the_batch(world_size: int) -> None:
    def work(group: RankGroup) -> dict[str, float]:
        adapter = Measured()
        state = adapter.new_state()
        dist = Dist(group, 3)
        dist.attach(state.model, "deterministic", unused_allowed=False)
        batch = (torch.ones(2, 6), torch.zeros(2, dtype=torch.int64))
        parts = [LocalBatch(batch, shard, 3, 0, False) for shard in dist.shards.mine]
        totals = take_step(adapter, state, dist, parts)[1]
        return totals.metrics

    for metrics in run_ranks(world_size, work):
        assert metrics == {"shard": (0 * 0 + 1 * 1 + 2 * 2) / 3}


def test_flags_of_any_rank_reach_all() -> None:
    def work(group: RankGroup) -> int:
        dist = Dist(group)
        state = Plain().new_state()
        part = LocalBatch(None, 1, 3, 0, False)
        dist.begin_step(state, [part], flags=2 if group.rank == 2 else 0)
        dist.begin_shard(state, 0)
        dist.end_shard(1.0)
        totals = dist.end_step()
        assert totals.loss == 1.0
        return totals.flags

    assert run_ranks(3, work) == [2, 2, 2]


@pytest.mark.parametrize("shards", [3, 5])
@pytest.mark.parametrize(
    ("ready", "agreed"),
    [((2, 2, 2), 2), ((2, None, 2), 0), ((2, 0, 2), 0), ((1, 2, 2), 1)],
    ids=str,
)
def test_a_request_to_save_is_answered_once_every_rank_can(
    ready: tuple[int | None, ...], agreed: int, shards: int
) -> None:
    def work(group: RankGroup) -> tuple[int, bool, bool]:
        dist, state = Dist(group, shards), Plain().new_state()
        parts = [LocalBatch(None, 1, shards, 0, False) for _ in dist.shards.mine]
        asked: list[int] = []

        def own() -> int | None:
            asked.append(dist.shard)
            return ready[group.rank]

        dist.begin_step(state, parts, 0, own)
        for place in range(len(parts)):
            dist.begin_shard(state, place)
            assert asked == [], "asked before the last shard"
            dist.end_shard(1.0)
        totals = dist.end_step()
        assert totals.flags == 0
        assert len(asked) == 1
        return totals.save_request, totals.any_busy, dist.busy

    any_busy = None in ready
    expected = [(agreed, any_busy, one is None) for one in ready]
    assert run_ranks(3, work) == expected


@pytest.mark.parametrize(("shards", "world_size"), [(4, 4), (4, 3), (7, 3), (5, 1)])
def test_each_shard_has_one_rank(shards: int, world_size: int) -> None:
    ranks = [LogicalShards(shards, rank, world_size) for rank in range(world_size)]
    assert [shard for one in ranks for shard in one.mine] == list(range(shards))
    assert {one.most for one in ranks} == {len(ranks[0].mine)}


def test_more_ranks_than_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share 2 logical shards"):
        LogicalShards(2, 0, 3)
