"""Every scheduler of torch goes on after a checkpoint as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from distroml.errors import DistroMLError
from distroml.runtime.worker import lr_schedule
from distroml.runtime.worker.state import StateBlob
from distroml.spec import convert_spec
from tests.runtime.worker.stub_adapters import Regression, Scheduled

KINDS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "step": lambda o: schedulers.StepLR(o, 3),
    "milestones": lambda o: schedulers.MultiStepLR(o, [2, 2, 9]),
    "function": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.1, 0.2, step_size_up=4),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.MultiStepLR(o, [2])], [3]
    ),
    "chain": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]
    ),
}


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: range) -> list[float]:
    found = []
    for step in steps:
        optimizer.step()
        lr_schedule.advance(scheduler, 1.0 if step % 4 else 0.5)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def built(kind: str) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    return optimizer, KINDS[kind](optimizer)


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_goes_on_as_if_never_stored(kind: str, steps: int) -> None:
    optimizer, scheduler = built(kind)
    rates(optimizer, scheduler, range(steps))
    saved = msgspec.json.decode(msgspec.json.encode(lr_schedule.dump(scheduler)))
    again, restored = built(kind)
    again.load_state_dict(optimizer.state_dict())
    lr_schedule.load(restored, saved)
    more = range(steps, steps + 20)
    assert rates(again, restored, more) == rates(optimizer, scheduler, more)


def test_what_is_no_plain_value_is_refused_by_name() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    scheduler = schedulers.StepLR(optimizer, 3)
    scheduler.secret = object()  # type: ignore[attr-defined]
    with pytest.raises(DistroMLError, match="scheduler 'secret' is a object"):
        lr_schedule.dump(scheduler)


def test_a_checkpoint_without_the_scheduler_is_refused() -> None:
    plain, scheduled = Regression(), Scheduled()
    for adapter in (plain, scheduled):
        adapter.spec = convert_spec({"entrypoint": "stub_adapters:Regression"})
    for of, into, message in (
        (plain, scheduled, "The run has a learning-rate scheduler and the checkpoint has none"),
        (scheduled, plain, "The checkpoint has a learning-rate scheduler and the run has none"),
    ):
        blob = of.serialize_state(of.new_state())
        with pytest.raises(DistroMLError, match=message):
            into.deserialize_state(StateBlob(blob.tensors, blob.values))
