"""What training changes: ``TrainState`` while it runs, ``StateBlob`` when it is at rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass
class TrainState:
    """Everything that a step may change. Equal on all ranks at each step boundary."""

    model: nn.Module
    """The bare model: its parameters and buffers are what is saved."""
    optimizer: Optimizer
    module: nn.Module
    """What a train step calls: ``model``, unless the adapter put something around it."""
    scheduler: LRScheduler | None = None
    """Of learning rates; the runtime moves it on once after each step."""
    step: int = 0
    """Steps completed."""
    epoch: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    """The user's own JSON-able values; saved and restored with the tensors."""


@dataclass(frozen=True)
class StateBlob:
    """A state at rest: named tensors and JSON-able values; no code, nothing pickled.

    Tensors may still be the live ones: whoever keeps a blob over a step copies them.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]
