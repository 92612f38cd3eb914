"""The agent's duty: make this node's workers what the replicated assignment says, and report the facts.

``converge`` compares the members of current generations with the local processes and spawns or kills the
difference; it may be called at any time and any number of times. Everything observed ends up in ``facts``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.model import (
    ASSIGNED,
    CheckpointStatus,
    FailureKind,
    Generation,
    Job,
    JobStatus,
    Member,
)
from distroml.reports import NodeReport, WorkerFact, WorkerFailure, WorkerPhase
from distroml.runtime import control
from distroml.runtime.control import FromWorker, MetricRecord, WorkerPlan
from distroml.runtime.log_tail import LogTail
from distroml.runtime.spawner import Spawner, SpawnEvents, WorkerId
from distroml.runtime.worker_server import WorkerLink, WorkerServer, socket_path

POLL_LOGS_S = 0.1
MAX_ABANDONED = 4
"""Abandoned checkpoint steps that a worker's fact carries."""
KILL_AGAIN_S = 2.0

_log = logging.getLogger(__name__)


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


class HistorySink(Struct, frozen=True, kw_only=True):
    """Where metrics and log lines of local workers go; both are called in the event loop."""

    metrics: Callable[[WorkerFact, tuple[MetricRecord, ...]], None]
    logs: Callable[[WorkerFact, list[str]], None]


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


class _Local:
    """One worker process of this node and what is known of it."""

    def __init__(self, fact: WorkerFact, log_path: Path) -> None:
        self.fact = fact
        self.tail = LogTail(log_path)
        self.link: WorkerLink | None = None
        self.keys_sent: set[str] = set()
        self.stop_sent = False
        self.killed_at_s: float | None = None

    @property
    def alive(self) -> bool:
        return self.fact.ended_at is None

    def update(self, **changes: object) -> None:
        self.fact = msgspec.structs.replace(self.fact, **changes)


class Supervisor:
    """Runs this node's workers.

    Args:
        changed: called after every change of ``facts`` that others should hear of soon.
    """

    def __init__(
        self, settings: SupervisorSettings, *, sink: HistorySink, changed: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._changed = changed
        self._workers: dict[WorkerId, _Local] = {}
        self._by_pid: dict[int, WorkerId] = {}
        self._state = ClusterState()
        self._peer_keys: dict[tuple[str, int], dict[str, bytes]] = {}
        self._poll: asyncio.Task[None] | None = None
        self._server = WorkerServer(
            socket_path(settings.data_dir),
            connected=self._on_connected,
            received=self._on_message,
            closed=self._on_closed,
        )
        self._spawner = Spawner(
            log_path=settings.data_dir / "forkserver.log",
            events=SpawnEvents(
                ready=self._on_ready,
                spawned=self._on_spawned,
                failed=self._on_spawn_failed,
                exited=self._on_exited,
                lost=self._on_forkserver_lost,
            ),
        )

    # --- life ---

    async def start(self, *, warm: bool) -> None:
        """Open the control socket; with ``warm`` start the forkserver too (a node with slots)."""
        (self._settings.data_dir / "workers").mkdir(parents=True, exist_ok=True)
        await self._server.start()
        if warm:
            self._spawner.start()
        self._poll = asyncio.create_task(self._poll_logs(), name="log-tail")

    async def stop(self) -> None:
        """Kill all workers and the forkserver."""
        if self._poll is not None:
            self._poll.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poll
        for local in self._workers.values():
            self._kill(local)
        await self._spawner.stop()
        await self._server.stop()

    @property
    def ready(self) -> bool:
        """Whether workers can be spawned at once."""
        return self._spawner.ready

    @property
    def forkserver_pid(self) -> int | None:
        """Process id of the warm forkserver, if it runs."""
        return self._spawner.pid

    # --- level-triggered convergence ---

    def converge(self, state: ClusterState) -> None:
        """Bring the local workers in line with ``state``."""
        self._state = state
        wanted = assigned_to(state, self._settings.node, self._settings.incarnation)
        for worker in [w for w in self._workers if w not in wanted]:
            self._retire(worker)
        for worker, assignment in wanted.items():
            local = self._workers.get(worker)
            if local is None:
                self._spawn(worker, assignment)
            else:
                self._settle(local, assignment.job)
        self._forget_old_keys()

    def facts(self) -> tuple[WorkerFact, ...]:
        """Everything known of the local workers, those of ended generations too while they live."""
        return tuple(local.fact for _, local in sorted(self._workers.items()))

    def take_peer_report(self, report: NodeReport) -> None:
        """Pass on rendezvous keys that other nodes' ranks published."""
        for fact in report.workers:
            if fact.rendezvous:
                self._share_keys(fact.run_id, fact.generation, fact.rendezvous)

    def _spawn(self, worker: WorkerId, assignment: Assignment) -> None:
        if not self._spawner.ready:
            return
        plan = self._plan(assignment)
        fact = WorkerFact(
            job_id=plan.job_id,
            run_id=plan.run_id,
            generation=plan.generation,
            rank=plan.rank,
            phase=WorkerPhase.SPAWNING,
            step=assignment.generation.resume_step,
            started_at=time.time(),
        )
        Path(plan.log_path).parent.mkdir(parents=True, exist_ok=True)
        self._workers[worker] = _Local(fact, Path(plan.log_path))
        self._spawner.spawn(plan)
        self._changed()

    def _plan(self, assignment: Assignment) -> WorkerPlan:
        job, generation, member = assignment.job, assignment.generation, assignment.member
        source = next(
            (
                one
                for one in job.checkpoints
                if one.step == generation.checkpoint_step
                and one.status is CheckpointStatus.COMMITTED
            ),
            None,
        )
        logs = self._settings.data_dir / "workers" / job.run_id / f"generation-{generation.number}"
        return WorkerPlan(
            job_id=job.job_id,
            run_id=job.run_id,
            generation=generation.number,
            rank=member.rank,
            local_rank=member.local_rank,
            world_size=len(generation.members),
            node=self._settings.node,
            host=self._settings.host,
            spec=job.spec,
            store_dir=str(self._settings.store_dir),
            checkpoint=source,
            control_path=str(self._server.path),
            log_path=str(logs / f"rank-{member.rank}.log"),
            threads=self._settings.worker_threads,
        )

    def _settle(self, local: _Local, job: Job) -> None:
        """Tell a wanted worker what changed for it; forget shards that are committed."""
        if job.status is JobStatus.STOPPING and local.link is not None and not local.stop_sent:
            local.stop_sent = True
            local.link.send(control.Stop())
        committed = {c.step for c in job.checkpoints if c.status is CheckpointStatus.COMMITTED}
        kept = tuple(shard for shard in local.fact.shards if shard.step not in committed)
        if kept != local.fact.shards:
            local.update(shards=kept)

    def _retire(self, worker: WorkerId) -> None:
        """A worker that is not wanted: killed if it lives, forgotten once it is gone."""
        local = self._workers[worker]
        if not local.alive:
            del self._workers[worker]
            self._changed()
            return
        self._kill(local)

    def _kill(self, local: _Local) -> None:
        now_s = time.monotonic()
        pid = local.fact.pid
        if not local.alive or pid is None:
            return
        if local.killed_at_s is not None and now_s - local.killed_at_s < KILL_AGAIN_S:
            return
        local.killed_at_s = now_s
        # The forkserver has not reported this pid reaped, so it still names our process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    # --- what the forkserver tells ---

    def _on_ready(self) -> None:
        self.converge(self._state)
        self._changed()

    def _on_spawned(self, worker: WorkerId, pid: int) -> None:
        local = self._workers.get(worker)
        if local is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return
        self._by_pid[pid] = worker
        local.update(pid=pid)
        self.converge(self._state)
        self._changed()

    def _on_spawn_failed(self, worker: WorkerId, reason: str) -> None:
        local = self._workers.get(worker)
        if local is not None:
            failure = WorkerFailure(
                kind=FailureKind.ERROR,
                error=f"the worker could not be started: {reason}",
                traceback="",
                at=time.time(),
            )
            self._end(local, exit_code=1, failure=failure)

    def _on_exited(self, pid: int, status: int) -> None:
        worker = self._by_pid.pop(pid, None)
        local = self._workers.get(worker) if worker else None
        if local is not None:
            self._end(local, exit_code=status)

    def _on_forkserver_lost(self) -> None:
        self._by_pid.clear()
        for local in list(self._workers.values()):
            if local.alive:
                self._end(local, exit_code=-signal.SIGKILL)
        self._changed()

    def _end(self, local: _Local, *, exit_code: int, failure: WorkerFailure | None = None) -> None:
        """The process is gone: take its last words, then settle what it was."""
        self._ship_log(local, final=True)
        failure = local.fact.failure or failure
        phase = WorkerPhase.EXITED
        if local.fact.outcome is not None:
            phase = WorkerPhase.FINISHED
        elif failure is not None:
            phase = WorkerPhase.FAILED
        local.update(
            phase=phase,
            exit_code=exit_code,
            failure=failure,
            ended_at=time.time(),
            last_lines=local.tail.last_lines,
        )
        local.link = None
        self.converge(self._state)
        self._changed()

    # --- what workers tell ---

    def _on_connected(self, link: WorkerLink) -> bool:
        local = self._workers.get(link.worker)
        if local is None or not local.alive or local.link is not None:
            return False
        local.link = link
        local.update(phase=WorkerPhase.CONNECTING)
        for run_generation, keys in self._peer_keys.items():
            if run_generation == link.worker[:2]:
                self._send_keys(local, keys)
        for other in self._siblings(local):
            self._send_keys(local, other.fact.rendezvous)
        self.converge(self._state)
        self._changed()
        return True

    def _on_closed(self, link: WorkerLink) -> None:
        local = self._workers.get(link.worker)
        if local is not None and local.link is link:
            local.link = None

    def _on_message(self, worker: WorkerId, message: FromWorker) -> None:
        local = self._workers.get(worker)
        if local is None:
            return
        match message:
            case control.Progress():
                self._on_progress(local, message)
            case control.Rendezvous(key=key, value=value):
                local.update(rendezvous={**local.fact.rendezvous, key: value})
                self._share_keys(worker[0], worker[1], {key: value})
                self._changed()
            case control.ShardDurable(shard=shard):
                local.update(shards=(*local.fact.shards, shard))
                self._changed()
            case control.ShardAbandoned(step=step, reason=reason):
                kept = (*local.fact.abandoned, (step, reason))[-MAX_ABANDONED:]
                local.update(abandoned=kept)
                self._changed()
            case control.Failed(failure=failure, step=step):
                self._ship_log(local)
                local.update(
                    phase=WorkerPhase.FAILED,
                    failure=failure,
                    step=step,
                    last_lines=local.tail.last_lines,
                )
                self._changed()
            case control.Finished(outcome=outcome):
                local.update(phase=WorkerPhase.FINISHED, outcome=outcome, step=outcome.step)
                self._changed()
            case control.Hello():
                pass

    def _on_progress(self, local: _Local, message: control.Progress) -> None:
        entered = message.phase is not local.fact.phase
        rendezvous = {} if message.phase is WorkerPhase.TRAINING else local.fact.rendezvous
        local.update(
            phase=message.phase,
            step=message.step,
            epoch=message.epoch,
            total_steps=message.total_steps or local.fact.total_steps,
            rendezvous=rendezvous,
        )
        if message.metrics:
            self._sink.metrics(local.fact, message.metrics)
        if entered:
            self._changed()

    # --- rendezvous keys ---

    def _share_keys(self, run_id: str, generation: int, keys: dict[str, bytes]) -> None:
        known = self._peer_keys.setdefault((run_id, generation), {})
        known.update(keys)
        for (run, number, _), local in self._workers.items():
            if (run, number) == (run_id, generation):
                self._send_keys(local, keys)

    def _forget_old_keys(self) -> None:
        """Keep keys of present generations, and of ones that this replica has yet to learn of."""
        present = {job.run_id: job.generation_number for job in self._state.active_jobs()}
        self._peer_keys = {
            (run_id, generation): keys
            for (run_id, generation), keys in self._peer_keys.items()
            if generation >= present.get(run_id, generation + 1)
        }

    def _send_keys(self, local: _Local, keys: dict[str, bytes]) -> None:
        new = {key: value for key, value in keys.items() if key not in local.keys_sent}
        if new and local.link is not None:
            local.link.send(control.RendezvousKeys(keys=new))
            local.keys_sent.update(new)

    def _siblings(self, local: _Local) -> Iterable[_Local]:
        for other in self._workers.values():
            same = other.fact.run_id == local.fact.run_id
            if same and other is not local and other.fact.generation == local.fact.generation:
                yield other

    # --- logs ---

    async def _poll_logs(self) -> None:
        while True:
            await asyncio.sleep(POLL_LOGS_S)
            for local in list(self._workers.values()):
                if local.alive:
                    self._ship_log(local)

    def _ship_log(self, local: _Local, *, final: bool = False) -> None:
        try:
            lines = local.tail.poll(final=final)
        except OSError as error:
            _log.warning("log of %s cannot be read: %s", local.fact, error)
            return
        if lines:
            self._sink.logs(local.fact, lines)
