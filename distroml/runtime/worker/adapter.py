"""``FrameworkAdapter``: what a user may replace of a training run.

A user's class needs ``build_model`` and ``build_dataset``; everything else has a default. The worker creates
the adapter, sets ``spec``, and calls, in this order::

    init_distributed(plan)                      once, before the ranks meet
    build_dataset(spec), build_holdout(spec)    or build_dataloader(spec, shard, shards)
    build_model(spec), build_optimizer(…), build_scheduler(…)    once per process
    set_up(dist)                                in each generation, on all of its ranks, before any data is read
    restore_state(state, blob)                  with a checkpoint, or to catch up with another rank
    train_step(state, batch, dist)              each step and logical shard; uses forward and loss
    evaluate(state, dist)                       at the end of each epoch; uses forward, loss and measure
    serialize_state(state)                      for each checkpoint, for new ranks and for the final digest

Each batch is cut into ``spec.resources.workers`` logical shards. With as many ranks each computes one; with fewer
(elastic jobs) some compute several, and ``train_step`` runs for each of them up to ``dist.backward``.

Before each call of ``train_step`` all random generators are seeded from (seed, step, logical shard): a step does the
same after a resume, or on another rank, as it would have done undisturbed, and no generator state has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distroml.errors import DistroMLError
from distroml.runtime.control import WorkerPlan
from distroml.runtime.worker import lr_schedule, optimizer_state
from distroml.runtime.worker.batches import Dataset, as_dataset
from distroml.runtime.worker.device import CPU
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.evaluation import evaluate
from distroml.runtime.worker.state import StateBlob, TrainState
from distroml.spec import JobSpec


class FrameworkAdapter:
    """Base of all adapters; see the module for when each method is called."""

    spec: JobSpec
    """The job's specification, set before anything else is called."""
    device: torch.device = CPU
    """Where the worker computes, set like ``spec``. Models are put there and batches come from there."""
    find_unused_parameters = False
    """True where a step may leave parameters of the model without gradient; costs one small exchange per step."""
    evaluation_batch = 64
    """Samples per forward pass of the default ``evaluate``."""

    # --- what to train -----------------------------------------------------------------------------------------

    def build_model(self, spec: JobSpec) -> nn.Module:
        """A new model. Called with seeded generators; rank 0's initial weights reach all ranks."""
        raise NotImplementedError(_missing(self, "build_model(self, spec)"))

    def build_dataset(self, spec: JobSpec) -> Dataset | Sequence[Any]:
        """The training samples. Order and sharing over the ranks are the runtime's (DESIGN §8)."""
        raise NotImplementedError(
            _missing(self, "build_dataset(self, spec)", "build_dataloader(self, spec, rank, world)")
        )

    def build_dataloader(self, spec: JobSpec, shard: int, shards: int) -> Iterable[Any] | None:
        """One logical shard's batches of one epoch, for data that has no index; None (default): ``build_dataset``.

        It is iterated once per epoch, after seeding from (seed, epoch, shard), and must then yield the same
        batches again: a resume skips those already consumed. An epoch ends when all shards are at their end.
        """
        return None

    def build_holdout(self, spec: JobSpec) -> Dataset | Sequence[Any] | None:
        """Samples for ``evaluate``, never trained on; None (default): no evaluation."""
        return None

    def build_optimizer(self, spec: JobSpec, model: nn.Module) -> Optimizer:
        """The optimizer named by ``spec.hyperparameters``."""
        knobs = spec.hyperparameters
        common: dict[str, Any] = {"lr": knobs.lr, "weight_decay": knobs.weight_decay, "fused": True}
        if knobs.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), momentum=knobs.momentum, **common)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[knobs.optimizer]
        return kind(model.parameters(), **common)

    def build_scheduler(self, spec: JobSpec, optimizer: Optimizer) -> LRScheduler | None:
        """What changes the learning rates; None (default): nothing.

        The runtime calls its ``step`` once after each step (with the mean loss of the global batch where it is a
        ``ReduceLROnPlateau``), so ``train_step`` must not.
        """
        return None

    def init_distributed(self, plan: WorkerPlan) -> None:
        """Prepare the process (devices, libraries); its rank may change later, the process stays."""

    def set_up(self, dist: Dist) -> None:
        """Work of all ranks together, such as fetching a dataset once for all of them; nothing by default.

        Called on each rank at the start of each generation, so after each recovery too, when the others are there and
        before anything is read of the dataset: ``len`` and ``batch`` come later, ``build_dataset`` has been called.
        It counts into the time in which a generation must train (``start_timeout_ms``).
        """

    # --- one step ----------------------------------------------------------------------------------------------

    def train_step(
        self, state: TrainState, batch: Any, dist: Dist
    ) -> tuple[TrainState, dict[str, Any]]:
        """Train on one logical shard of one global batch.

        Call ``dist.backward`` and change parameters only after it: on a rank with several shards, what follows runs
        once, with the gradients of all. Nothing that follows may wait for other ranks. Each step begins without
        gradients, whatever the one before has left: they cannot be gathered over several steps. ``batch`` is never
        empty: where the shard is, it is a stand-in that ``dist.backward`` weighs zero (``dist.samples`` is then 0).

        Returns:
            The state and further means over the shard's samples. Means that are to be exact on any number of ranks
            are given to ``dist.backward(loss, name=value)`` instead. A value is one number of any kind (Python, numpy,
            torch); of more than 60 names in all the first ones in name order are kept.
        """
        state.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.forward(state.module, batch), batch)
        dist.backward(loss)
        state.optimizer.step()
        return state, {}

    def forward(self, module: nn.Module, batch: Any) -> Any:
        """Outputs of the model; by default ``module(inputs)`` for a pair (inputs, targets)."""
        return module(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Mean loss over the batch; by default the cross-entropy of class scores [..., classes]."""
        targets = batch[1]
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def measure(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """Further means over a held-out batch; by default "accuracy" where targets are classes."""
        targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return {}
        if not isinstance(outputs, Tensor) or outputs.shape[:-1] != targets.shape:
            return {}
        return {"accuracy": (outputs.argmax(-1) == targets).double().mean()}

    def evaluate(self, state: TrainState, dist: Dist) -> dict[str, float]:
        """Metrics of the held-out samples, equal on all ranks and independent of their number.

        By default "eval_loss" and what ``measure`` adds; nothing without ``build_holdout``. A value is one number of any
        kind; of more than 64 names the first ones in name order are kept.
        """
        return evaluate(self, state, dist)

    @cached_property
    def holdout(self) -> Dataset | None:
        """What ``build_holdout`` made, built once."""
        samples = self.build_holdout(self.spec)
        return None if samples is None else as_dataset(samples)

    # --- the state at rest -------------------------------------------------------------------------------------

    def new_state(self) -> TrainState:
        """A state that has completed no step."""
        model = self.build_model(self.spec).to(self.device)
        optimizer = self.build_optimizer(self.spec, model)
        scheduler = self.build_scheduler(self.spec, optimizer)
        return TrainState(model, optimizer, module=model, scheduler=scheduler)

    def serialize_state(self, state: TrainState) -> StateBlob:
        """Tensors ``model.<name>`` and ``optimizer.<parameter>.<slot>``; hyperparameters and scheduler as values."""
        tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
        slots, values = optimizer_state.dump(state.optimizer, state.model)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in slots.items()}
        blob = {"optimizer": values, "user": state.values}
        if state.scheduler is not None:
            blob["scheduler"] = lr_schedule.dump(state.scheduler)
        return StateBlob(tensors, blob)

    def deserialize_state(self, blob: StateBlob) -> TrainState:
        """A new state, as the one that ``serialize_state`` made ``blob`` of.

        Raises:
            DistroMLError: the blob is of another model or optimizer; names what differs.
        """
        return self._restored(self.new_state(), blob)

    def restore_state(self, state: TrainState, blob: StateBlob) -> TrainState:
        """``state`` made equal to the one that ``serialize_state`` made ``blob`` of, in place where it can be.

        An adapter that overrides ``deserialize_state`` gets that called instead.

        Raises:
            DistroMLError: the blob is of another model or optimizer; names what differs.
        """
        if type(self).deserialize_state is not FrameworkAdapter.deserialize_state:
            return self.deserialize_state(blob)
        return self._restored(state, blob)

    def _restored(self, state: TrainState, blob: StateBlob) -> TrainState:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in blob.tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        try:
            state.model.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise DistroMLError(
                f"The checkpoint does not fit the model that build_model made: {error}"
            ) from None
        optimizer_state.load(
            state.optimizer, state.model, parts["optimizer"], blob.values["optimizer"]
        )
        saved: Any = blob.values.get("scheduler")
        if (saved is None) != (state.scheduler is None):
            has, lacks = ("run", "checkpoint") if saved is None else ("checkpoint", "run")
            raise DistroMLError(
                f"The {has} has a learning-rate scheduler and the {lacks} has none."
            )
        if state.scheduler is not None:
            lr_schedule.load(state.scheduler, saved)
        state.values = dict(blob.values.get("user", {}))
        return state


def _missing(adapter: FrameworkAdapter, *methods: str) -> str:
    return f"{type(adapter).__qualname__} must define {' or '.join(methods)}"
