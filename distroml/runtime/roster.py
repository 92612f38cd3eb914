"""The worker processes of this node, by name and by process id: those that it spawned, and those that it took over.

Only who they are; what becomes of them is up to the supervisor.
"""

from __future__ import annotations

import time
from pathlib import Path

from distroml.model import Job
from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime.assignment import Process, SupervisorSettings, worker_plan
from distroml.runtime.control import Join, Running, WorkerPlan
from distroml.runtime.local_worker import LocalWorker
from distroml.runtime.spawner import WorkerId

WORKERS_PER_INCARNATION = 1_000_000
"""Names of workers never repeat: each life of an agent has so many of its own."""


class Roster:
    """All processes that this agent knows of.

    Args:
        control_path: the agent's socket, at which they connect.
    """

    def __init__(self, settings: SupervisorSettings, control_path: Path) -> None:
        self._settings = settings
        self._control_path = control_path
        self._spawns = 0
        self._by_pid: dict[int, WorkerId] = {}
        self.workers: dict[WorkerId, LocalWorker] = {}

    def spawned(self, job: Job, join: Join | None, now_s: float) -> tuple[WorkerPlan, LocalWorker]:
        """A worker that is about to be forked, without a rank where ``join`` is None."""
        self._spawns += 1
        worker = self._settings.incarnation * WORKERS_PER_INCARNATION + self._spawns
        plan = worker_plan(job, worker, join, self._settings, self._control_path)
        fact = WorkerFact(
            job_id=plan.job_id,
            run_id=plan.run_id,
            worker=worker,
            generation=join.generation if join else 0,
            rank=join.rank if join else 0,
            phase=WorkerPhase.SPAWNING,
            step=job.generation.resume_step if job.generation and join else 0,
            started_at=time.time(),
        )
        local = LocalWorker(fact, Path(plan.log_path), now_s, join)
        self.workers[plan.run_id, worker] = local
        return plan, local

    def taken_over(self, told: Running, now_s: float) -> LocalWorker:
        """A worker that an earlier agent spawned; where it stands it has yet to say itself."""
        fact = WorkerFact(
            job_id=told.job_id,
            run_id=told.run_id,
            worker=told.worker,
            generation=0,
            rank=0,
            phase=WorkerPhase.SPAWNING,
            pid=told.pid,
            started_at=time.time(),
        )
        local = LocalWorker(fact, Path(told.log_path), now_s, from_end=True)
        local.adopted = True
        self.workers[told.run_id, told.worker] = local
        self._by_pid[told.pid] = told.run_id, told.worker
        return local

    def runs_as(self, worker: WorkerId, pid: int) -> None:
        """The process id of a worker is known now."""
        self._by_pid[pid] = worker
        self.workers[worker].update(pid=pid)

    def ended(self, pid: int) -> LocalWorker | None:
        """The worker whose process this was; its id may name another one from now on."""
        worker = self._by_pid.pop(pid, None)
        return self.workers.get(worker) if worker else None

    def all_ended(self) -> None:
        """No process id names a worker any more."""
        self._by_pid.clear()

    @property
    def has_strangers(self) -> bool:
        """Whether one that was taken over has yet to say where it stands."""
        return any(local.is_stranger for local in self.workers.values())

    @property
    def workers_since(self) -> int:
        """The incarnation whose agent spawned the oldest worker that was taken over; 0: there is none."""
        adopted = [worker for (_, worker), local in self.workers.items() if local.adopted]
        return min(adopted, default=0) // WORKERS_PER_INCARNATION

    def processes(self) -> dict[str, list[Process]]:
        """What the assignment needs to know, by run."""
        found: dict[str, list[Process]] = {}
        for (run_id, _), local in self.workers.items():
            found.setdefault(run_id, []).append(local.process)
        return found

    def facts(self, now_s: float) -> tuple[WorkerFact, ...]:
        """What is to be reported of each, by name."""
        return tuple(local.observed(now_s) for _, local in sorted(self.workers.items()))
