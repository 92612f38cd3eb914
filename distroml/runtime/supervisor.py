"""The agent's duty: make this node's workers what the replicated assignment says, and report the facts.

``converge`` compares the members of current generations with the local processes (``assignment`` says which of them
is which rank) and tells each what to join, spawns what is missing and kills what is left over; it may be called at
any time and any number of times. Everything observed ends up in ``facts``.

A worker speaks through two wires that are not ordered with each other: its own socket (last words) and the
forkserver (its exit); ``endings`` settles what comes of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from distroml.consensus.state import ClusterState
from distroml.model import CheckpointStatus, Job, JobStatus
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime import control
from distroml.runtime.assignment import SupervisorSettings, duties, next_join
from distroml.runtime.barrier import MAX_OPEN, Barrier, NotTaken, RunGeneration
from distroml.runtime.control import FromWorker, Join
from distroml.runtime.endings import Endings, kill_group
from distroml.runtime.key_exchange import KeyExchange, have_joined
from distroml.runtime.local_worker import LocalWorker, Misbehaved
from distroml.runtime.replicas.for_workers import ALONE, ForWorkers
from distroml.runtime.roster import Roster
from distroml.runtime.spawner import Spawner, SpawnEvents, WorkerId
from distroml.runtime.worker_output import HistorySink, WorkerOutput
from distroml.runtime.worker_server import WorkerLink, WorkerServer, socket_path

ADOPT_TIMEOUT_S = 4.0
"""How long workers of an earlier agent may take to connect; under the grace that they give it."""
TEND_S = 0.1
"""How often logs are read and patience is checked."""


class Supervisor:
    """Runs this node's workers.

    Args:
        current: whether the log has taken this incarnation in; once true, it stays true. What the state says before may be
            of an earlier life that had the same number, where its directory was lost.
        changed: called after every change of ``facts`` that others should hear of soon.
        arrived: called with a barrier at which a local rank stands, that rank, and its value.
        copies: keeps copies of shards on other nodes, and brings what workers are to read.
        spawner: makes what forks the workers.
        monotonic: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        settings: SupervisorSettings,
        *,
        sink: HistorySink,
        current: Callable[[], bool],
        changed: Callable[[], None],
        arrived: Callable[[Barrier, int, int], None],
        copies: ForWorkers = ALONE,
        spawner: Callable[[Path, SpawnEvents, Path], Spawner] = Spawner,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._output = WorkerOutput(settings.log_dir, sink=sink, monotonic=monotonic)
        self._current, self._changed = current, changed
        self._arrived = arrived
        self._copies = copies
        self._monotonic = monotonic
        self._state = self._active = ClusterState()
        """What the log says; the same with jobs that have not ended only, of which there are few."""
        self._awaited: set[tuple[str, int]] = set()
        """Planned generations (with their run) whose other ranks cannot be met yet."""
        self._keys = KeyExchange()
        self._tending: asyncio.Task[None] | None = None
        self._stopping = False
        self._spoke = asyncio.Event()
        self._converging = False
        self._changed_meanwhile = False
        self._server = WorkerServer(
            socket_path(settings.data_dir),
            connected=self._on_connected,
            received=self._on_message,
            closed=self._on_closed,
        )
        self._roster = Roster(settings, self._server.path)
        self._workers = self._roster.workers
        self._endings = Endings(
            self._roster,
            self._output,
            settled=self._look_again,
            changed=changed,
            replace_spawner=lambda why: self._spawner.replace(why),
            monotonic=monotonic,
        )
        self._spawner = spawner(
            settings.data_dir / "forkserver.log",
            SpawnEvents(
                ready=self._look_again,
                running=self._on_running,
                spawned=self._on_spawned,
                failed=self._on_spawn_failed,
                exited=self._on_exited,
                lost=self._endings.all_gone,
            ),
            socket_path(settings.data_dir, "forkserver"),
        )

    # --- life ---

    async def start(self, *, warm: bool) -> None:
        """Open the control socket; with ``warm`` start the forkserver too (a node with slots).

        Workers that an earlier agent left are taken over first, as far as they say in time where they stand.

        Raises:
            OSError: the data directory or the socket cannot be used.
        """
        self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        await self._server.start()
        if warm:
            self._spawner.start()
            await self._spawner.adopted()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ADOPT_TIMEOUT_S):
                    await self._strangers_speak()
        self._tending = asyncio.create_task(self._tend_always(), name="supervisor")

    async def _strangers_speak(self) -> None:
        while self._roster.has_strangers:
            self._spoke.clear()
            await self._spoke.wait()

    @property
    def workers_since(self) -> int:
        """The incarnation whose agent spawned the oldest worker that was taken over; 0: there is none."""
        return self._roster.workers_since

    async def stop(self) -> None:
        """Kill all workers and the forkserver; what they wrote last still goes into history."""
        self._stopping = True
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        for local in self._workers.values():
            self._endings.kill(local)
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
        if state is not self._state:
            self._state = state
            jobs = {key: job for key, job in state.jobs.items() if not job.terminal}
            self._active = msgspec.structs.replace(state, jobs=jobs)
        self._changed_meanwhile = True
        if self._converging or self._stopping:
            return
        self._converging = True
        try:
            while self._changed_meanwhile:  # a spawn that fails, for one, is looked at once more
                self._changed_meanwhile = False
                self._converge_once(self._active)
        finally:
            self._converging = False

    def _converge_once(self, state: ClusterState) -> None:
        if not self._current():
            return
        if self._roster.has_strangers:
            return  # whose work cannot be shared out before it is known which it is
        self._awaited.clear()
        jobs = {job.run_id: job for job in state.jobs.values()}
        shares = duties(
            state, self._settings.node, self._settings.incarnation, self._roster.processes()
        )
        for run_id, share in shares.items():  # before anything is spawned on their slots
            for worker in share.retired:
                self._endings.retire((run_id, worker))
        for run_id, share in shares.items():
            for worker in share.aborted:
                self._workers[run_id, worker].abort()
            for rank, worker_or_none in share.ranks.items():
                self._assign(jobs[run_id], rank, worker_or_none)
            for spare in share.spares:
                if spare is None:
                    self._spawn(jobs[run_id], None)
        if len(self._keys):
            self._keys.forget({run_id: job.generation_number for run_id, job in jobs.items()})

    def facts(self) -> tuple[WorkerFact, ...]:
        """Everything known of the local workers, those of ended generations too while they live."""
        return self._roster.facts(self._monotonic())

    def take_peer_report(self, report: NodeReport) -> None:
        """Pass on rendezvous keys that other nodes' ranks published."""
        for fact in report.workers:
            if fact.rendezvous:
                self._share_keys(fact.run_id, fact.generation, fact.rendezvous)

    def tell_ranks(
        self,
        generation: RunGeneration,
        ranks: Iterable[int],
        news: control.Released | control.Awaited,
    ) -> None:
        """Pass on to local ranks what is known of a barrier at which they stand."""
        concerned = {(generation.run_id, generation.number, rank) for rank in ranks}
        for local in self._workers.values():
            fact = local.fact
            if (fact.run_id, fact.generation, fact.rank) in concerned and local.link is not None:
                local.link.send(news)

    def _assign(self, job: Job, rank: int, worker: int | None) -> None:
        """Have a process be this rank of the job's newest generation."""
        if worker is None:
            self._spawn(job, next_join(job, rank))
            return
        local = self._workers[job.run_id, worker]
        join = next_join(job, rank, local.process)
        keys = self._keys.known(job.run_id, join.generation)
        # Nobody leaves a generation that trains for one whose other ranks are still starting.
        joining = job.generation.joining if job.generation else ()
        if not join.at_boundary or have_joined(keys, join.generation, joining):
            self._tell(local, job, join, keys)
        else:
            self._awaited.add((job.run_id, join.generation))
        if job.spec.checkpointing.delta:
            local.tell_committed(job.newest_checkpoint())
        if job.status is JobStatus.STOPPING:
            local.send_stop()
        elif job.generation is not None and job.generation.vacated:
            local.send_vacate(job.generation.number)
        elif job.is_to_save:
            local.send_save(job.save_request)
        if local.fact.shards or local.fact.former:
            local.forget_shards(
                {c.step for c in job.checkpoints if c.status is CheckpointStatus.COMMITTED}
            )

    def _tell(self, local: LocalWorker, job: Job, join: Join, keys: Mapping[str, bytes]) -> None:
        if local.told != join.generation:
            self._output.ship_log(local)  # what it wrote so far is of the generation before
        leaving = job.outgoing.number if job.outgoing else None
        if local.tell(join, leaving=leaving):
            local.send_keys(keys)
            self._changed()

    def _spawn(self, job: Job, join: Join | None) -> None:
        if not self._spawner.ready:
            return
        plan, local = self._roster.spawned(job, join, self._monotonic())
        path = Path(plan.log_path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A node whose data directory was put back may have left one, whose lines are no news.
            path.unlink(missing_ok=True)
            self._spawner.spawn(plan)
        except (OSError, ValueError) as error:
            self._endings.not_started(local, error)
        self._changed()

    # --- what the forkserver tells ---

    def _look_again(self) -> None:
        self.converge(self._state)
        self._changed()

    def _on_running(self, told: control.Running) -> None:
        """A worker that an earlier agent spawned; it will connect by itself."""
        local = self._roster.taken_over(told, self._monotonic())
        local.patience_ends_s = self._monotonic() + ADOPT_TIMEOUT_S

    def _on_spawned(self, worker: WorkerId, pid: int) -> None:
        local = self._workers.get(worker)
        if local is None or not local.alive:
            kill_group(pid)
            return
        self._roster.runs_as(worker, pid)
        self._look_again()

    def _on_spawn_failed(self, worker: WorkerId, reason: str) -> None:
        local = self._workers.get(worker)
        if local is not None and local.alive:
            self._endings.not_started(local, reason)

    def _on_exited(self, pid: int, status: int) -> None:
        local = self._roster.ended(pid)
        if local is not None and local.alive:
            self._endings.gone(local, status)

    # --- what workers tell ---

    def _on_connected(self, link: WorkerLink) -> bool:
        local = self._workers.get(link.worker)
        if local is None or not local.alive or local.said_hello:
            return False
        if local.fact.pid not in (None, link.pid):
            return False
        local.link = link
        local.said_hello = True
        self._endings.connected(local)
        if local.adopted:
            local.introduce(link.hello)
            self._spoke.set()
        elif local.told:
            local.update(phase=WorkerPhase.CONNECTING)
        local.send_keys(self._keys.known(link.worker[0], local.told))
        self._look_again()
        return True

    def _on_closed(self, link: WorkerLink, reason: str) -> None:
        """The control connection ended, because the worker did or because of ``reason``."""
        local = self._workers.get(link.worker)
        if local is None or local.link is not link:
            return
        local.link = None
        self._endings.disconnected(local, reason)

    def _on_message(self, worker: WorkerId, message: FromWorker) -> None:
        """Take a message.

        Raises:
            Misbehaved: the connection is to be closed.
        """
        local = self._workers.get(worker)
        if local is None or not local.alive:
            return
        local.heard_s = self._monotonic()
        if self._copies.takes(local, message, self._changed):
            return
        phase = local.fact.phase
        told = local.take(message)
        match message:
            case control.Progress(generation=generation, metrics=metrics) if metrics:
                # True of its steps even if it has another generation by now.
                rank = local.rank_in(generation)
                if rank is not None:
                    fact = msgspec.structs.replace(local.fact, generation=generation, rank=rank)
                    self._output.ship_metrics(fact, metrics)
            case control.Rendezvous(key=key, value=value) if told:
                self._share_keys(worker[0], local.fact.generation, {key: value})
            case control.Arrive(generation=generation, name=name, value=value):
                if generation == local.fact.generation:
                    self._on_arrival(local.fact, name, value)
            case control.Failed():
                self._output.ship_log(local)
                local.update(last_lines=local.tail.last_lines)
        if local.fact.phase is not phase:
            self.converge(self._state)  # what it is told may depend on it
        if told:
            self._changed()

    def _on_arrival(self, fact: WorkerFact, name: str, value: int) -> None:
        generation = RunGeneration(fact.job_id, fact.run_id, fact.generation)
        try:
            self._arrived(Barrier(generation, name), fact.rank, value)
        except NotTaken:
            raise Misbehaved(f"it stands at more than {MAX_OPEN} barriers") from None

    def _share_keys(self, run_id: str, generation: int, keys: dict[str, bytes]) -> None:
        if self._keys.learn(run_id, generation, keys):
            known = self._keys.known(run_id, generation)
            for (run, _), local in self._workers.items():
                if (run, local.told) == (run_id, generation):
                    local.send_keys(known)
            if (run_id, generation) in self._awaited:
                self.converge(self._state)

    # --- regular duties ---

    async def _tend_always(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            self.tend()
            self._prune_when_due()

    def tend(self) -> None:
        """Read the logs, and stop waiting for what should long have happened."""
        self._endings.tend()

    def _prune_when_due(self) -> None:
        if self._output.prune_due and self._current():  # before, it knows too few jobs
            self._output.prune(
                {job.run_id for job in self._state.jobs.values()},
                {worker for worker, local in self._workers.items() if local.alive},
            )
