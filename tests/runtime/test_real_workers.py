"""The supervisor with the real forkserver, and the real barriers of one node: real processes, real kills."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distroml import commands as c
from distroml.consensus.frames import Channel
from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime.assignment import SupervisorSettings
from distroml.runtime.barrier import Barrier, RunGeneration
from distroml.runtime.barrier_wire import BarrierWire
from distroml.runtime.supervisor import Supervisor
from distroml.runtime.worker_output import HistorySink
from distroml.spec import Checkpointing
from tests.builders import Log, fail, form, members, node, submit
from tests.consensus.live import until

START_S = 60.0


class Leads:
    """The only node leads."""

    leader = "a"


class Nowhere:
    """It has no links."""

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        raise AssertionError(f"nothing is to be sent to {peer}")


class RealAgent:
    """A supervisor that forks workers of one job on node ``a``."""

    def __init__(self, directory: Path) -> None:
        self.log = Log()
        self.log.ok(node("a"))
        self.lines: list[str] = []
        self.wire = BarrierWire(
            node="a",
            links=Nowhere(),
            raft=Leads(),
            state=lambda: self.log.state,
            told=lambda *news: self.supervisor.tell_ranks(*news),
            monotonic=time.monotonic,
        )
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
            current=lambda: True,
            changed=lambda: None,
            arrived=self.wire.arrive,
        )

    def assign(self, job_id: str, *ranks: str, generation: int = 1, **spec: object) -> None:
        if job_id not in self.log.state.jobs:
            quiet = Checkpointing(enabled=False)
            self.log.ok(submit(job_id, workers=len(ranks), checkpointing=quiet, **spec))
        self.log.ok(form(job_id, generation, members(*ranks)))
        self.wire.on_applied()
        self.supervisor.converge(self.log.state)

    def fact(self, rank: int = 0) -> WorkerFact | None:
        return next((f for f in self.supervisor.facts() if f.rank == rank), None)

    def known(self, rank: int) -> WorkerFact:
        fact = self.fact(rank)
        assert fact is not None
        return fact

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
async def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[RealAgent]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "worker"), prepend=os.pathsep)
    monkeypatch.setenv("MEETING_PLACE", str(tmp_path))
    # not tmp_path: a Unix socket's path is limited to about 100 bytes
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        agent = RealAgent(Path(directory))
        await agent.supervisor.start(warm=True)
        try:
            await agent.until_ready()
            yield agent
        finally:
            agent.wire.close()
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


class TestMeeting:
    """Adapters of four ranks that meet before they train; see ``stub_adapters.Meets``."""

    ADAPTER = {"entrypoint": "stub_adapters:Meets", "steps": 3}

    async def until_missing(self, agent: RealAgent, generation: int, *ranks: int) -> None:
        barrier = Barrier(RunGeneration("meet", "run-meet", generation), "data#1")
        await until(
            lambda: agent.wire.missing() == {barrier: ranks},
            f"ranks {ranks} of generation {generation} to be missing ({agent.lines[-5:]})",
            START_S,
        )

    async def test_all_wait_for_the_one_that_is_late(
        self, agent: RealAgent, tmp_path: Path
    ) -> None:
        agent.assign("meet", "a", "a", "a", "a", **self.ADAPTER)
        await self.until_missing(agent, 1, 0)
        for rank in (1, 2, 3):
            await until(
                lambda rank=rank: agent.known(rank).waiting_s > 0, f"rank {rank} to be seen waiting"
            )
        assert agent.known(0).waiting_s == 0.0, "that one is busy"
        (tmp_path / "go").touch()
        for rank in range(4):
            assert (await agent.until_phase(WorkerPhase.FINISHED, rank)).step == 3
        await until(lambda: agent.lines.count("agreed on 30") == 4, "all to say so")

    async def test_those_at_a_barrier_of_a_broken_generation_stay_for_the_next(
        self, agent: RealAgent, tmp_path: Path
    ) -> None:
        agent.assign("meet", "a", "a", "a", "a", **self.ADAPTER)
        await self.until_missing(agent, 1, 0)
        pids = [agent.known(rank).pid for rank in range(4)]
        assert pids[0] is not None
        os.kill(pids[0], signal.SIGKILL)
        await until(lambda: agent.known(0).exit_code == -signal.SIGKILL, "its end to be known")
        agent.log.ok(fail("meet", 1, collateral=(1, 2, 3)))
        agent.supervisor.converge(agent.log.state)
        for rank in (1, 2, 3):
            fact = await agent.until_phase(WorkerPhase.PARKED, rank)
            assert fact.failure is None
            assert not fact.has_state, "they met before they settled on one"
            assert "generation 1" in fact.parked_reason
        agent.assign("meet", "a", "a", "a", "a", generation=2)
        await self.until_missing(agent, 2, 0)
        (tmp_path / "go").touch()
        for rank in range(4):
            await agent.until_phase(WorkerPhase.FINISHED, rank)
        assert [agent.known(rank).pid for rank in (1, 2, 3)] == pids[1:]
        assert agent.lines.count("rank 1 sets up") == 2
        await until(lambda: agent.lines.count("agreed on 30") == 4, "all to say so")

    async def test_who_gives_up_names_who_is_missing(
        self, agent: RealAgent, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MEETING_TIMEOUT_S", "2.5")
        os.kill(
            agent.supervisor.forkserver_pid or 0, signal.SIGKILL
        )  # the next one has that variable
        await until(lambda: not agent.supervisor.ready, "it to be missed")
        await agent.until_ready()
        agent.assign("meet", "a", "a", "a", "a", **self.ADAPTER)
        fact = await agent.until_phase(WorkerPhase.FAILED, 1)
        assert fact.failure is not None
        assert (
            "BarrierTimeout: not all ranks came to barrier 'data#1' in 2.5 s" in fact.failure.error
        )
        assert "rank 0 had not come" in fact.failure.error
