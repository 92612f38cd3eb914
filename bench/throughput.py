"""Steady steps per second of our jobs, with either reduction, beside the same training under plain torchrun DDP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench import ours, torchrun
from bench.parts import Say
from bench.processes import Broken
from bench.table import Aim, Row, compare
from bench.workloads import TrainedRun, Workload, steps_per_s
from distroml.client import AsyncClient

LOSS_TOLERANCE = 0.01
"""Relative; sides that train the same thing end with the same loss but for rounding."""


async def beside_torchrun(
    client: AsyncClient,
    workload: Workload,
    workers: int,
    *,
    rounds: int,
    epochs: int,
    aims: Mapping[str, float],
    directory: Path,
    say: Say,
) -> list[Row]:
    """A row for each reduction; who goes first changes from round to round.

    Args:
        epochs: of each run; the first is not counted.
        aims: reduction -> least ratio.
    """
    sides = [*aims, "peer"]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        say(f"steps: {workload.name}, {workers} workers, round {number + 1}")
        losses: dict[str, float] = {}
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            run = await _run(side, client, workload, workers, epochs, directory)
            rates[side].append(steps_per_s(run.stamps, workload.epoch_steps))
            losses[side] = run.loss
        _check_same_work(losses)
    best = max(rates["peer"])
    return [
        compare(
            f"steps, {workload.name} parameters, {workers} workers, {reduction}",
            "1/s",
            "higher",
            ours=rates[reduction],
            peer_name="torchrun DDP, all-reduce",
            peer=rates["peer"],
            aim=Aim("ratio", ">=", aim),
            note=f"best runs: {max(rates[reduction]):.1f} beside {best:.1f}, "
            f"ratio {max(rates[reduction]) / best:.3f}",
        )
        for reduction, aim in aims.items()
    ]


async def _run(
    side: str,
    client: AsyncClient,
    workload: Workload,
    workers: int,
    epochs: int,
    directory: Path,
) -> TrainedRun:
    if side == "peer":
        return await torchrun.train(workload.spec(workers, epochs=epochs), directory)
    return await ours.train(client, workload.spec(workers, epochs=epochs, reduction=side))


def _check_same_work(losses: dict[str, float]) -> None:
    low, high = min(losses.values()), max(losses.values())
    if high - low > LOSS_TOLERANCE * high:
        raise Broken(f"the sides did not train the same: last losses {losses}")
