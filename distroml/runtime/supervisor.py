"""The agent's duty: make this node's workers what the replicated assignment says, and report the facts.

``converge`` compares the members of current generations with the local processes and spawns or kills the
difference; it may be called at any time and any number of times. Everything observed ends up in ``facts``.

A worker speaks through two wires that are not ordered with each other: its own socket (last words) and the
forkserver (its exit). So an exit is settled only when the socket has been read to its end, or patience has.
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

from distroml.consensus.state import ClusterState
from distroml.model import TERMINAL, CheckpointStatus, Job, JobStatus
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime import control
from distroml.runtime.assignment import (
    Assignment,
    SupervisorSettings,
    assigned_to,
    worker_plan,
)
from distroml.runtime.barrier import MAX_OPEN, Barrier, NotTaken, RunGeneration
from distroml.runtime.control import FromWorker
from distroml.runtime.key_exchange import KeyExchange
from distroml.runtime.local_worker import LocalWorker, Misbehaved, failure_of
from distroml.runtime.spawner import Spawner, SpawnEvents, WorkerId
from distroml.runtime.worker_output import HistorySink, WorkerOutput
from distroml.runtime.worker_server import WorkerLink, WorkerServer, socket_path

TEND_S = 0.1
"""How often logs are read and patience is checked."""
KILL_AGAIN_S = 2.0
LAST_FRAMES_S = 2.0
"""How long the last frames of a worker that exited may take to be read."""
LATE_HELLO_S = 0.3
"""How long a worker that exited by itself without a word may turn out to have connected."""
LINK_LOST_S = 2.0
"""How long a worker may live on without its control connection; it would train, but nobody could tell."""
SPAWN_TIMEOUT_S = 120.0
"""A forkserver that has not answered a spawn for this long hangs: it is replaced, and its workers with it."""

_log = logging.getLogger(__name__)


class Supervisor:
    """Runs this node's workers.

    Args:
        changed: called after every change of ``facts`` that others should hear of soon.
        arrived: called with a barrier at which a local rank stands, that rank, and its value.
        spawner: makes what forks the workers.
        monotonic: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        settings: SupervisorSettings,
        *,
        sink: HistorySink,
        changed: Callable[[], None],
        arrived: Callable[[Barrier, int, int], None],
        spawner: Callable[[Path, SpawnEvents], Spawner] = Spawner,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._output = WorkerOutput(settings.log_dir, sink=sink, monotonic=monotonic)
        self._changed = changed
        self._arrived = arrived
        self._monotonic = monotonic
        self._workers: dict[WorkerId, LocalWorker] = {}
        self._by_pid: dict[int, WorkerId] = {}
        self._state = ClusterState()
        self._keys = KeyExchange()
        self._tending: asyncio.Task[None] | None = None
        self._stopping = False
        self._server = WorkerServer(
            socket_path(settings.data_dir),
            connected=self._on_connected,
            received=self._on_message,
            closed=self._on_closed,
        )
        self._spawner = spawner(
            settings.data_dir / "forkserver.log",
            SpawnEvents(
                ready=self._on_ready,
                spawned=self._on_spawned,
                failed=self._on_spawn_failed,
                exited=self._on_exited,
                lost=self._on_forkserver_lost,
            ),
        )

    # --- life ---

    async def start(self, *, warm: bool) -> None:
        """Open the control socket; with ``warm`` start the forkserver too (a node with slots).

        Raises:
            OSError: the data directory or the socket cannot be used.
        """
        self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        await self._server.start()
        if warm:
            self._spawner.start()
        self._tending = asyncio.create_task(self._tend_always(), name="supervisor")

    async def stop(self) -> None:
        """Kill all workers and the forkserver; what they wrote last still goes into history."""
        self._stopping = True
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        for local in self._workers.values():
            self._kill(local)
        await self._spawner.stop()
        for local in self._workers.values():
            if local.alive:
                self._output.ship_log(local, final=True)
        await self._server.stop()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What must run for as long as the node does."""
        return [task for task in (self._tending, self._spawner.task) if task is not None]

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
        if self._stopping:
            return
        wanted = assigned_to(state, self._settings.node, self._settings.incarnation)
        for worker in [w for w in self._workers if w not in wanted]:
            self._retire(worker)
        for worker, assignment in wanted.items():
            local = self._workers.get(worker)
            if local is None:
                self._spawn(worker, assignment)
            else:
                self._settle(local, assignment.job)
        if len(self._keys):
            self._keys.forget(
                {
                    job.run_id: job.generation_number
                    for job in state.jobs.values()
                    if job.status not in TERMINAL
                }
            )

    def facts(self) -> tuple[WorkerFact, ...]:
        """Everything known of the local workers, those of ended generations too while they live."""
        return tuple(local.fact for _, local in sorted(self._workers.items()))

    def take_peer_report(self, report: NodeReport) -> None:
        """Pass on rendezvous keys that other nodes' ranks published."""
        for fact in report.workers:
            if fact.rendezvous:
                self._share_keys(fact.run_id, fact.generation, fact.rendezvous)

    def release(
        self, generation: RunGeneration, ranks: Iterable[int], name: str, value: int
    ) -> None:
        """Local ranks may go on from a barrier."""
        for rank in ranks:
            local = self._workers.get((generation.run_id, generation.number, rank))
            if local is not None and local.link is not None:
                local.link.send(control.Released(name=name, value=value))

    def _spawn(self, worker: WorkerId, assignment: Assignment) -> None:
        if not self._spawner.ready:
            return
        plan = worker_plan(assignment, self._settings, self._server.path)
        fact = WorkerFact(
            job_id=plan.job_id,
            run_id=plan.run_id,
            generation=plan.generation,
            rank=plan.rank,
            phase=WorkerPhase.SPAWNING,
            step=assignment.generation.resume_step,
            started_at=time.time(),
        )
        path = Path(plan.log_path)
        local = self._workers[worker] = LocalWorker(fact, path, self._monotonic())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # An earlier life of this node may have left one, whose lines are no news.
            path.unlink(missing_ok=True)
            self._spawner.spawn(plan)
        except (OSError, ValueError) as error:
            local.excuse = f"the worker could not be started: {error}"
            self._end(local, exit_code=1)
        self._changed()

    def _settle(self, local: LocalWorker, job: Job) -> None:
        """Tell a wanted worker what changed for it; forget shards that are committed."""
        if job.status is JobStatus.STOPPING:
            local.send_stop()
        if local.fact.shards:
            local.forget_shards(
                {c.step for c in job.checkpoints if c.status is CheckpointStatus.COMMITTED}
            )

    def _retire(self, worker: WorkerId) -> None:
        """A worker that is not wanted: killed if it lives, forgotten once it is gone."""
        local = self._workers[worker]
        if not local.alive:
            del self._workers[worker]
            self._changed()
            return
        # One that has no pid yet is killed when it gets it: ``_on_spawned`` converges.
        self._kill(local)

    def _kill(self, local: LocalWorker) -> None:
        now_s = self._monotonic()
        if not local.killable:
            return
        if local.killed_at_s is not None and now_s - local.killed_at_s < KILL_AGAIN_S:
            return
        local.killed_at_s = now_s
        _kill_group(local.fact.pid)

    # --- what the forkserver tells ---

    def _on_ready(self) -> None:
        self.converge(self._state)
        self._changed()

    def _on_spawned(self, worker: WorkerId, pid: int) -> None:
        local = self._workers.get(worker)
        if local is None or not local.alive:
            _kill_group(pid)
            return
        self._by_pid[pid] = worker
        local.update(pid=pid)
        self.converge(self._state)
        self._changed()

    def _on_spawn_failed(self, worker: WorkerId, reason: str) -> None:
        local = self._workers.get(worker)
        if local is not None and local.alive:
            local.excuse = f"the worker could not be started: {reason}"
            self._end(local, exit_code=1)

    def _on_exited(self, pid: int, status: int) -> None:
        worker = self._by_pid.pop(pid, None)
        local = self._workers.get(worker) if worker else None
        if local is not None and local.alive:
            self._gone(local, status)

    def _on_forkserver_lost(self) -> None:
        self._by_pid.clear()
        for local in list(self._workers.values()):
            if local.alive and local.exit_code is None:
                if local.fact.pid is not None:
                    _kill_group(local.fact.pid)  # what the worker itself has started
                local.excuse = "the forkserver of its node ended, and all workers there with it"
                self._gone(local, -signal.SIGKILL)
        self._changed()

    def _gone(self, local: LocalWorker, exit_code: int) -> None:
        """The process is gone; settle it once its last frames were read."""
        local.exit_code = exit_code
        if local.link is not None:
            local.patience_ends_s = self._monotonic() + LAST_FRAMES_S
        elif not local.said_hello and exit_code >= 0:
            local.patience_ends_s = self._monotonic() + LATE_HELLO_S
        else:
            self._end(local)

    def _end(self, local: LocalWorker, *, exit_code: int | None = None) -> None:
        local.exit_code = local.exit_code if exit_code is None else exit_code
        self._output.ship_log(local, final=True)
        local.settle_end()
        self.converge(self._state)
        self._changed()

    # --- what workers tell ---

    def _on_connected(self, link: WorkerLink) -> bool:
        local = self._workers.get(link.worker)
        if local is None or not local.alive or local.said_hello:
            return False
        if local.fact.pid not in (None, link.pid):
            return False
        local.link = link
        local.said_hello = True
        local.update(phase=WorkerPhase.CONNECTING)
        if local.exit_code is not None:
            local.patience_ends_s = self._monotonic() + LAST_FRAMES_S
        local.send_keys(self._keys.known(*link.worker[:2]))
        self.converge(self._state)
        self._changed()
        return True

    def _on_closed(self, link: WorkerLink, reason: str) -> None:
        """The control connection ended, because the worker did or because of ``reason``."""
        local = self._workers.get(link.worker)
        if local is None or local.link is not link:
            return
        local.link = None
        if local.exit_code is not None:
            self._end(local)
        elif local.alive:
            if reason:
                self._give_up(local, f"its control connection was closed: {reason}")
            local.patience_ends_s = self._monotonic() + LINK_LOST_S

    def _on_message(self, worker: WorkerId, message: FromWorker) -> None:
        """Take a message.

        Raises:
            Misbehaved: the connection is to be closed.
        """
        local = self._workers.get(worker)
        if local is None or not local.alive:
            return
        told = local.take(message)
        match message:
            case control.Progress(metrics=metrics) if metrics:
                self._output.ship_metrics(local.fact, metrics)
            case control.Rendezvous(key=key, value=value):
                self._share_keys(worker[0], worker[1], {key: value})
            case control.Arrive(name=name, value=value):
                generation = RunGeneration(local.fact.job_id, worker[0], worker[1])
                try:
                    self._arrived(Barrier(generation, name), worker[2], value)
                except NotTaken:
                    raise Misbehaved(f"it stands at more than {MAX_OPEN} barriers") from None
            case control.Failed():
                self._output.ship_log(local)
                local.update(last_lines=local.tail.last_lines)
        if told:
            self._changed()

    def _share_keys(self, run_id: str, generation: int, keys: dict[str, bytes]) -> None:
        if self._keys.learn(run_id, generation, keys):
            known = self._keys.known(run_id, generation)
            for (run, number, _), local in self._workers.items():
                if (run, number) == (run_id, generation):
                    local.send_keys(known)

    def _give_up(self, local: LocalWorker, error: str) -> None:
        """End a worker that cannot be worked with, and say why in its place."""
        if local.fact.failure is None and local.fact.outcome is None:
            local.update(failure=failure_of(error), phase=WorkerPhase.FAILED)
            self._changed()
        self._kill(local)

    # --- regular duties ---

    async def _tend_always(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            self.tend()
            self._prune_when_due()

    def tend(self) -> None:
        """Read the logs, and stop waiting for what should long have happened."""
        now_s = self._monotonic()
        for worker, local in list(self._workers.items()):
            try:
                self._tend(local, now_s)
            except Exception:  # one worker's trouble must not keep the others unwatched
                _log.exception("worker %s could not be tended", worker)

    def _tend(self, local: LocalWorker, now_s: float) -> None:
        if not local.alive:
            return
        self._output.ship_log(local)
        if local.patience_ends_s is not None and now_s >= local.patience_ends_s:
            if local.exit_code is not None:
                self._end(local)
            else:
                self._give_up(local, "it closed its control connection and went on running")
        unanswered = local.fact.pid is None and local.exit_code is None
        if local.alive and unanswered and now_s - local.spawned_s >= SPAWN_TIMEOUT_S:
            self._spawner.replace(f"a spawn was not answered for {SPAWN_TIMEOUT_S:g} s")

    def _knows_the_log(self) -> bool:
        """Whether this replica has seen its own registration; before that it knows too few jobs to prune by."""
        own = self._state.nodes.get(self._settings.node)
        return own is not None and own.incarnation == self._settings.incarnation

    def _prune_when_due(self) -> None:
        if self._output.prune_due and self._knows_the_log():
            self._output.prune(
                {job.run_id: job.generation_number for job in self._state.jobs.values()},
                {worker[:2] for worker, local in self._workers.items() if local.alive},
            )


def _kill_group(pid: int | None) -> None:
    """SIGKILL to a worker and what it started. Only for a pid that the forkserver has not reported reaped."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
