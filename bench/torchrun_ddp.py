"""The peer: a plain DDP loop for ``torchrun``, on the product's own models, data, order and optimizer.

Run by ``bench.torchrun`` as ``python -m torch.distributed.run ... -m bench.torchrun_ddp --spec FILE``. It does what
a careful user's script does and no more: no metrics, no evaluation, gradients averaged by DDP's own all-reduce.
With ``--checkpoints`` rank 0 saves by ``torch.save`` and rename, and a restarted attempt goes on from there.

Lines of JSON on standard output tell what happens: each rank its pid, rank 0 completed steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bench.processes import die_with_parent
from distroml.runtime.worker.batches import IndexedBatches, as_dataset
from distroml.runtime.worker.builtin import load_adapter
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.seeding import seed_all
from distroml.spec import JobSpec, parse_spec

ANNOUNCE_EVERY = 10
"""Completed steps between two lines; the first step of an attempt always has one."""
CHECKPOINT = "state.pt"


class Training:
    """What one of ``world`` ranks trains: the product's model, optimizer and share of each batch."""

    def __init__(self, spec: JobSpec, rank: int, world: int) -> None:
        self._adapter = load_adapter(spec)
        dataset = as_dataset(self._adapter.build_dataset(spec))
        self._source = IndexedBatches(dataset, spec.hyperparameters.batch_size, spec.seed)
        self._place = Dist(RankGroup(1, rank, world, "127.0.0.1", lambda key, value: None))
        self.total_steps = (
            spec.steps or spec.hyperparameters.epochs * self._source.batches_per_epoch
        )
        seed_all(spec.seed, "model")
        self.model = self._adapter.build_model(spec)
        self.optimizer = self._adapter.build_optimizer(spec, self.model)

    def loss(self, module: nn.Module, step: int) -> torch.Tensor:
        """That of this rank's share of the batch of ``step``."""
        batch = self._source.at(step, self._place)[0].batch
        return self._adapter.loss(self._adapter.forward(module, batch), batch)


def main() -> None:
    """Train ``--spec`` on the ranks that torchrun started."""
    arguments = _parse()
    die_with_parent()
    spec = parse_spec(arguments.spec.read_bytes())
    torch.set_num_threads(1)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    tell(pid=os.getpid(), rank=int(os.environ["RANK"]), attempt=attempt)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    training = Training(spec, rank, world)
    model, optimizer = training.model, training.optimizer
    first = _restore(arguments.checkpoints, model, optimizer)
    module = DistributedDataParallel(model)

    stamps: list[float] = []
    for step in range(first, training.total_steps):
        optimizer.zero_grad(set_to_none=True)
        loss = training.loss(module, step)
        loss.backward()
        optimizer.step()
        done = step + 1
        if arguments.stamps:
            stamps.append(time.monotonic())
        if rank == 0 and (step == first or done % ANNOUNCE_EVERY == 0):
            if arguments.announce:
                tell(step=done, attempt=attempt)
            if arguments.checkpoints and done % spec.checkpointing.every_n_steps == 0:
                _save(arguments.checkpoints, done, model, optimizer)

    mean_loss = loss.detach() / world
    dist.all_reduce(mean_loss)
    if rank == 0 and arguments.stamps:
        arguments.stamps.write_text(json.dumps({"stamps": stamps, "loss": float(mean_loss)}))
    dist.destroy_process_group()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="plain DDP on a DistroML job specification")
    parser.add_argument("--spec", type=Path, required=True, help="JobSpec as JSON")
    parser.add_argument("--stamps", type=Path, help="where rank 0 writes when each step ended")
    parser.add_argument("--announce", action="store_true", help="rank 0 prints completed steps")
    parser.add_argument("--checkpoints", type=Path, help="directory of the checkpoint")
    return parser.parse_args()


def tell(**event: Any) -> None:
    """Print one line of JSON, in one write, so that lines of several processes do not mix."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _save(directory: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    fresh = directory / f"{CHECKPOINT}.new"
    torch.save({"step": step, "model": model.state_dict(), "opt": optimizer.state_dict()}, fresh)
    fresh.replace(directory / CHECKPOINT)


def _restore(directory: Path | None, model: nn.Module, optimizer: Optimizer) -> int:
    """Load the checkpoint where there is one; steps completed."""
    if directory is None or not (directory / CHECKPOINT).exists():
        return 0
    state = torch.load(directory / CHECKPOINT, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["opt"])
    return int(state["step"])


if __name__ == "__main__":
    main()
