"""Which ranks this node should run, and the plan that each of its workers starts with. Pure but for paths."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.model import ASSIGNED, CheckpointStatus, Generation, Job, Member
from distroml.runtime.control import WorkerPlan
from distroml.runtime.log_tail import log_path
from distroml.runtime.spawner import WorkerId


class Assignment(Struct, frozen=True):
    """One rank that this node should run."""

    job: Job
    generation: Generation
    member: Member


class SupervisorSettings(Struct, frozen=True, kw_only=True):
    """Where this node is and where its workers keep things."""

    node: str
    incarnation: int
    host: str
    data_dir: Path
    store_dir: Path
    worker_threads: int = 1

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "workers"


def assigned_to(state: ClusterState, node: str, incarnation: int) -> dict[WorkerId, Assignment]:
    """The ranks that ``node`` should be running now."""
    wanted: dict[WorkerId, Assignment] = {}
    for job in state.jobs.values():
        if job.status not in ASSIGNED or job.generation is None:
            continue
        for member in job.generation.members:
            if member.node == node and member.incarnation == incarnation:
                worker = (job.run_id, job.generation.number, member.rank)
                wanted[worker] = Assignment(job, job.generation, member)
    return wanted


def worker_plan(
    assignment: Assignment, settings: SupervisorSettings, control_path: Path
) -> WorkerPlan:
    """All that a worker needs to start; ``control_path`` is the agent's socket."""
    job, generation, member = assignment.job, assignment.generation, assignment.member
    source = next(
        (
            one
            for one in job.checkpoints
            if one.step == generation.checkpoint_step and one.status is CheckpointStatus.COMMITTED
        ),
        None,
    )
    path = log_path(settings.log_dir, job.run_id, generation.number, member.rank)
    return WorkerPlan(
        job_id=job.job_id,
        run_id=job.run_id,
        generation=generation.number,
        rank=member.rank,
        local_rank=member.local_rank,
        world_size=len(generation.members),
        node=settings.node,
        host=settings.host,
        spec=job.spec,
        store_dir=str(settings.store_dir),
        checkpoint=source,
        control_path=str(control_path),
        log_path=str(path),
        threads=settings.worker_threads,
    )
