"""Users' adapters, good and bad, for worker tests; imported by real workers as entrypoints."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

import distroml
from distroml.runtime.checkpoint.stores.file import FileStore

NOT_A_CLASS = 1


class Lines:
    """Points on a plane with noise-free targets: regression."""

    digest = "lines"

    def __init__(self, samples: int) -> None:
        places = torch.arange(samples, dtype=torch.float32)
        self.inputs = torch.stack([torch.sin(places), torch.cos(places)], dim=1)
        self.targets = self.inputs @ torch.tensor([[1.0], [-2.0]]) + 0.5

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(indices)
        return self.inputs[rows], self.targets[rows]


class Regression(distroml.FrameworkAdapter):
    """A linear model; its number of samples comes from the environment."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        return nn.Linear(2, 1)

    def build_dataset(self, spec: distroml.JobSpec) -> Lines:
        return Lines(int(os.environ.get("SAMPLES", "40")))

    def loss(self, outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (outputs - batch[1]).square().mean()


class Meets(Regression):
    """Rank 0 does for all ranks what the file ``go`` allows it; they meet, and agree on a value."""

    def set_up(self, dist) -> None:  # type: ignore[no-untyped-def]
        place = Path(os.environ["MEETING_PLACE"])
        print(f"rank {dist.rank} sets up", flush=True)
        deadline_s = time.monotonic() + 60.0
        while dist.rank == 0 and not (place / "go").exists():
            assert time.monotonic() < deadline_s
            dist.group.check()
            time.sleep(0.01)
        if dist.rank == 0:
            (place / "data").touch()
        dist.barrier("data", timeout_s=float(os.environ.get("MEETING_TIMEOUT_S", "60")))
        assert (place / "data").exists()
        print("agreed on", dist.agree("value", 10 * dist.rank), flush=True)


class TellsWhatIsLoaded(Regression):
    """Fails, and says whether the library of S3 was there before."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        raise RuntimeError(f"aiobotocore loaded: {'aiobotocore.session' in sys.modules}")


class WritesToAClosedPipe(Regression):
    """As Gloo does when another thread has shut its sockets down."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        read, write = os.pipe()
        os.close(read)
        try:
            os.write(write, b"x")
        except BrokenPipeError:
            return super().build_model(spec)
        raise AssertionError("somebody read it")


class Normalised(Regression):
    """Has running statistics, dropout and a metric of its own; draws from every generator."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 1)
        )

    def train_step(self, state, batch, dist):  # type: ignore[no-untyped-def]
        state.values["steps_seen"] = state.values.get("steps_seen", 0) + 1
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        state.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(state.module(batch[0]), batch) * (1 + 0.01 * noise)
        dist.backward(loss)
        state.optimizer.step()
        return state, {"loss": loss.detach(), "noise": noise}


class Scheduled(Regression):
    """A warm-up, then a rate that falls at milestones."""

    def build_scheduler(
        self, spec: distroml.JobSpec, optimizer: torch.optim.Optimizer
    ) -> LRScheduler:
        warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        falling = lr_scheduler.MultiStepLR(optimizer, [4, 9], gamma=0.5)
        return lr_scheduler.SequentialLR(optimizer, [warm, falling], [5])


class Frozen(Regression):
    """All but the last layer stays as it is."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(2, 1000), nn.ReLU(), nn.Linear(1000, 100), nn.Linear(100, 1)
        )
        model[:3].requires_grad_(False)
        return model

    def build_optimizer(self, spec: distroml.JobSpec, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model[3].parameters(), lr=spec.hyperparameters.lr)


class Loaded(Regression):
    """Brings its own shuffling data loader; ranks hold different numbers of batches."""

    def build_dataloader(self, spec: distroml.JobSpec, rank: int, world_size: int) -> DataLoader:
        lines = Lines(40)
        mine = slice(rank, None, world_size) if rank else slice(0, 12)
        dataset = TensorDataset(lines.inputs[mine], lines.targets[mine])
        return DataLoader(dataset, batch_size=4, shuffle=True)


class Single(Regression):
    """A dataset that only knows single samples."""

    def build_dataset(self, spec: distroml.JobSpec) -> list[tuple[torch.Tensor, torch.Tensor]]:
        lines = Lines(20)
        return [(lines.inputs[i], lines.targets[i]) for i in range(len(lines))]


class Raises(Regression):
    """Fails on one rank in the middle of training."""

    def train_step(self, state, batch, dist):  # type: ignore[no-untyped-def]
        if dist.step == 3 and dist.rank == dist.world_size - 1:
            raise ValueError("the user's own bug")
        return super().train_step(state, batch, dist)


class Unweighted(Regression):
    """Calls backward itself, which would weigh samples wrongly."""

    def train_step(self, state, batch, dist):  # type: ignore[no-untyped-def]
        loss = self.loss(state.module(batch[0]), batch)
        loss.backward()
        state.optimizer.step()
        return state, {"loss": loss.detach()}


class Disagreeing(Regression):
    """Sees other data on each node."""

    def build_dataset(self, spec: distroml.JobSpec) -> Lines:
        lines = Lines(40)
        lines.digest = f"lines-of-process-{os.getpid()}"
        return lines


class Endless(Regression):
    """Trains until it is stopped."""

    def build_holdout(self, spec: distroml.JobSpec) -> Lines:
        return Lines(8)


class EvaluatesInNumpy(Regression):
    """Its metrics are numbers, and no floats."""

    def train_step(self, state, batch, dist):  # type: ignore[no-untyped-def]
        state, _ = super().train_step(state, batch, dist)
        return state, {f"norm_{number:03}": np.float32(0.25) for number in range(100)}

    def evaluate(self, state, dist):  # type: ignore[no-untyped-def]
        return {"score": np.float64(0.5), "worst": torch.tensor(2.0)}


class EvaluatesForLong(Regression):
    """Until the file ``GO`` is there."""

    def evaluate(self, state, dist):  # type: ignore[no-untyped-def]
        while not os.path.exists(os.environ["GO"]):
            dist.group.check()
            time.sleep(0.01)
        return {}


class EvaluatesToText(Regression):
    def evaluate(self, state, dist):  # type: ignore[no-untyped-def]
        return {"score": 0.5, "grade": "good"}


class WaitsForItsDisk(Regression):
    """Each forward pass takes as long as the last shard takes to be written."""

    def forward(self, module, batch):  # type: ignore[no-untyped-def]
        for thread in threading.enumerate():
            if thread.name == "shard-write":
                thread.join()
        return super().forward(module, batch)


class SavesSlowly(Endless):
    """Rank 1 does so until the file ``GO`` is there."""

    def set_up(self, dist):  # type: ignore[no-untyped-def]
        if dist.rank == 1:
            FileStore.stage = self._stage_late(FileStore.stage)

    @staticmethod
    def _stage_late(stage):  # type: ignore[no-untyped-def]
        def late(*args, **keywords):  # type: ignore[no-untyped-def]
            while not os.path.exists(os.environ["GO"]):
                time.sleep(0.01)
            return stage(*args, **keywords)

        return late


class NoModel(distroml.FrameworkAdapter):
    def build_dataset(self, spec: distroml.JobSpec) -> Lines:
        return Lines(8)


class NotAnAdapter:
    pass


class Prints(Regression):
    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        print("printed by the user")
        print("stdin", repr(sys.stdin.read()))
        return super().build_model(spec)


class TellsOfPacking(Regression):
    """A state that costs something to serialize."""

    def serialize_state(self, state):  # type: ignore[no-untyped-def]
        print(f"packs step {state.step}", flush=True)
        return super().serialize_state(state)


class Held(Endless):
    """Its data exist once the test says so, by making the file ``GO``."""

    def build_dataset(self, spec: distroml.JobSpec) -> Lines:
        while not os.path.exists(os.environ["GO"]):
            threading.Event().wait(0.01)
        return super().build_dataset(spec)


class Forks(Endless):
    """Starts a process of its own."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        child = subprocess.Popen(["sleep", "600"])
        print("child", child.pid)
        return super().build_model(spec)
