"""A node in memory for HTTP tests: the real replica and state machine, without Raft, peers or workers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
from msgspec.structs import replace

from distroml.commands import (
    MAX_ENTRY_BYTES,
    AnyCommand,
    Entry,
    FormGeneration,
    MarkRunning,
    Outcome,
    RegisterNode,
    SubmitJob,
    encode_entry,
)
from distroml.consensus.replica import Replica
from distroml.consensus.state import ClusterState, digest_state
from distroml.errors import InvalidSpec, NotFound, Unavailable
from distroml.http.app import HttpServer
from distroml.http.job_events import JobEvents
from distroml.http.limits import HttpSettings
from distroml.http.services import Counter, HistoryBatch, LogLine, MetricNames, MetricPoint, Series
from distroml.http.tally import Tally
from distroml.model import Generation, Job, Member
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.spec import JobSpec

WAIT_S = 20.0
"""Bound of every wait in these tests."""


class Observed(msgspec.Struct, frozen=True):
    report: NodeReport
    age_s: float = 0.1
    connected: bool = True


class Raft(msgspec.Struct, frozen=True, kw_only=True):
    role: str = "leader"
    term: int = 3
    leader: str | None = "a"
    voters: tuple[str, ...] = ("a", "b")
    commit_index: int = 0
    applied_index: int = 0
    healthy: bool = True
    reason: str = ""


class MemoryHistory:
    """Records of jobs in lists; a position is how many were read."""

    def __init__(self) -> None:
        self.records: dict[str, list[MetricPoint | LogLine]] = {}
        self.wakes: dict[str, set[asyncio.Event]] = {}

    def add(self, job_id: str, *records: MetricPoint | LogLine) -> None:
        self.records.setdefault(job_id, []).extend(records)
        for wake in self.wakes.get(job_id, ()):
            wake.set()

    def _points(self, job_id: str) -> list[MetricPoint]:
        return [r for r in self.records.get(job_id, []) if isinstance(r, MetricPoint)]

    async def metric_names(self, job_id: str) -> MetricNames:
        names = sorted({name for point in self._points(job_id) for name in point.values})
        return MetricNames(names=tuple(names), complete=True)

    async def metric_series(
        self, job_id: str, name: str, from_step: int, to_step: int | None, max_points: int
    ) -> Series:
        points = [
            (p.step, p.values[name])
            for p in self._points(job_id)
            if name in p.values and from_step <= p.step and (to_step is None or p.step <= to_step)
        ]
        kept = points[:: max(1, -(-len(points) // max_points))]
        return Series(
            steps=tuple(s for s, _ in kept), values=tuple(v for _, v in kept), total=len(points)
        )

    def latest_metrics(self, job_id: str) -> Mapping[str, float]:
        return {name: v for point in self._points(job_id) for name, v in point.values.items()}

    async def log_lines(self, job_id: str, rank: int | None, tail: int) -> Sequence[LogLine]:
        lines = [
            r
            for r in self.records.get(job_id, [])
            if isinstance(r, LogLine) and rank in (None, r.rank)
        ]
        return lines[len(lines) - min(tail, len(lines)) :]

    def end_position(self, job_id: str) -> str:
        return str(len(self.records.get(job_id, [])))

    async def read_after(self, job_id: str, position: str | None, limit: int) -> HistoryBatch:
        start = int(position or 0)
        known = self.records.get(job_id, [])
        some = known[start : start + limit]
        end = start + len(some)
        return HistoryBatch(
            records=tuple((r, str(start + n + 1)) for n, r in enumerate(some)),
            position=str(end),
            more=end < len(known),
        )

    @contextlib.contextmanager
    def watch(self, job_id: str, wake: asyncio.Event) -> Iterator[None]:
        self.wakes.setdefault(job_id, set()).add(wake)
        try:
            yield
        finally:
            self.wakes[job_id].discard(wake)


class MemoryNode:
    """Implements ``Services``. ``fault`` is raised by the next ``propose`` instead of applying."""

    version = "0.0-test"

    def __init__(
        self,
        settings: HttpSettings | None = None,
        *,
        name: str = "a",
        history: MemoryHistory | None = None,
    ) -> None:
        self.name = name
        self.settings = settings or HttpSettings()
        self.replica = Replica()
        self.history = history or MemoryHistory()
        self.events = JobEvents(self.replica.recent_events)
        self.replica.listen(self.events.applied)
        self.knows_all = True
        self.tally = Tally(self.state, self.caught_up)
        self.replica.listen(self.tally.applied)
        self.files: Any = None
        """What a test gives it that looks at files of checkpoints."""
        self.raft_view = Raft(leader=name)
        self.reports: dict[str, Observed] = {}
        self.barriers = 0
        self.behind: Callable[[], object] = lambda: None
        """Applies what others have committed and this node has not heard of."""
        self.readiness = (True, "")
        self.fault: BaseException | None = None
        self.hold: asyncio.Event | None = None
        self.proposed: list[AnyCommand] = []
        self._sequence = 0

    def state(self) -> ClusterState:
        return self.replica.state

    async def state_digest(self) -> tuple[int, str]:
        return self.state().index, digest_state(self.state())

    def raft(self) -> Raft:
        index = self.state().index
        return replace(self.raft_view, commit_index=index, applied_index=index)

    def observed(self) -> Mapping[str, Observed]:
        return self.reports

    async def read_barrier(self, timeout_s: float) -> None:
        self.barriers += 1
        if self.raft_view.leader is None:
            raise Unavailable("no leader confirmed the read")
        self.behind()

    async def transfer_leadership(self, target: str | None, timeout_s: float) -> str:
        if target not in (None, "a", "b"):
            raise NotFound(f"There is no node '{target}'.", field="node")
        self.raft_view = replace(self.raft_view, leader=target or "b")
        return target or "b"

    def caught_up(self) -> bool:
        return self.knows_all

    def ready(self) -> tuple[bool, str]:
        return self.readiness

    def health(self) -> Mapping[str, Any]:
        return {"uptime_s": 1.5}

    def counters(self) -> Iterable[Counter]:
        yield Counter(name="peer_frames_sent_total", value=7, labels={"peer": "b"}, help="Frames.")
        yield Counter(name="peer_queue_bytes", value=12, labels={"peer": "b"})

    async def propose(self, command: AnyCommand, timeout_s: float) -> Outcome:
        if self.hold is not None:
            await self.hold.wait()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        if len(encode_entry(Entry(self.name, 1, 1, 1, 0.0, command))) > MAX_ENTRY_BYTES:
            raise InvalidSpec("too large for the log")  # as consensus.proposer does
        return self.apply(command)

    def apply(self, command: AnyCommand) -> Outcome:
        """What the log would do."""
        self.proposed.append(command)
        self._sequence += 1
        seen: list[Outcome] = []
        entry = Entry(self.name, 1, self._sequence, self._sequence, time.time(), command)
        listener = lambda e, outcome, events: seen.append(outcome)  # noqa: E731
        self.replica.listen(listener)
        self.replica.apply(self.state().index + 1, encode_entry(entry))
        self.replica._listeners.remove(listener)
        return seen[0]

    # --- putting it in a state -------------------------------------------------------------------

    def job(self, job_id: str) -> Job:
        return self.state().jobs[job_id]

    def register(self, name: str = "a", slots: int = 4) -> None:
        self.apply(RegisterNode(name=name, incarnation=1, http=f"http://{name}:1", slots=slots))

    def submit(self, job_id: str = "job-1", **spec: Any) -> str:
        spec.setdefault("name", "demo")
        outcome = self.apply(
            SubmitJob(job_id=job_id, run_id=f"run-{job_id}", spec=msgspec.convert(spec, JobSpec))
        )
        assert not outcome.error, outcome
        return job_id

    def form(self, job_id: str, workers: int = 2, node: str = "a", **more: Any) -> None:
        """The next generation, with its workers reported as training; from the newest checkpoint, unless ``more`` says otherwise."""
        job = self.job(job_id)
        number, newest = job.generation_number + 1, job.newest_checkpoint()
        if newest is not None:
            more = {"checkpoint_step": newest.step, "resume_step": newest.step} | more
        members = tuple(Member(rank, rank, node, 1) for rank in range(workers))
        generation = Generation(
            number=number, members=members, formed_at=time.time(), reason="placed", **more
        )
        outcome = self.apply(FormGeneration(job_id=job_id, generation=generation))
        assert not outcome.error, outcome
        self.report(job_id, node, step=generation.resume_step)

    def run(self, job_id: str, workers: int = 2, total_steps: int = 100) -> None:
        self.form(job_id, workers)
        number = self.job(job_id).generation_number
        self.apply(MarkRunning(job_id=job_id, generation=number, total_steps=total_steps))

    def report(self, job_id: str, node: str = "a", step: int = 0, epoch: int = 0) -> None:
        job = self.job(job_id)
        assert job.generation is not None
        workers = tuple(
            WorkerFact(
                job_id=job_id,
                run_id=job.run_id,
                generation=job.generation.number,
                rank=member.rank,
                phase=WorkerPhase.TRAINING,
                pid=1000 + member.rank,
                step=step,
                epoch=epoch,
            )
            for member in job.generation.members
        )
        self.reports[node] = Observed(
            NodeReport(
                node=node, incarnation=1, sequence=1, at=time.time(), slots=4, workers=workers
            )
        )


async def until(condition: Callable[[], object], what: str) -> None:
    """Let others run until ``condition`` holds."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - conditions of many kinds, none with an Event
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S} s in vain until {what}") from None


def metric(step: int, /, rank: int = 0, generation: int = 1, **values: float) -> MetricPoint:
    return MetricPoint(
        step=step, epoch=0, generation=generation, rank=rank, at=1.0, values=values or {"loss": 1.0}
    )


def log_line(line: str, rank: int = 0) -> LogLine:
    return LogLine(generation=1, rank=rank, at=1.0, line=line)


class Reply(msgspec.Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Api:
    """A client of one served node."""

    def __init__(
        self, node: MemoryNode, server: HttpServer, base: str, http: aiohttp.ClientSession
    ):
        self.node = node
        self.server = server
        self.base = base
        self.http = http

    async def call(self, method: str, path: str, **options: Any) -> Reply:
        async with asyncio.timeout(WAIT_S):
            async with self.http.request(method, self.base + path, **options) as response:
                return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.call("GET", path, **options)


@contextlib.asynccontextmanager
async def served(node: MemoryNode) -> AsyncIterator[Api]:
    server = HttpServer(node)
    host, port = await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(auto_decompress=True) as http:
            yield Api(node, server, f"http://{host}:{port}", http)
    finally:
        await server.stop()
