"""A training script of nobody's cluster: `python -m tests.runtime.worker.checkpoint_script DIRECTORY MEET RANK WORLD STEPS`.

Trains from the newest checkpoint to STEPS, saving after each step, and prints a digest of what it ended with.
"""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.distributed as dist
from torch import nn

import distroml


def main(directory: str, meet: str, rank: str, world_size: str, steps: str) -> None:
    if int(world_size) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=int(rank), world_size=int(world_size)
        )
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    done = 0
    with distroml.CheckpointManager(directory) as checkpoints:
        latest = checkpoints.latest()
        if latest is not None:
            state = checkpoints.restore()
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            done = state["done"]
        print("from", done, flush=True)
        for step in range(done, int(steps)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.rand(8, 4)).square().mean().backward()
            optimizer.step()
            checkpoints.save_async(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "done": step + 1,
                },
                step + 1,
            )
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    print("ended", digest.hexdigest(), flush=True)
    if dist.is_initialized():
        dist.barrier()  # else one rank's threads may find another's sockets closed, and end it with SIGABRT
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
