"""Specs that integration tests submit, and what they ask of a job."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from distroml.client import AsyncClient
from distroml.local_cluster import LocalCluster

SEED_SPEC: dict[str, Any] = {
    "name": "mnist-ddp-demo",
    "framework": "pytorch",
    "model": "mlp",
    "dataset": "synthetic",
    "resources": {"workers": 4, "gpus_per_worker": 0},
    "distributed": {"strategy": "data_parallel", "backend": "gloo"},
    "hyperparameters": {"batch_size": 64, "lr": 0.001, "epochs": 2},
    "checkpointing": {"enabled": True, "every_n_steps": 200, "store": "local"},
    "compression": {"enabled": False},
}


def long_spec(*, steps: int, workers: int = 4, every: int = 50, **fields: Any) -> dict[str, Any]:
    """A job long enough to be disturbed; the same arguments train to the same bits."""
    return {
        "name": "long",
        "resources": {"workers": workers},
        "hyperparameters": {"batch_size": 32},
        "checkpointing": {"every_n_steps": every},
        "steps": steps,
        "seed": 7,
        "max_restarts": 10,
        **fields,
    }


async def until_status(
    cluster: LocalCluster, client: AsyncClient, job_id: str, *wanted: str, timeout_s: float = 60.0
) -> dict[str, Any]:
    """The job once it has one of the statuses."""
    job: dict[str, Any] = await cluster.until(
        lambda: client.job(job_id),
        lambda job: job["status"] in wanted,
        f"job {job_id} to be {' or '.join(wanted)}",
        timeout_s=timeout_s,
    )
    return job


async def until_step(
    cluster: LocalCluster, client: AsyncClient, job_id: str, step: int, timeout_s: float = 60.0
) -> dict[str, Any]:
    """The job once it completed ``step`` steps, with a worker pid for each rank."""
    job: dict[str, Any] = await cluster.until(
        lambda: client.job(job_id),
        lambda job: job["step"] >= step and all(w["pid"] for w in job["workers"]),
        f"job {job_id} to reach step {step}",
        timeout_s=timeout_s,
    )
    return job


async def until_checkpoint(
    cluster: LocalCluster, client: AsyncClient, job_id: str, timeout_s: float = 60.0
) -> dict[str, Any]:
    """The checkpoint list once it has an entry."""
    answer: dict[str, Any] = await cluster.until(
        lambda: client.checkpoints(job_id),
        lambda answer: len(answer["checkpoints"]) > 0,
        f"job {job_id} to commit a checkpoint",
        timeout_s=timeout_s,
    )
    return answer


async def kill_workers(workers: list[dict[str, Any]]) -> None:
    """All at once: none has the time to notice another one's end, so nobody is left who has the state."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], number)


async def restored(cluster: LocalCluster, client: AsyncClient, job_id: str) -> list[dict[str, Any]]:
    """The job's incidents once its ranks have read a checkpoint and gone on from it."""

    async def ask() -> list[dict[str, Any]]:
        incidents: list[dict[str, Any]] = (await client.incidents(job_id))["incidents"]
        return incidents

    def from_a_checkpoint(incidents: list[dict[str, Any]]) -> bool:
        last = incidents[-1] if incidents else {"source": "", "recovered_at": None}
        return last["source"].startswith("checkpoint of step ") and last["recovered_at"] is not None

    found: list[dict[str, Any]] = await cluster.until(
        ask, from_a_checkpoint, "the ranks to go on from a checkpoint", timeout_s=120.0
    )
    return found
