"""Keeps one core busy as training does: forward, backward and update of a small model, for ever.

Run as ``python -m bench.burn``; ends with the process that started it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.processes import running

WIDTH = 512
BATCH = 64


@contextmanager
def all_cores(directory: Path) -> Iterator[None]:
    """One process per core while the context lasts."""
    with ExitStack() as stack:
        for number in range(os.cpu_count() or 1):
            stack.enter_context(running(["-m", "bench.burn"], directory / f"burn-{number}.log"))
        yield


def main() -> None:
    """Train until killed."""
    import torch

    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = torch.randn(BATCH, WIDTH)
    while True:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


if __name__ == "__main__":
    main()
