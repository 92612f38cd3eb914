"""An agent for tests of the supervisor: a spawner that forks nothing, workers played over the real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from distroml.consensus.state import ClusterState
from distroml.model import Member
from distroml.reports import WorkerFact
from distroml.runtime.assignment import SupervisorSettings
from distroml.runtime.barrier import Barrier, NotTaken
from distroml.runtime.control import (
    FrameReader,
    FromWorker,
    Hello,
    MetricRecord,
    ToWorker,
    WorkerPlan,
    encode_frame,
)
from distroml.runtime.spawner import SpawnEvents, WorkerId
from distroml.runtime.supervisor import Supervisor
from distroml.runtime.worker_output import HistorySink
from distroml.runtime.worker_server import socket_path
from tests.builders import Log, form, members, node, submit
from tests.consensus.live import until


class FakeSpawner:
    """Notes what it is asked for; the test says what came of it."""

    def __init__(self, log_path: Path, events: SpawnEvents, listen: Path) -> None:
        self.events = events
        self.ready = True
        self.pid: int | None = None
        self.task: asyncio.Task[None] | None = None
        self.plans: list[WorkerPlan] = []
        self.replaced: list[str] = []
        self.refuses: Exception | None = None

    def start(self) -> None: ...
    async def adopted(self) -> None: ...
    async def stop(self) -> None: ...

    def spawn(self, plan: WorkerPlan) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.plans.append(plan)

    def replace(self, why: str) -> None:
        self.replaced.append(why)

    def die(self) -> None:
        self.ready = False
        self.events.lost()


class FakeWorker:
    """A worker's end of the control socket."""

    def __init__(self, worker: WorkerId, pid: int) -> None:
        self.worker = worker
        self.pid = pid
        self.got: list[object] = []
        self.closed = False
        self.hello = Hello(run_id=worker[0], worker=worker[1], pid=pid, generation=0, rank=0)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> FakeWorker:
        reader, self._writer = await asyncio.open_unix_connection(str(path))
        self._reading = asyncio.create_task(self._read(reader))
        self.say(self.hello)
        return self

    def say(self, message: FromWorker) -> None:
        self.write(encode_frame(message))

    def write(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)

    async def hang_up(self) -> None:
        assert self._writer is not None
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames: FrameReader[object] = FrameReader(ToWorker)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                self.got += frames.feed(data)
        self.closed = True

    async def stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()


class Agent:
    """A supervisor on node ``a``, the log it follows, and what it told."""

    def __init__(self, directory: Path, *, incarnation: int = 1) -> None:
        self.log = Log()
        self.log.ok(node("a"))
        self.log.ok(node("b"))
        self.now_s = 100.0
        self.changes = 0
        self.metrics: list[MetricRecord] = []
        self.lines: list[str] = []
        self.arrived: list[tuple[Barrier, int, int]] = []
        self.full = False
        """Whether no rank may stand at one more barrier."""
        self.sink_fails = False
        self.data_dir = directory
        self.workers: list[FakeWorker] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.registered = True
        self.supervisor = Supervisor(
            SupervisorSettings(
                node="a",
                incarnation=incarnation,
                host="127.0.0.1",
                data_dir=directory,
                store_dir=directory / "store",
            ),
            sink=HistorySink(metrics=self._take_metrics, logs=self._take_logs),
            current=lambda: self.registered,
            changed=self._changed,
            arrived=self._arrive,
            spawner=FakeSpawner,  # type: ignore[arg-type]
            monotonic=lambda: self.now_s,
        )

    @property
    def spawner(self) -> FakeSpawner:
        made = self.supervisor._spawner
        assert isinstance(made, FakeSpawner)
        return made

    @property
    def state(self) -> ClusterState:
        return self.log.state

    async def close(self) -> None:
        await self.supervisor.stop()
        for worker in self.workers:
            await worker.stop()
        for process in self.processes:
            process.kill()
            process.wait()

    # --- the log ---

    def assign(
        self,
        *where: str,
        job_id: str = "job",
        generation: int = 1,
        spares: tuple[Member, ...] = (),
    ) -> None:
        """A generation of the job with one rank per name, from its newest checkpoint."""
        if job_id not in self.state.jobs:
            self.log.ok(submit(job_id, workers=len(where)))
        newest = self.state.jobs[job_id].newest_checkpoint()
        step = newest.step if newest else None
        where_to = members(*where)
        self.log.ok(form(job_id, generation, where_to, spares=spares, checkpoint_step=step))
        self.converge()

    def converge(self) -> None:
        self.supervisor.converge(self.state)

    # --- the processes ---

    def process(self) -> int:
        """A real process with a group of its own, as a worker is."""
        made = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.processes.append(made)
        return made.pid

    def killed(self, pid: int) -> bool:
        (process,) = [one for one in self.processes if one.pid == pid]
        return process.poll() == -signal.SIGKILL

    def spawned(self, rank: int = 0, *, generation: int = 1, pid: int | None = None) -> int:
        pid = pid or self.process()
        self.spawner.events.spawned(self.worker_of(rank, generation), pid)
        return pid

    def worker_of(self, rank: int = 0, generation: int = 1) -> WorkerId:
        """The process that was spawned as this rank; a stranger's name where none was."""
        for plan in reversed(self.spawner.plans):
            if plan.join and (plan.join.rank, plan.join.generation) == (rank, generation):
                return plan.run_id, plan.worker
        return "run-job", 999

    async def connect(
        self, rank: int = 0, *, generation: int = 1, pid: int = 0, met: bool = True
    ) -> FakeWorker:
        """A worker that said Hello; with ``met`` the agent has taken it."""
        worker = FakeWorker(self.worker_of(rank, generation), pid)
        self.workers.append(worker)
        await worker.connect(self.socket)
        if met:
            await until(
                lambda: self.fact(rank, generation).phase == "CONNECTING", "the worker to be met"
            )
        return worker

    async def running(self, rank: int = 0) -> FakeWorker:
        """A worker that was spawned and is connected."""
        return await self.running_in(1, rank)

    async def running_in(self, generation: int, rank: int) -> FakeWorker:
        """The same in another generation than the first."""
        pid = self.spawned(rank, generation=generation)
        return await self.connect(rank, generation=generation, pid=pid)

    async def spare(self) -> FakeWorker:
        """The first process that was spawned without a rank; it is connected."""
        plan = next(plan for plan in self.spawner.plans if plan.join is None)
        pid = self.process()
        self.spawner.events.spawned((plan.run_id, plan.worker), pid)
        worker = FakeWorker((plan.run_id, plan.worker), pid)
        self.workers.append(worker)
        await worker.connect(self.socket)
        local = self.supervisor._workers[plan.run_id, plan.worker]
        await until(lambda: local.link is not None, "the spare to be met")
        return worker

    def linked(self, rank: int = 0, generation: int = 1) -> bool:
        """Whether the agent holds a connection with the rank."""
        return self.supervisor._workers[self.worker_of(rank, generation)].link is not None

    @property
    def socket(self) -> Path:
        return socket_path(self.data_dir)

    # --- what is told ---

    def fact(self, rank: int = 0, generation: int = 1) -> WorkerFact:
        found = self.find(rank, generation)
        assert found is not None
        return found

    def find(self, rank: int = 0, generation: int = 1) -> WorkerFact | None:
        for fact in self.supervisor.facts():
            if (fact.rank, fact.generation) == (rank, generation):
                return fact
        return None

    async def until_fact(
        self,
        holds: Callable[[WorkerFact], object],
        awaited: str,
        rank: int = 0,
        generation: int = 1,
    ) -> WorkerFact:
        def met() -> bool:
            fact = self.find(rank, generation)
            return fact is not None and bool(holds(fact))

        await until(met, awaited)
        return self.fact(rank, generation)

    def write_log(self, text: str, rank: int = 0) -> None:
        (plan,) = [plan for plan in self.spawner.plans if plan.join and plan.join.rank == rank]
        self.write_to(plan, text)

    def write_to(self, plan: WorkerPlan, text: str) -> None:
        fd = os.open(plan.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with open(fd, "w") as file:
            file.write(text)

    def _take_metrics(self, fact: WorkerFact, records: tuple[MetricRecord, ...]) -> None:
        if self.sink_fails:
            raise RuntimeError("history is broken")
        self.metrics += records

    def _take_logs(self, fact: WorkerFact, lines: list[str]) -> None:
        if self.sink_fails:
            raise RuntimeError("history is broken")
        self.lines += lines

    def _arrive(self, barrier: Barrier, rank: int, value: int) -> None:
        if self.full:
            raise NotTaken("too_many_open")
        self.arrived.append((barrier, rank, value))

    def _changed(self) -> None:
        self.changes += 1
