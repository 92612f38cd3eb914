"""An agent that comes back goes on with the workers of the one before: forkserver, spawner and supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distroml import commands as c
from distroml.reports import WorkerPhase
from distroml.runtime import supervisor as module
from distroml.runtime.control import (
    Close,
    Hello,
    Join,
    Progress,
    Ready,
    Running,
    WorkerPlan,
    encode_frame,
)
from distroml.runtime.spawner import Spawner, SpawnEvents
from distroml.spec import JobSpec
from tests.builders import form, members, node, submit
from tests.consensus.live import until
from tests.runtime.agents import Agent, FakeWorker

RUNNING = Running(job_id="j", run_id="r", worker=1_000_001, pid=2**22 + 5, log_path="x")
"""With a process id that no process can have."""
STUB = """
import signal, socket, sys
from pathlib import Path
from distroml.runtime.worker import forkserver
def sleep(spawn, log, parent):
    import os, time
    os.setpgid(0, 0)
    forkserver._die_with(parent)
    signal.set_wakeup_fd(-1)
    time.sleep(600)
    os._exit(0)
forkserver.become_worker = sleep
forkserver.AGENT_GRACE_S = float(sys.argv[3])
forkserver.Forkserver(socket.socket(fileno=int(sys.argv[1])), forkserver._listen(Path(sys.argv[2]))).run()
"""
"""A forkserver without torch whose workers sleep."""


class StubSpawner(Spawner):
    """Starts ``STUB``; ``die`` is what happens to it when its agent is killed."""

    grace_s = 30.0

    async def _launch(self, channel: object) -> asyncio.subprocess.Process:
        fd = channel.fileno()  # type: ignore[attr-defined]
        arguments = ("-c", STUB, str(fd), str(self._listen), str(self.grace_s))
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, pass_fds=(fd,), start_new_session=True
        )

    async def die(self) -> None:
        assert self.task is not None
        assert self._writer is not None
        self._writer.transport.abort()
        self._writer = None
        self._process = self._pid = None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Ears:
    """What a spawner tells."""

    def __init__(self, directory: Path, grace_s: float = 30.0) -> None:
        self.told: list[tuple[object, ...]] = []
        events = SpawnEvents(
            ready=lambda: self.told.append(("ready",)),
            running=lambda told: self.told.append(("running", told.worker, told.pid)),
            spawned=lambda worker, pid: self.told.append(("spawned", worker[1], pid)),
            failed=lambda worker, why: self.told.append(("failed", worker[1], why)),
            exited=lambda pid, status: self.told.append(("exited", pid, status)),
            lost=lambda: self.told.append(("lost",)),
        )
        self.spawner = StubSpawner(directory / "log", events, directory / "forkserver.sock")
        self.spawner.grace_s = grace_s
        self.spawner.start()

    async def until(self, kind: str, count: int = 1) -> list[tuple[object, ...]]:
        def found() -> list[tuple[object, ...]]:
            return [one for one in self.told if one[0] == kind]

        await until(lambda: len(found()) >= count, f"{kind}; told: {self.told}", 60.0)
        return found()


def plan(directory: Path, worker: int) -> WorkerPlan:
    return WorkerPlan(
        job_id="job",
        run_id="run-job",
        worker=worker,
        node="a",
        host="127.0.0.1",
        spec=JobSpec(),
        store_dir="",
        control_path="",
        log_path=str(directory / f"worker-{worker}.log"),
    )


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return state(pid) != "Z"


def state(pid: int) -> str:
    """As ``ps`` has it, such as T for one that is stopped."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(") ")[2][0]


async def two_workers(directory: Path, grace_s: float = 30.0) -> tuple[Ears, list[int]]:
    first = Ears(directory, grace_s)
    await first.until("ready")
    for worker in (1_000_001, 1_000_002):
        first.spawner.spawn(plan(directory, worker))
    pids = [int(str(one[2])) for one in await first.until("spawned", 2)]
    return first, pids


async def test_the_next_agent_is_told_of_workers_and_of_those_that_ended(tmp_path: Path) -> None:
    first, pids = await two_workers(tmp_path)
    await first.spawner.die()
    os.kill(pids[0], signal.SIGKILL)
    await until(lambda: not lives(pids[0]), "one worker to be gone")
    second = Ears(tmp_path)
    await asyncio.wait_for(second.spawner.adopted(), 60.0)
    told = [one for one in second.told if one[0] != "exited"]
    assert sorted(told) == [
        ("ready",),
        ("running", 1_000_001, pids[0]),
        ("running", 1_000_002, pids[1]),
    ]
    assert told[-1] == ("ready",)
    assert await second.until("exited") == [("exited", pids[0], -9)]
    second.spawner.spawn(plan(tmp_path, 2_000_001))
    await second.until("spawned")
    os.kill(pids[1], signal.SIGKILL)
    await second.until("exited", 2)
    forkserver = second.spawner.pid
    await second.spawner.stop()
    assert forkserver is not None
    await until(lambda: not lives(forkserver), "the forkserver to end with its agent")


async def test_the_next_agent_is_served_although_the_end_of_the_one_before_was_not_read_yet(
    tmp_path: Path,
) -> None:
    first, pids = await two_workers(tmp_path)
    forkserver = first.spawner.pid
    assert forkserver is not None
    os.kill(forkserver, signal.SIGSTOP)  # it is busy: all that follows, it will find at once
    await until(lambda: state(forkserver) == "T", "the forkserver to be stopped")
    assert first.spawner._writer is not None
    first.spawner._writer.write(encode_frame(Close())[:2])  # it dies in the middle of a message
    await first.spawner.die()
    second = Ears(tmp_path)
    await until(lambda: second.spawner._writer is not None, "the next agent to have connected")
    os.kill(forkserver, signal.SIGCONT)
    await second.until("ready")
    assert second.spawner.pid == forkserver
    told = await second.until("running", 2)
    assert [one[2] for one in told[:2]] == pids
    assert ("lost",) not in second.told
    await second.spawner.stop()


async def test_an_agent_that_is_turned_away_asks_again(tmp_path: Path) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections > 2:
            writer.write(encode_frame(RUNNING) + encode_frame(Ready(pid=RUNNING.pid)))
            await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "forkserver.sock"):
        agent = Ears(tmp_path)
        await agent.until("ready")
        assert agent.told == [("running", RUNNING.worker, RUNNING.pid), ("ready",)]
        await agent.spawner.stop()


async def test_without_a_next_agent_nothing_is_left_after_the_grace(tmp_path: Path) -> None:
    first, pids = await two_workers(tmp_path, grace_s=0.2)
    await first.spawner.die()
    await until(lambda: not any(lives(pid) for pid in pids), "the workers to be killed", 60.0)


async def test_an_agent_that_stops_in_good_order_leaves_nothing(tmp_path: Path) -> None:
    first, pids = await two_workers(tmp_path)
    await first.spawner.stop()
    await until(lambda: not any(lives(pid) for pid in pids), "the workers to be killed", 60.0)


# --- the supervisor ---


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """The second incarnation of node ``a``."""
    agent = Agent(tmp_path, incarnation=2)
    await agent.supervisor.start(warm=True)
    back(agent)
    yield agent
    await agent.close()


def back(agent: Agent) -> None:
    """The node's second incarnation is in the log; its workers are of the first."""
    agent.log.ok(submit("job", workers=2))
    agent.log.ok(form("job", 1, members("a", "b")))
    agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
    agent.log.incarnation, agent.log.sequence = 2, 0
    agent.log.ok(node("a", incarnation=2, workers_since=1))


def running(agent: Agent, worker: int = 1_000_001) -> int:
    pid = agent.process()
    told = Running(
        job_id="job",
        run_id="run-job",
        worker=worker,
        pid=pid,
        log_path=str(agent.data_dir / f"worker-{worker}.log"),
    )
    agent.spawner.events.running(told)
    return pid


async def test_a_worker_that_says_where_it_stands_keeps_its_rank(agent: Agent) -> None:
    pid = running(agent)
    agent.converge()
    assert agent.spawner.plans == [], "nothing is spawned in its place"
    assert agent.supervisor.workers_since == 1
    worker = FakeWorker(("run-job", 1_000_001), pid)
    agent.workers.append(worker)
    worker.hello = Hello(run_id="run-job", worker=1_000_001, pid=pid, generation=1, rank=0, step=7)
    await worker.connect(agent.socket)
    fact = await agent.until_fact(lambda f: f.step == 7, "it to be known")
    assert (fact.job_id, fact.generation, fact.pid) == ("job", 1, pid)
    worker.say(Progress(generation=1, phase=WorkerPhase.TRAINING, step=8, epoch=0, total_steps=100))
    await agent.until_fact(lambda f: f.phase == "TRAINING", "it to go on")
    assert agent.spawner.plans == []
    assert not agent.killed(pid)
    assert not [message for message in worker.got if isinstance(message, Join)]


async def test_a_worker_that_does_not_come_back_is_killed(agent: Agent) -> None:
    pid = running(agent)
    agent.now_s += module.ADOPT_TIMEOUT_S
    agent.supervisor.tend()
    await until(lambda: agent.killed(pid), "it to be killed")
    agent.spawner.events.exited(pid, -9)
    agent.converge()
    assert agent.spawner.plans == [], "the next generation decides"
    assert agent.supervisor.facts() == ()
