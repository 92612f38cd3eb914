"""A step that is cut short, wherever that happens, leaves nothing behind: the bits are those of an undisturbed run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distroml.errors import DistroMLError
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import LocalBatch
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import CollectiveBroken
from distroml.runtime.worker.state import TrainState
from distroml.runtime.worker.train import take_step
from distroml.spec import convert_spec
from tests.runtime.worker.rank_threads import run_ranks

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
Trouble = Callable[[Dist], object]


def undisturbed(dist: Dist) -> None:
    """No trouble."""


class ZeroesLast(FrameworkAdapter):
    """Clears gradients at the end of a step, as many scripts do."""

    spec = convert_spec({"entrypoint": "stub_adapters:Regression"})

    def __init__(self) -> None:
        self.before: Trouble = undisturbed
        self.in_backward: Trouble = undisturbed
        self.after: Trouble = undisturbed

    def build_model(self, spec: Any) -> nn.Module:
        return copy.deepcopy(MODEL)

    def build_optimizer(self, spec: Any, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(
        self, state: TrainState, batch: Any, dist: Dist
    ) -> tuple[TrainState, dict[str, Any]]:
        self.before(dist)
        outputs = state.model(batch[0])
        outputs.register_hook(lambda gradient: self.in_backward(dist))
        dist.backward(self.loss(outputs, batch))
        state.optimizer.step()
        self.after(dist)
        state.optimizer.zero_grad()
        return state, {}


def parts_of(dist: Dist, step: int) -> list[LocalBatch]:
    generator = torch.Generator().manual_seed(step)
    count = dist.shards.count
    inputs = torch.randn(count, 4, 6, generator=generator)
    targets = torch.randint(0, 3, (count, 4), generator=generator)
    return [
        LocalBatch((inputs[shard], targets[shard]), 4, 4 * count, 0, False)
        for shard in dist.shards.mine
    ]


class Ranks:
    """Some ranks, by default with a logical shard each, and their states."""

    def __init__(self, world_size: int, shards: int | None = None) -> None:
        self.shards = shards
        self.adapters = [ZeroesLast() for _ in range(world_size)]
        self.states = [adapter.new_state() for adapter in self.adapters]

    def train(self, until: int) -> list[dict[str, Tensor]]:
        """From the states' step on, in a generation of its own; the weights of each rank."""
        return run_ranks(len(self.states), lambda group: self._live(group, until))

    def _live(self, group: RankGroup, until: int) -> dict[str, Tensor]:
        adapter, state = self.adapters[group.rank], self.states[group.rank]
        dist = Dist(group, self.shards)
        dist.attach(state.model, "deterministic", unused_allowed=False)
        try:
            while state.step < until:
                take_step(adapter, state, dist, parts_of(dist, state.step))
                state.step += 1
        finally:
            dist.close()
        return state.model.state_dict()


def end_generation(dist: Dist) -> None:
    dist.group.abort("a rank is gone")


@pytest.mark.parametrize("place", ["before", "in_backward"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_a_step_that_is_cut_short_are_not_added_to_the_next(
    world_size: int, place: str
) -> None:
    expected = Ranks(world_size).train(until=3)[0]
    ranks = Ranks(world_size)
    ranks.train(until=1)
    setattr(ranks.adapters[0], place, end_generation)
    with pytest.raises(CollectiveBroken):
        ranks.train(until=2)
    assert {state.step for state in ranks.states} == {1}
    setattr(ranks.adapters[0], place, undisturbed)
    for weights in ranks.train(until=3):
        for name, value in weights.items():
            assert torch.equal(value, expected[name]), name


EXCHANGES: dict[str, Trouble] = {
    "barrier": lambda dist: dist.barrier("saved"),
    "agree": lambda dist: dist.agree("rows", 1),
    "all_gather": lambda dist: dist.all_gather([1.0]),
    "weighted_mean": lambda dist: dist.weighted_mean([1.0], 1.0),
    "group": lambda dist: dist.group.barrier(),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_moved_the_parameters_can_wait_for_nobody(
    world_size: int, exchange: str
) -> None:
    ranks = Ranks(world_size)
    for adapter in ranks.adapters:
        adapter.after = EXCHANGES[exchange]
    with pytest.raises(DistroMLError, match=rf"dist\.{exchange} .* after dist\.backward"):
        ranks.train(until=1)


def test_a_rank_that_has_one_shard_may_exchange_before_backward() -> None:
    ranks = Ranks(2)
    for adapter in ranks.adapters:
        adapter.before = EXCHANGES["all_gather"]
    ranks.train(until=2)


def test_ranks_that_have_several_shards_may_not_exchange_in_a_step() -> None:
    ranks = Ranks(1, shards=2)
    ranks.adapters[0].before = EXCHANGES["all_gather"]
    with pytest.raises(DistroMLError, match=r"dist\.all_gather .* several logical shards"):
        ranks.train(until=1)


def test_a_state_between_two_steps_is_passed_off_as_neither() -> None:
    """A group that an adapter kept is not refused to it."""
    ranks, kept = Ranks(1), []
    adapter = ranks.adapters[0]
    adapter.before = lambda dist: kept.append(dist.group)

    def exchange(dist: Dist) -> None:
        kept[0].abort("a rank is gone")
        kept[0].barrier()

    adapter.after = exchange
    with pytest.raises(DistroMLError, match=r"after dist\.backward.*a rank is gone"):
        ranks.train(until=1)
