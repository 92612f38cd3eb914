"""One rank with a large state, which it saves and restores in our way and in those of peers: `python -m bench.checkpoint_process`.

Arguments: rank, world size, a file through which the ranks meet, bytes of the state, threads of torch. The state is that of
AdamW: each weight with its two moments, in tensors of 16 MiB and small ones. All ranks hold all of it, as data parallel
ones do.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from bench.players import take_orders
from distroml.model import Checkpoint
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.control import Join, ShardAbandoned, ShardDurable, WorkerPlan
from distroml.runtime.worker.control_link import ControlLink
from distroml.runtime.worker.snapshot import Checkpointer, read_checkpoint
from distroml.runtime.worker.state import StateBlob
from distroml.spec import Checkpointing, JobSpec

JOB, RUN = "bench", "run"
WEIGHT = (1024, 4096)
WEIGHT_BYTES = 4 * 1024 * 4096
SLOTS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
TRAIN_WIDTH, TRAIN_BATCH = 1024, 256
STEPS_AT_REST = 30
MAX_WAIT_S = 300.0


class Mailbox:
    """Takes what a worker would tell its agent."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self._told: ShardFact | str | None = None

    def send(self, message: object) -> None:
        if isinstance(message, ShardDurable):
            self._told = message.shard
        elif isinstance(message, ShardAbandoned):
            self._told = message.reason
        self._came.set()

    def shard(self) -> ShardFact:
        """Wait for the shard in flight."""
        if not self._came.wait(MAX_WAIT_S):
            raise RuntimeError("the shard was neither durable nor abandoned")
        self._came.clear()
        if not isinstance(self._told, ShardFact):
            raise RuntimeError(f"the shard was abandoned: {self._told}")
        return self._told


class Rank:
    """The orders."""

    def __init__(self, rank: int, world_size: int, meet: str, size_bytes: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size
        )
        self._rank, self._world_size = rank, world_size
        generator = torch.Generator().manual_seed(1)
        layers = max(1, size_bytes // WEIGHT_BYTES // len(SLOTS))
        shapes = {"weight": WEIGHT, "bias": (WEIGHT[1],)}
        self._state = {
            f"{slot}.{layer}.{name}": torch.rand(shape, generator=generator)
            for slot in SLOTS
            for layer in range(layers)
            for name, shape in shapes.items()
        }
        self._copy: np.ndarray[Any, Any] | None = None
        self._mailbox = Mailbox()
        self._checkpointers: dict[str, Checkpointer] = {}

    async def size(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self._state.values())

    async def memcpy(self) -> float:
        """Seconds that one copy of the state takes into memory that was used before."""
        parts = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in self._state.values()]
        if self._copy is None:
            self._copy = np.zeros(sum(len(part) for part in parts), np.uint8)
            self._copy.fill(1)
        began, at = time.perf_counter(), 0
        for part in parts:
            np.copyto(self._copy[at : at + len(part)], part)
            at += len(part)
        return time.perf_counter() - began

    async def save(self, kind: str, directory: str, step: int) -> dict[str, Any]:
        """Save once: seconds until the caller may go on, seconds until durable, and our shard."""
        began = time.perf_counter()
        finish = self._begin(kind, directory, step)
        stall_s = time.perf_counter() - began
        fact = finish()
        return {
            "stall_s": stall_s,
            "wall_s": time.perf_counter() - began,
            "shard": None if fact is None else msgspec.to_builtins(fact),
        }

    async def train(self, kind: str, directory: str, step: int) -> dict[str, float]:
        """Steps at rest, then while a checkpoint is saved: their means, and what the checkpoint cost in all."""
        one = self._training()
        for _ in range(5):
            one()
        at_rest = [one() for _ in range(STEPS_AT_REST)]
        mean_s = sum(at_rest) / len(at_rest)
        began = time.perf_counter()
        finish = self._begin(kind, directory, step)
        stall_s = time.perf_counter() - began
        with ThreadPoolExecutor(1) as waiter:
            durable = waiter.submit(finish)
            meanwhile = [one()]
            while not durable.done():
                meanwhile.append(one())
            durable.result()
        lost_s = stall_s + sum(meanwhile) - len(meanwhile) * mean_s
        return {
            "rest_s": mean_s,
            "during_s": sum(meanwhile) / len(meanwhile),
            "lost_s": lost_s,
            "wall_s": time.perf_counter() - began,
        }

    async def restore(self, kind: str, directory: str, checkpoint: Any = None) -> float:
        """Seconds until the saved values are in the model's own memory and in an optimizer's state."""
        began = time.perf_counter()
        if kind == "dcp":
            dcp.load(self._state, checkpoint_id=directory)
            return time.perf_counter() - began
        if kind == "ours":
            record = msgspec.convert(checkpoint, type=Checkpoint)
            found = read_checkpoint(FileStore(directory), record)[1].tensors
        else:
            found = load_file(f"{directory}/state.safetensors")
        for name, tensor in found.items():
            if kind == "ours" and not name.startswith("model."):
                self._state[name] = tensor  # as an optimizer does: it is memory of its own
            else:
                self._state[name].copy_(tensor)
        return time.perf_counter() - began

    async def keep(self, directory: str) -> None:
        """Write the whole state as one plain safetensors file, for ``restore``."""
        os.makedirs(directory)
        save_file(self._state, f"{directory}/state.safetensors")

    async def spoil(self) -> None:
        """Forget the values, so that a restore has something to do; the memory stays in use."""
        for tensor in self._state.values():
            tensor.fill_(0.5)

    # --- ways of saving ----------------------------------------------------------------------------------------

    def _begin(self, kind: str, directory: str, step: int) -> Callable[[], ShardFact | None]:
        """Save; returns when training could go on, with what waits until all is durable."""
        if kind.startswith("ours"):
            checkpointer = self._checkpointer(kind, directory)
            checkpointer.save(StateBlob(self._state, {}), step, DataCursor(0, step))
            return self._mailbox.shard
        if kind == "torch" and self._rank:
            return lambda: None  # rank 0 saves what all have
        if kind == "torch":
            with Path(directory, f"torch-{step}-{self._rank}.pt").open("wb") as file:
                torch.save(self._state, file)
                file.flush()
                os.fsync(file.fileno())
            return lambda: None
        place = f"{directory}/dcp-{step}"
        if kind == "dcp":
            dcp.save(self._state, checkpoint_id=place)
            return lambda: None
        future = cast(Any, dcp.async_save(self._state, checkpoint_id=place))

        def finish() -> None:
            future.result()

        return finish

    def _checkpointer(self, kind: str, directory: str) -> Checkpointer:
        if kind not in self._checkpointers:
            compression = "zstd" if kind == "ours-zstd" else "none"
            spec = JobSpec(checkpointing=Checkpointing(compression=compression))
            plan = WorkerPlan(
                job_id=JOB,
                run_id=RUN,
                worker=self._rank,
                node="bench",
                host="127.0.0.1",
                spec=spec,
                store_dir=directory,
                control_path="",
                log_path="",
            )
            made = Checkpointer(
                plan, FileStore(directory), cast(ControlLink, self._mailbox), lambda: None
            )
            made.join(
                Join(
                    generation=1,
                    rank=self._rank,
                    local_rank=self._rank,
                    world_size=self._world_size,
                    checkpoint=None,
                )
            )
            self._checkpointers[kind] = made
        return self._checkpointers[kind]

    def _training(self) -> Callable[[], float]:
        """A step of a perceptron that takes some tens of milliseconds; returns its seconds."""
        layers = [
            part for _ in range(4) for part in (nn.Linear(TRAIN_WIDTH, TRAIN_WIDTH), nn.ReLU())
        ]
        model = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        inputs: Tensor = torch.rand(TRAIN_BATCH, TRAIN_WIDTH)

        def one() -> float:
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model(inputs).square().mean().backward()
            optimizer.step()
            return time.perf_counter() - began

        return one


def main() -> None:
    """The command line of one rank."""
    rank, world_size, meet, size_bytes, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    player = Rank(int(rank), int(world_size), meet, int(size_bytes))
    named = ("size", "memcpy", "save", "train", "restore", "keep", "spoil")
    asyncio.run(take_orders({name: getattr(player, name) for name in named}))


if __name__ == "__main__":
    main()
