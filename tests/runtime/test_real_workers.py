"""The supervisor with the real forkserver: real processes, real kills."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distroml import commands as c
from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime.assignment import SupervisorSettings
from distroml.runtime.supervisor import Supervisor
from distroml.runtime.worker_output import HistorySink
from distroml.spec import Checkpointing
from tests.builders import Log, fail, form, members, node, submit
from tests.consensus.live import until

START_S = 60.0


class RealAgent:
    """A supervisor that forks workers of one job on node ``a``."""

    def __init__(self, directory: Path) -> None:
        self.log = Log()
        self.log.ok(node("a"))
        self.lines: list[str] = []
        self.supervisor = Supervisor(
            SupervisorSettings(
                node="a",
                incarnation=1,
                host="127.0.0.1",
                data_dir=directory,
                store_dir=directory / "store",
            ),
            sink=HistorySink(
                metrics=lambda *_: None, logs=lambda _, lines: self.lines.extend(lines)
            ),
            changed=lambda: None,
            arrived=lambda *_: None,
        )

    def assign(self, job_id: str, *ranks: str, generation: int = 1, **spec: object) -> None:
        if job_id not in self.log.state.jobs:
            quiet = Checkpointing(enabled=False)
            self.log.ok(submit(job_id, workers=len(ranks), checkpointing=quiet, **spec))
        self.log.ok(form(job_id, generation, members(*ranks)))
        self.supervisor.converge(self.log.state)

    def fact(self, rank: int = 0) -> WorkerFact | None:
        return next((f for f in self.supervisor.facts() if f.rank == rank), None)

    async def until_phase(self, phase: WorkerPhase, rank: int = 0) -> WorkerFact:
        await until(
            lambda: (fact := self.fact(rank)) is not None and fact.phase is phase,
            f"rank {rank} to be {phase} ({self.lines[-5:]})",
            START_S,
        )
        fact = self.fact(rank)
        assert fact is not None
        return fact

    async def until_ready(self) -> None:
        await until(lambda: self.supervisor.ready, "the forkserver to be warm", START_S)


@pytest.fixture
async def agent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RealAgent]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # not tmp_path: a Unix socket's path is limited to about 100 bytes
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        agent = RealAgent(Path(directory))
        await agent.supervisor.start(warm=True)
        try:
            await agent.until_ready()
            yield agent
        finally:
            await agent.supervisor.stop()


def _gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"


async def test_workers_and_then_the_forkserver_are_killed_and_the_next_one_finishes_the_job(
    agent: RealAgent,
) -> None:
    await _kill_between_fork_and_first_word(agent)
    agent.assign("long", "a", "a", steps=1_000_000)
    pids = [(await agent.until_phase(WorkerPhase.TRAINING, rank)).pid for rank in (0, 1)]
    assert agent.supervisor.forkserver_pid is not None
    os.kill(agent.supervisor.forkserver_pid, signal.SIGKILL)
    for rank in (0, 1):
        fact = await agent.until_phase(WorkerPhase.FAILED, rank)
        assert fact.exit_code == -signal.SIGKILL
        assert fact.failure is not None
    await until(lambda: all(pid and _gone(pid) for pid in pids), "its workers to be gone")
    agent.log.ok(fail("long", 1))
    agent.log.ok(c.CancelJob(job_id="long", reason="r"))
    agent.supervisor.converge(agent.log.state)
    assert agent.supervisor.facts() == ()

    await agent.until_ready()
    agent.assign("short", "a", steps=3)
    fact = await agent.until_phase(WorkerPhase.FINISHED)
    assert fact.outcome is not None
    assert fact.outcome.step == 3
    await until(lambda: (f := agent.fact()) is not None and f.exit_code == 0, "it to exit")
    assert any("worker trained to its last step" in line for line in agent.lines)


async def _kill_between_fork_and_first_word(agent: RealAgent) -> None:
    agent.assign("early", "a", steps=3)
    await until(lambda: (f := agent.fact()) is not None and f.pid is not None, "a pid")
    fact = agent.fact()
    assert fact is not None
    assert fact.pid is not None
    os.killpg(fact.pid, signal.SIGKILL)
    await until(
        lambda: (f := agent.fact()) is not None and f.exit_code == -signal.SIGKILL,
        "the exit to be told",
    )
    agent.log.ok(c.CancelJob(job_id="early", reason="r"))
    agent.supervisor.converge(agent.log.state)
