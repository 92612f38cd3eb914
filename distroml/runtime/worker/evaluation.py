"""The default evaluation: held-out samples in fixed chunks, spread over the ranks, added in chunk order.

Neither the chunks nor the order of addition depend on the number of ranks, so a resized run reports the same
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from distroml.runtime.worker.device import moved
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.state import TrainState

if TYPE_CHECKING:
    from distroml.runtime.worker.adapter import FrameworkAdapter


def evaluate(adapter: FrameworkAdapter, state: TrainState, dist: Dist) -> dict[str, float]:
    """Mean "eval_loss" and ``adapter.measure`` over ``adapter.build_holdout``; {} where there is none.

    Raises:
        CollectiveBroken: another rank is gone.
    """
    dataset = adapter.holdout
    if dataset is None or len(dataset) == 0:
        return {}
    size = adapter.evaluation_batch
    chunks = -(-len(dataset) // size)
    per_rank = -(-chunks // dist.world_size)
    names: list[str] = []
    rows: list[list[float]] = []
    was_training = state.model.training
    state.model.eval()
    try:
        with torch.inference_mode():
            # A rank beyond the last chunk computes the first one for the metrics' names alone.
            for chunk in range(dist.rank, chunks, dist.world_size) or [0]:
                indices = np.arange(chunk * size, min(len(dataset), (chunk + 1) * size))
                batch = moved(dataset.batch(indices), dist.device)
                outputs = adapter.forward(state.model, batch)
                means = {"eval_loss": adapter.loss(outputs, batch)}
                means |= adapter.measure(outputs, batch)
                names = sorted(means)
                rows.append([float(len(indices)), *(float(means[name]) for name in names)])
    finally:
        state.model.train(was_training)
    return _combine(names, rows, chunks, per_rank, dist)


def _combine(
    names: list[str], rows: list[list[float]], chunks: int, per_rank: int, dist: Dist
) -> dict[str, float]:
    """Gather all ranks' chunk rows [samples, means...] and average them in chunk order."""
    width = 1 + len(names)
    flat = [value for row in rows for value in row]
    flat += [0.0] * (per_rank * width - len(flat))
    gathered = dist.all_gather(flat)
    totals = [0.0] * width
    for chunk in range(chunks):
        begin = (chunk // dist.world_size) * width
        row = gathered[chunk % dist.world_size][begin : begin + width]
        totals[0] += row[0]
        for i in range(1, width):
            totals[i] += row[0] * row[i]
    return {name: totals[1 + i] / totals[0] for i, name in enumerate(names)}
