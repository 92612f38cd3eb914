"""Plays the agent for worker tests: a real forkserver, real forked workers, relayed rendezvous keys.

One thread, one selector: ``pump`` moves frames until a condition holds, so a test reads top to bottom.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distroml.model import Checkpoint
from distroml.reports import Marks, ShardFact, WorkerFailure, WorkerOutcome, WorkerPhase
from distroml.runtime.checkpoint.commit import publish_latest, write_manifest
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.control import (
    Abort,
    CheckpointHere,
    Exited,
    Failed,
    Finished,
    FrameReader,
    FromForkserver,
    FromWorker,
    Hello,
    Join,
    MetricRecord,
    NeedCheckpoint,
    Parked,
    Progress,
    Ready,
    Rendezvous,
    RendezvousKeys,
    ShardAbandoned,
    ShardDurable,
    Spawn,
    Spawned,
    SpawnFailed,
    Stop,
    ToWorker,
    Vacate,
    WorkerPlan,
    encode_frame,
)
from distroml.spec import JobSpec

REPOSITORY = Path(__file__).resolve().parents[3]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parent),  # where the tests' own adapters are
}
START_TIMEOUT_S = 90.0
WAIT_TIMEOUT_S = 90.0


@dataclass
class StubWorker:
    """All that one worker told."""

    plan: WorkerPlan
    spawned_at: float
    generation: int = 0
    rank: int = 0
    pid: int | None = None
    link: socket.socket | None = None
    phases: list[tuple[WorkerPhase, float]] = field(default_factory=list)
    step: int = 0
    total_steps: int | None = None
    metrics: list[MetricRecord] = field(default_factory=list)
    keys: dict[str, bytes] = field(default_factory=dict)
    shards: list[ShardFact] = field(default_factory=list)
    abandoned: list[ShardAbandoned] = field(default_factory=list)
    failure: WorkerFailure | None = None
    outcome: WorkerOutcome | None = None
    exit_status: int | None = None
    parked: list[Parked] = field(default_factory=list)
    marks: dict[int, Marks] = field(default_factory=dict)
    """By generation."""
    waiting_s: float = 0.0
    evaluating: bool = False
    needs: list[NeedCheckpoint] = field(default_factory=list)

    def series(self, name: str) -> dict[int, float]:
        """Values of one metric by step."""
        return {m.step: m.values[name] for m in self.metrics if name in m.values}


class AgentStub:
    """One agent with its forkserver, for any number of generations one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store_dir = directory / "store"
        self.store = FileStore(self.store_dir)
        self.workers: dict[tuple[str, int], StubWorker] = {}
        self.spawn_failures: list[SpawnFailed] = []
        self.ready_pid: int | None = None
        self.env: dict[str, str] = {}
        """Added to the environment of workers that are spawned from now on."""
        self.mending: Callable[[], object] = lambda: None
        """Called before a worker that has read broken bytes is told to read again."""
        self._runs = 0
        self._serial = 0
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.control_path = str(directory / "control.sock")
        self._listener.bind(self.control_path)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        ours, theirs = socket.socketpair()
        self._forkserver = ours
        self._forkserver_frames: FrameReader = FrameReader(FromForkserver)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "distroml.runtime.worker.forkserver",
                "--fd",
                str(theirs.fileno()),
            ],
            pass_fds=[theirs.fileno()],
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT,
        )
        theirs.close()
        self._selector.register(ours, selectors.EVENT_READ, self._from_forkserver)
        self.pump(lambda: self.ready_pid is not None, "the forkserver to be ready", START_TIMEOUT_S)

    def close(self) -> None:
        self._forkserver.close()
        self.process.wait(timeout=20)
        self._listener.close()

    # --- acting ------------------------------------------------------------------------------------------------

    def new_run(self) -> str:
        self._runs += 1
        return f"run-{self._runs}"

    def join(
        self,
        rank: int = 0,
        world_size: int = 1,
        generation: int = 1,
        checkpoint: Checkpoint | None = None,
        at_boundary: bool = False,
        resume_step: int = 0,
    ) -> Join:
        return Join(
            generation=generation,
            rank=rank,
            local_rank=rank,
            world_size=world_size,
            checkpoint=checkpoint,
            at_boundary=at_boundary,
            resume_step=resume_step,
        )

    def plan(self, spec: JobSpec, run_id: str = "run-0", join: Join | None = None) -> WorkerPlan:
        self._serial += 1
        return WorkerPlan(
            job_id="job",
            run_id=run_id,
            worker=self._serial,
            node="stub",
            host="127.0.0.1",
            spec=spec,
            store_dir=str(self.store_dir),
            control_path=self.control_path,
            log_path=str(self.directory / f"{run_id}-w{self._serial}.log"),
            join=join,
        )

    def spawn(self, plan: WorkerPlan) -> StubWorker:
        worker = StubWorker(plan, time.monotonic())
        if plan.join is not None:
            worker.generation, worker.rank = plan.join.generation, plan.join.rank
        self.workers[plan.run_id, plan.worker] = worker
        self._forkserver.sendall(encode_frame(Spawn(plan=plan, env=self.env)))
        return worker

    def start(
        self,
        spec: JobSpec,
        run_id: str,
        generation: int = 1,
        checkpoint: Checkpoint | None = None,
        world_size: int | None = None,
    ) -> list[StubWorker]:
        """Spawn all ranks of a generation."""
        return self.form(
            spec,
            run_id,
            [None] * (world_size or spec.resources.workers),
            generation,
            checkpoint=checkpoint,
        )

    def form(
        self,
        spec: JobSpec,
        run_id: str,
        members: Sequence[StubWorker | None],
        generation: int,
        *,
        checkpoint: Checkpoint | None = None,
        at_boundary: bool = False,
        resume_step: int = 0,
    ) -> list[StubWorker]:
        """Make ``members`` the ranks of a generation, in this order; None is a new process."""
        ranks = []
        for rank, member in enumerate(members):
            join = self.join(
                rank,
                len(members),
                generation,
                checkpoint,
                at_boundary=at_boundary and member is not None,
                resume_step=resume_step,
            )
            if member is None:
                ranks.append(self.spawn(self.plan(spec, run_id, join)))
            else:
                member.generation, member.rank, member.keys = generation, rank, {}
                self.send(member, join)
                ranks.append(member)
        return ranks

    def send(self, worker: StubWorker, message: ToWorker) -> None:
        self.pump(lambda: worker.link is not None, "the worker to connect")
        assert worker.link is not None
        worker.link.sendall(encode_frame(message))

    def run(self, spec: JobSpec, **kwargs: object) -> list[StubWorker]:
        """Start a generation of a new run (unless named) and wait for its end."""
        kwargs.setdefault("run_id", self.new_run())
        workers = self.start(spec, **kwargs)  # type: ignore[arg-type]
        self.wait_exit(workers)
        return workers

    def wait_exit(self, workers: list[StubWorker], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        self.pump(
            lambda: all(w.exit_status is not None for w in workers),
            "all workers to exit",
            timeout_s,
        )

    def wait_step(self, worker: StubWorker, step: int) -> None:
        self.pump(
            lambda: worker.step >= step or worker.exit_status is not None,
            f"rank {worker.rank} to complete step {step}",
        )
        assert worker.step >= step, self.log(worker)

    def kill(self, *workers: StubWorker) -> None:
        """SIGKILL to all of them at once: none has the time to notice another one's end."""
        self.pump(lambda: all(worker.pid is not None for worker in workers), "all to be forked")
        pids = [worker.pid for worker in workers if worker.pid is not None]
        for sent in (signal.SIGSTOP, signal.SIGKILL):  # a stopped one sees no other one die
            for pid in pids:
                os.kill(pid, sent)

    def kill_if_alive(self, worker: StubWorker) -> None:
        """End what would go with its generation; it may have ended by itself."""
        if worker.exit_status is None and worker.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    def stop(self, worker: StubWorker) -> None:
        self.send(worker, Stop())

    def vacate(self, worker: StubWorker) -> None:
        self.send(worker, Vacate(generation=worker.generation))

    def abort(self, workers: Sequence[StubWorker], generation: int) -> None:
        for worker in workers:
            self.send(worker, Abort(generation=generation))

    def hang_up(self, worker: StubWorker) -> None:
        """Close the control socket, as a dying agent would."""
        assert worker.link is not None
        self._selector.unregister(worker.link)
        worker.link.close()

    def pause_reading(self, worker: StubWorker) -> None:
        assert worker.link is not None
        self._paused = self._selector.unregister(worker.link).data

    def resume_reading(self, worker: StubWorker) -> None:
        assert worker.link is not None
        self._selector.register(worker.link, selectors.EVENT_READ, self._paused)

    def wait_for_log(self, worker: StubWorker, text: str) -> None:
        self.pump(lambda: text in self.log(worker), f"{text!r} in the log", poll_s=0.02)

    def commit(self, workers: list[StubWorker], step: int) -> Checkpoint:
        """Write the manifest of the shards that ``workers`` reported for ``step``."""
        plan = workers[0].plan
        facts = [shard for w in workers for shard in w.shards if shard.step == step]
        checkpoint = write_manifest(
            self.store,
            job_id=plan.job_id,
            run_id=plan.run_id,
            generation=workers[0].generation,
            shards=facts,
            committed_at=0.0,
        )
        publish_latest(self.store, checkpoint)
        return checkpoint

    def log(self, worker: StubWorker) -> str:
        return Path(worker.plan.log_path).read_text()

    # --- frames ------------------------------------------------------------------------------------------------

    def pump(
        self,
        until: Callable[[], bool],
        awaited: str,
        timeout_s: float = WAIT_TIMEOUT_S,
        poll_s: float = WAIT_TIMEOUT_S,
    ) -> None:
        """Move frames until ``until`` holds; fails with what was ``awaited`` and all logs.

        Args:
            poll_s: how often to look where no frame tells of a change.
        """
        deadline = time.monotonic() + timeout_s
        while not until():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"waited {timeout_s:g} s for {awaited}\n{self._story()}")
            for key, _ in self._selector.select(min(left, poll_s)):
                key.data(key.fileobj)

    @staticmethod
    def wait_until(until: Callable[[], bool], awaited: str) -> None:
        """Wait for something that no frame tells of."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not until():
            assert time.monotonic() < deadline, f"waited {WAIT_TIMEOUT_S:g} s for {awaited}"
            select.select([], [], [], 0.02)

    def _story(self) -> str:
        parts = []
        for (run, number), w in list(self.workers.items())[-8:]:
            tail = self.log(w)[-1500:] if Path(w.plan.log_path).exists() else ""
            phase = w.phases[-1][0] if w.phases else None
            parts.append(
                f"--- {run} w{number} g{w.generation} r{w.rank} pid {w.pid} {phase} step {w.step} "
                f"exit {w.exit_status} {w.failure}\n{tail}"
            )
        return "\n".join(parts)

    def _from_forkserver(self, ours: socket.socket) -> None:
        data = ours.recv(65_536)
        if not data:
            raise AssertionError("the forkserver is gone\n" + self._story())
        for message in self._forkserver_frames.feed(data):
            if isinstance(message, Ready):
                self.ready_pid = message.pid
            elif isinstance(message, Spawned):
                self.workers[message.run_id, message.worker].pid = message.pid
            elif isinstance(message, SpawnFailed):
                self.spawn_failures.append(message)
            elif isinstance(message, Exited):
                for worker in self.workers.values():
                    if worker.pid == message.pid and worker.exit_status is None:
                        self._drain(worker)
                        worker.exit_status = message.status

    def _accept(self, listener: socket.socket) -> None:
        link, _ = listener.accept()
        frames: FrameReader = FrameReader(FromWorker)
        owner: list[StubWorker] = []
        self._selector.register(link, selectors.EVENT_READ, lambda s: self._read(s, frames, owner))

    def _drain(self, worker: StubWorker) -> None:
        """Read what a worker that has exited left in its socket."""
        while worker.link is not None and worker.link.fileno() >= 0:
            try:
                key = self._selector.get_key(worker.link)
            except KeyError:
                return
            key.data(worker.link)

    def _read(self, link: socket.socket, frames: FrameReader, owner: list[StubWorker]) -> None:
        if link.fileno() < 0:  # drained and closed while its event was already selected
            return
        try:
            data = link.recv(65_536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(link)
            link.close()
            return
        for message in frames.feed(data):
            if isinstance(message, Hello):
                worker = self.workers[message.run_id, message.worker]
                worker.link = link
                owner.append(worker)
                self._send_keys(worker)
            else:
                self._take(owner[0], message)

    def _send_keys(self, worker: StubWorker) -> None:
        keys: dict[str, bytes] = {}
        for other in self._peers(worker):
            keys |= other.keys
        if keys and worker.link is not None and worker.link.fileno() >= 0:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # killed meanwhile
                worker.link.sendall(encode_frame(RendezvousKeys(keys=keys)))

    def _peers(self, worker: StubWorker) -> list[StubWorker]:
        return [
            w
            for w in self.workers.values()
            if w.plan.run_id == worker.plan.run_id
            and w.generation == worker.generation
            and w is not worker
            and w.exit_status is None
        ]

    def _take(self, worker: StubWorker, message: object) -> None:
        now = time.monotonic()
        if isinstance(message, Rendezvous):
            worker.keys[message.key] = message.value
            for other in self._peers(worker):
                if other.link is not None and other.link.fileno() >= 0:
                    self._send_keys(other)
        elif isinstance(message, NeedCheckpoint):
            worker.needs.append(message)
            if message.mend:
                self.mending()
            if worker.link is not None:
                here = CheckpointHere(number=message.number)
                worker.link.sendall(encode_frame(here))
        elif isinstance(message, Progress):
            worker.waiting_s = message.waiting_s
            worker.evaluating = message.evaluating
            if message.marks is not None:
                worker.marks[message.generation] = message.marks
            if not worker.phases or worker.phases[-1][0] is not message.phase:
                worker.phases.append((message.phase, now))
            worker.step = message.step
            worker.total_steps = message.total_steps
            worker.metrics += message.metrics
        elif isinstance(message, Parked):
            worker.parked.append(message)
        elif isinstance(message, ShardDurable):
            worker.shards.append(message.shard)
        elif isinstance(message, ShardAbandoned):
            worker.abandoned.append(message)
        elif isinstance(message, Failed):
            worker.failure = message.failure
        elif isinstance(message, Finished):
            worker.outcome = message.outcome
