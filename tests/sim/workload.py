"""Clients of a simulated cluster: jobs through the real Proposer, linearizable reads, leadership handed over.

Each client step belongs to an *errand*: the life of one job (submit, cancel, remove). A step whose outcome is
unknown is tried again through any node with the same Idempotency-Key, as a client of the API would. Clients come
in bursts and lulls, and some go away before they are answered. Whatever a client waits for must end within its
bound, on every node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from distroml.commands import CancelJob, RemoveJob, SetNodeStatus, SubmitJob
from distroml.consensus.raft_types import NotLeader
from distroml.errors import DistroMLError
from distroml.model import NodeStatus
from distroml.spec import JobSpec
from tests.sim.cluster import Cluster
from tests.sim.process import Process

SLOWEST_CLOCK = 0.7
GRACE_S = 1.0
PACES = (0.1, 0.2, 0.5, 1.0, 3.0)
"""Shares of the mean rate at which clients come; each goes on for `PACE_S`."""
PACE_S = 3.0
GOES_AWAY_SHARE = 0.05
HANDOVER_S = 1.0
_STEPS = ("submit", "cancel", "remove")
_SPEC = JobSpec()


class _Errand:
    """The life of one job as a client wants it; one step at a time."""

    __slots__ = ("busy", "job_id", "name", "step", "tries")

    def __init__(self, name: str) -> None:
        self.name = name
        self.step = 0
        self.tries = 0
        self.busy = False
        self.job_id: str | None = None


class _Operation:
    __slots__ = ("errand", "kind", "paused_s", "process", "started_at", "task", "timeout_s")

    def __init__(
        self, process: Process, kind: str, timeout_s: float, errand: _Errand | None
    ) -> None:
        self.process, self.kind, self.timeout_s, self.errand = process, kind, timeout_s, errand
        self.started_at = process.loop.world.now
        self.paused_s = process.loop.paused_s
        self.task: asyncio.Task[None] | None = None

    def overdue(self, now: float) -> bool:
        """Paused time does not count, and a slow clock has longer seconds."""
        loop = self.process.loop
        if loop.paused:
            return False
        waited_s = now - self.started_at - (loop.paused_s - self.paused_s)
        return waited_s > self.timeout_s / SLOWEST_CLOCK + GRACE_S


class Workload:
    def __init__(self, cluster: Cluster, rate: float, *, steady: bool = False) -> None:
        """`steady`: no bursts, and nobody wants leadership to move."""
        self.cluster, self.rate, self._steady = cluster, rate, steady
        self._paces = (1.0,) if steady else PACES
        self._rng = cluster.world.stream("clients")
        self._errands: list[_Errand] = []
        self._made = 0
        self._open: dict[_Operation, None] = {}
        self.active = True
        self.present: dict[str, int] = {}
        """Job id → index: acknowledged jobs that nobody has asked to remove."""
        self.counts = {
            "writes acked": 0,
            "writes unknown": 0,
            "reads": 0,
            "reads refused": 0,
            "clients gone": 0,
            "handovers": 0,
        }
        self._pace = 1.0
        self._pace_until = 0.0
        cluster.on_death = self._died
        cluster.world.later(0.3, self._change_pace)
        cluster.world.later(1.0, self._watch)

    # ------------------------------------------------------------------ the clients

    def _change_pace(self) -> None:
        self._pace = self._rng.choice(self._paces)
        self._pace_until = self.cluster.world.now + PACE_S
        self._await_client()

    def _await_client(self) -> None:
        world = self.cluster.world
        at = world.now + self._rng.expovariate(self.rate * self._pace)
        if at < self._pace_until:
            world.at(at, self._tick)
        else:
            world.at(self._pace_until, self._change_pace)

    def _tick(self) -> None:
        if not self.active:
            return
        self._await_client()
        rng, cluster = self._rng, self.cluster
        names = sorted(cluster.processes)
        if not names:
            return
        process = cluster.processes[rng.choice(names)]
        if not process.started:
            return
        kind = rng.random()
        if kind < 0.3:
            self.read(process)
        elif kind < 0.35:
            self._status(process)
        elif kind < 0.36 and not self._steady:
            self.hand_over(process)
        else:
            self._next_step(process)

    def _next_step(self, process: Process) -> None:
        idle = [errand for errand in self._errands if not errand.busy]
        if len(self._errands) < 12 and (not idle or self._rng.random() < 0.4):
            self._made += 1
            errand = _Errand(f"job-{self._made}")
            self._errands.append(errand)
        elif idle:
            errand = self._rng.choice(idle)
        else:
            return
        self.write(process, errand)

    def write(self, process: Process, errand: _Errand) -> None:
        errand.busy = True
        errand.tries += 1
        timeout_s = self._rng.choice((0.5, 2.0, 5.0))
        step = _STEPS[errand.step]
        if step == "remove" and errand.job_id is not None:
            self.present.pop(errand.job_id, None)
        command = _command(errand, step)
        operation = _Operation(process, step, timeout_s, errand)
        self._begin(operation, self._write(operation, command))

    async def _write(self, operation: _Operation, command: Any, term: int | None = None) -> None:
        errand, process = operation.errand, operation.process
        try:
            outcome = await process.proposer.propose(command, operation.timeout_s, term=term)
        except DistroMLError:
            self.counts["writes unknown"] += 1
            return
        finally:
            self._end(operation)
        self.counts["writes acked"] += 1
        self.cluster.checker.acknowledged(process, outcome)
        if errand is None:
            return
        world = self.cluster.world
        if outcome.error:
            world.violate(f"{errand.name}, {operation.kind}, try {errand.tries}: {outcome}")
        if operation.kind == "submit":
            errand.job_id = outcome.job_id
            assert outcome.job_id is not None
            self.present[outcome.job_id] = outcome.index
        errand.step += 1
        errand.tries = 0
        if errand.step == len(_STEPS):
            self._errands.remove(errand)

    def _status(self, process: Process) -> None:
        """A write without a key: exactly once by the proposer's own numbers only. A leader decides for its term."""
        status = self._rng.choice((NodeStatus.ALIVE, NodeStatus.LOST))
        command = SetNodeStatus(
            name=process.name, incarnation=process.incarnation, status=status, reason="simulated"
        )
        operation = _Operation(process, "status", 3.0, None)
        term = process.raft.term if process.leads else None
        self._begin(operation, self._write(operation, command, term))

    def read(self, process: Process) -> None:
        operation = _Operation(process, "read", self._rng.choice((0.5, 2.0)), None)
        floor = self.cluster.checker.floor
        self._begin(operation, self._read(operation, floor, dict(self.present)))

    async def _read(self, operation: _Operation, floor: int, expected: dict[str, int]) -> None:
        process = operation.process
        try:
            index = await process.raft.read_index(operation.timeout_s)
        except (NotLeader, TimeoutError):
            self.counts["reads refused"] += 1
            return
        finally:
            self._end(operation)
        self.counts["reads"] += 1
        self.cluster.checker.read(process, index, floor)
        jobs = process.replica.state.jobs
        for job_id in expected:
            if job_id not in jobs and job_id in self.present:
                self.cluster.world.violate(f"a read on {process.name} misses acked job {job_id}")

    def hand_over(self, process: Process) -> None:
        """Leadership is to go to some voter, or to whom the leader likes; any node may be asked."""
        target = self._rng.choice((None, *self.cluster.voters))
        operation = _Operation(process, "handover", HANDOVER_S, None)
        self._begin(operation, self._hand_over(operation, target))

    async def _hand_over(self, operation: _Operation, target: str | None) -> None:
        process = operation.process
        try:
            leader = await process.raft.transfer_leadership(target, operation.timeout_s)
        except NotLeader:
            return
        finally:
            self._end(operation)
        if leader is not None and target not in (None, leader):
            self.cluster.world.violate(f"leadership went to {leader} where {target} was to have it")
        self.counts["handovers"] += leader is not None

    # ------------------------------------------------------------------ no stuck future

    def _begin(self, operation: _Operation, work: Coroutine[Any, Any, None]) -> None:
        process = operation.process
        self._open[operation] = None

        def start() -> None:
            operation.task = process.spawn(work)

        process.do(start)
        if self.active and self._rng.random() < GOES_AWAY_SHARE:
            away_s = self._rng.uniform(0.0, 1.0) * operation.timeout_s
            self.cluster.world.later(away_s, process.loop.enter, self._go_away, operation)

    def _go_away(self, operation: _Operation) -> None:
        if operation in self._open and operation.task is not None:
            self.counts["clients gone"] += 1
            operation.task.cancel()

    def _end(self, operation: _Operation) -> None:
        self._open.pop(operation, None)
        if operation.errand is not None:
            operation.errand.busy = False

    def _died(self, process: Process) -> None:
        for operation in [one for one in self._open if one.process is process]:
            self._end(operation)

    def _watch(self) -> None:
        now = self.cluster.world.now
        self.cluster.world.later(1.0, self._watch)
        for operation in self._open:
            if operation.overdue(now):
                self.cluster.world.violate(
                    f"stuck: a {operation.kind} on {operation.process.name} with a timeout of "
                    f"{operation.timeout_s} s began at {operation.started_at:.3f}"
                )
                return

    @property
    def idle(self) -> bool:
        return not self._open


def _command(errand: _Errand, step: str) -> Any:
    key = f"{errand.name}/{step}"
    if step == "submit":
        job_id = f"{errand.name}-{errand.tries}"
        return SubmitJob(
            key=key, request_sha256=key, job_id=job_id, run_id=f"run-{job_id}", spec=_SPEC
        )
    assert errand.job_id is not None
    if step == "cancel":
        return CancelJob(key=key, request_sha256=key, job_id=errand.job_id, reason="simulated")
    return RemoveJob(key=key, request_sha256=key, job_id=errand.job_id)
