"""An agent's workers are what the log assigns, and every end of one is told with its reason."""

from __future__ import annotations

import asyncio
import signal
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from distroml import commands as c
from distroml.model import FailureKind
from distroml.reports import (
    DataCursor,
    NodeReport,
    ShardFact,
    WorkerFact,
    WorkerFailure,
    WorkerOutcome,
    WorkerPhase,
)
from distroml.runtime import endings, worker_server
from distroml.runtime.barrier import Barrier, RunGeneration
from distroml.runtime.control import (
    Arrive,
    Awaited,
    CheckpointHere,
    Committed,
    Failed,
    Finished,
    MetricRecord,
    NeedCheckpoint,
    Progress,
    Released,
    Rendezvous,
    RendezvousKeys,
    Save,
    ShardAbandoned,
    ShardDurable,
    Stop,
    encode_frame,
)
from distroml.runtime.local_worker import MAX_ABANDONED, MAX_RENDEZVOUS_BYTES, MAX_SHARDS
from distroml.runtime.log_tail import log_path
from distroml.runtime.replicas.for_workers import ForWorkers
from distroml.spec import Checkpointing
from tests.builders import checkpoint, form, members, node, submit
from tests.consensus.live import until
from tests.runtime.agents import Agent


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(tmp_path)
    await agent.supervisor.start(warm=True)
    yield agent
    await agent.close()


def outcome(**fields: object) -> WorkerOutcome:
    values: dict[str, object] = {
        "step": 9,
        "epoch": 1,
        "state_digest": "d" * 64,
        "sample_digest": "e" * 64,
        "metrics": {"loss": 1.0},
        "stopped": False,
        "checkpoint_step": None,
    }
    return WorkerOutcome(**(values | fields))  # type: ignore[arg-type]


def failed(error: str = "ValueError: boom") -> Failed:
    failure = WorkerFailure(kind=FailureKind.ERROR, error=error, traceback="t", at=1.0)
    return Failed(failure=failure, step=3)


def shard(step: int) -> ShardDurable:
    fact = ShardFact(
        step=step,
        cursor=DataCursor(0, step),
        rank=0,
        file="f",
        size_bytes=1,
        sha256="0" * 64,
    )
    return ShardDurable(generation=1, shard=fact)


class FakeCopies(ForWorkers):
    """What keeps copies, in the hands of the test."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.waiting: list[Callable[[str], None]] = []
        self.needs: list[NeedCheckpoint] = []
        self.answers: list[Callable[[CheckpointHere], None]] = []

    def must_secure(self, job_id: str) -> bool:
        return True

    def secure(
        self, job_id: str, run_id: str, shard: ShardFact, then: Callable[[str], None]
    ) -> None:
        self.waiting.append(then)

    def supply(self, need: NeedCheckpoint, answer: Callable[[CheckpointHere], None]) -> None:
        self.needs.append(need)
        self.answers.append(answer)

    def settle(self, problem: str) -> None:
        """The oldest shard is on other nodes, or given up."""
        self.waiting.pop(0)(problem)


def training(step: int, *metrics: MetricRecord, generation: int = 1) -> Progress:
    return Progress(
        generation=generation,
        phase=WorkerPhase.TRAINING,
        step=step,
        epoch=0,
        total_steps=100,
        metrics=metrics,
    )


class TestAssignment:
    async def test_each_local_rank_is_spawned_once_with_its_plan(self, agent: Agent) -> None:
        agent.assign("a", "b", "a")
        agent.converge()
        joins = [plan.join for plan in agent.spawner.plans]
        assert [(j.rank, j.local_rank, j.world_size) for j in joins if j] == [(0, 0, 3), (2, 1, 3)]
        assert len({plan.worker for plan in agent.spawner.plans}) == 2
        assert agent.fact(0).phase is WorkerPhase.SPAWNING
        assert agent.find(1) is None

    async def test_a_life_with_the_same_number_is_not_this_one(self, agent: Agent) -> None:
        """Its directory was lost, so it counts from 1 again, and applies what the log says of its former life."""
        agent.registered = False
        agent.assign("a")
        assert agent.spawner.plans == []
        agent.registered = True
        agent.converge()
        assert len(agent.spawner.plans) == 1

    async def test_ranks_of_an_earlier_life_of_this_node_are_not_ours(self, agent: Agent) -> None:
        agent.log.incarnation, agent.log.sequence = 2, 0
        agent.log.ok(node("a", incarnation=2))
        with pytest.raises(AssertionError, match="stale-node"):
            agent.assign("a")
        agent.log.ok(form("job", 1, members("a", incarnation=2)))
        agent.converge()
        assert agent.spawner.plans == []

    async def test_nothing_is_spawned_before_the_forkserver_is_ready(self, agent: Agent) -> None:
        agent.spawner.ready = False
        agent.assign("a")
        assert agent.spawner.plans == []
        agent.spawner.ready = True
        agent.spawner.events.ready()
        assert len(agent.spawner.plans) == 1

    async def test_a_worker_that_is_not_wanted_any_more_is_killed_and_forgotten(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        pid = agent.spawned()
        agent.log.ok(c.CancelJob(job_id="job", reason="r"))
        agent.converge()
        await until(lambda: agent.killed(pid), "the worker to be killed")
        assert agent.fact().exit_code is None  # until the forkserver reaped it
        agent.spawner.events.exited(pid, -9)
        assert agent.supervisor.facts() == ()

    async def test_a_spawn_under_way_when_its_job_ends_is_killed_when_it_is_there(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        agent.log.ok(c.CancelJob(job_id="job", reason="r"))
        agent.converge()
        assert agent.fact().phase is WorkerPhase.SPAWNING
        pid = agent.spawned()
        await until(lambda: agent.killed(pid), "the worker to be killed")
        agent.spawner.events.exited(pid, -9)
        assert agent.supervisor.facts() == ()

    async def test_a_process_that_nobody_knows_is_killed(self, agent: Agent) -> None:
        pid = agent.spawned(7)
        await until(lambda: agent.killed(pid), "the stranger to be killed")

    async def test_an_exit_of_a_former_process_with_the_same_pid_ends_nobody(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        agent.spawner.events.exited(12345, -9)
        assert agent.fact().phase is WorkerPhase.SPAWNING


class TestEnds:
    async def test_a_killed_worker_is_told_at_once_with_its_last_lines(self, agent: Agent) -> None:
        agent.assign("a")
        pid = agent.spawned()
        agent.write_log("one\ntwo")
        agent.spawner.events.exited(pid, -signal.SIGKILL)
        fact = agent.fact()
        assert (fact.phase, fact.exit_code) == (WorkerPhase.EXITED, -9)
        assert fact.last_lines == ("one", "two")
        assert agent.lines == ["one", "two"]

    async def test_last_words_count_although_the_exit_was_heard_first(self, agent: Agent) -> None:
        """The forkserver's wire and the worker's are not ordered with each other."""
        agent.assign("a")
        worker = await agent.running()
        agent.spawner.events.exited(worker.pid, 0)
        assert agent.fact().exit_code is None, "told as a failure before its last frames were read"
        worker.say(training(9, MetricRecord(9, 0, 1.0, {"loss": 0.5})))
        worker.say(Finished(generation=1, outcome=outcome()))
        await worker.hang_up()
        fact = await agent.until_fact(lambda f: f.ended_at, "the end to be settled")
        assert (fact.phase, fact.exit_code) == (WorkerPhase.FINISHED, 0)
        assert fact.outcome == outcome()
        assert [record.step for record in agent.metrics] == [9]

    async def test_even_its_hello_may_come_after_its_exit(self, agent: Agent) -> None:
        agent.assign("a")
        pid = agent.spawned()
        agent.spawner.events.exited(pid, 1)
        worker = await agent.connect(pid=pid)
        worker.say(failed("ModuleNotFoundError: no such thing"))
        await worker.hang_up()
        fact = await agent.until_fact(lambda f: f.ended_at, "the end to be settled")
        assert fact.failure is not None
        assert "ModuleNotFoundError" in fact.failure.error
        assert fact.exit_code == 1

    async def test_nobody_waits_for_ever_for_last_words(self, agent: Agent) -> None:
        agent.assign("a", "a")
        silent = agent.spawned(0)
        holding = await agent.running(1)
        agent.spawner.events.exited(silent, 1)
        agent.spawner.events.exited(holding.pid, 1)
        agent.now_s += endings.LATE_HELLO_S
        agent.supervisor.tend()
        assert agent.fact(0).phase is WorkerPhase.EXITED
        assert agent.fact(1).exit_code is None
        agent.now_s += endings.LAST_FRAMES_S
        agent.supervisor.tend()
        assert agent.fact(1).exit_code == 1

    async def test_a_frame_after_the_end_changes_nothing(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.spawner.events.exited(worker.pid, 1)
        agent.now_s += endings.LAST_FRAMES_S
        agent.supervisor.tend()
        before = agent.fact()
        worker.say(failed())
        await worker.hang_up()
        await until(lambda: worker.closed, "the agent to hang up")
        assert agent.fact() == before

    async def test_a_worker_that_tells_of_its_error_is_failed_before_it_exits(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.write_log("Traceback ...\n")
        worker.say(failed())
        fact = await agent.until_fact(lambda f: f.failure, "the failure")
        assert (fact.phase, fact.step, fact.exit_code) == (WorkerPhase.FAILED, 3, None)
        assert fact.last_lines == ("Traceback ...",)
        agent.spawner.events.exited(worker.pid, 1)
        await worker.hang_up()
        fact = await agent.until_fact(lambda f: f.ended_at, "the end")
        assert (fact.phase, fact.exit_code) == (WorkerPhase.FAILED, 1)

    async def test_frames_that_cannot_be_read_end_the_worker_with_a_reason(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        worker = await agent.running()
        worker.write(struct.pack(">I", 5) + b"wrong")
        fact = await agent.until_fact(lambda f: f.failure, "the failure")
        assert fact.failure is not None
        assert "control connection was closed" in fact.failure.error
        await until(lambda: agent.killed(worker.pid), "the worker to be killed")
        agent.spawner.events.exited(worker.pid, -9)
        fact = agent.fact()
        assert (fact.phase, fact.exit_code) == (WorkerPhase.FAILED, -9)

    async def test_who_does_not_say_hello_first_or_in_time_is_hung_up_on(
        self, agent: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        agent.assign("a")
        reader, writer = await asyncio.open_unix_connection(str(agent.socket))
        writer.write(encode_frame(failed()))
        assert await reader.read() == b""
        assert "expected Hello, got Failed" in caplog.text
        writer.close()
        monkeypatch.setattr(worker_server, "HELLO_TIMEOUT_S", 0.01)
        reader, writer = await asyncio.open_unix_connection(str(agent.socket))
        assert await reader.read() == b""
        assert "no Hello came" in caplog.text
        writer.close()
        worker = await agent.running()
        assert agent.linked(), "others are not concerned"
        assert not worker.closed

    async def test_a_worker_without_its_connection_does_not_run_on(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        worker.say(training(5))
        await agent.until_fact(lambda f: f.step == 5, "progress")
        await worker.hang_up()
        await until(lambda: not agent.linked(), "the agent to notice")
        agent.supervisor.tend()
        assert not agent.killed(worker.pid)  # it is most likely just ending
        agent.now_s += endings.LINK_LOST_S
        agent.supervisor.tend()
        await until(lambda: agent.killed(worker.pid), "the worker to be killed")
        failure = agent.fact().failure
        assert failure is not None
        assert "went on running" in failure.error

    async def test_a_spawn_that_fails_is_told(self, agent: Agent) -> None:
        agent.assign("a")
        agent.spawner.events.failed(agent.worker_of(), "fork: out of memory")
        fact = agent.fact()
        assert fact.failure is not None
        assert "could not be started: fork: out of memory" in fact.failure.error
        assert (fact.phase, fact.exit_code) == (WorkerPhase.FAILED, 1)

    async def test_a_disk_without_room_for_one_worker_leaves_the_others(
        self, agent: Agent, tmp_path: Path
    ) -> None:
        (tmp_path / "workers" / "run-bad").write_text("in the way")
        agent.assign("a", job_id="bad")
        agent.assign("a", job_id="job")
        facts = {fact.job_id: fact for fact in agent.supervisor.facts()}
        assert facts["bad"].failure is not None
        assert "could not be started" in facts["bad"].failure.error
        assert facts["job"].phase is WorkerPhase.SPAWNING

    async def test_a_forkserver_that_dies_takes_its_workers_and_says_so(self, agent: Agent) -> None:
        agent.assign("a", "a")
        pid = agent.spawned(0)
        agent.spawner.die()
        for fact in agent.supervisor.facts():
            assert fact.exit_code == -9
            assert fact.failure is not None
            assert "forkserver" in fact.failure.error
        await until(lambda: agent.killed(pid), "what is left of its workers to be killed")

    async def test_what_a_worker_said_before_the_forkserver_died_counts(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.spawner.die()
        worker.say(Finished(generation=1, outcome=outcome()))
        await worker.hang_up()
        fact = await agent.until_fact(lambda f: f.ended_at, "the end")
        assert (fact.phase, fact.failure) == (WorkerPhase.FINISHED, None)

    async def test_a_forkserver_that_does_not_answer_is_replaced(self, agent: Agent) -> None:
        agent.assign("a")
        agent.supervisor.tend()
        assert agent.spawner.replaced == []
        agent.now_s += endings.SPAWN_TIMEOUT_S
        agent.supervisor.tend()
        assert "not answered" in agent.spawner.replaced[0]


class TestHello:
    async def test_a_stranger_is_refused(self, agent: Agent) -> None:
        worker = await agent.connect(3, met=False)
        await until(lambda: worker.closed, "the stranger to be refused")

    async def test_a_second_connection_of_the_same_rank_is_refused(self, agent: Agent) -> None:
        agent.assign("a")
        first = await agent.running()
        second = await agent.connect(pid=first.pid, met=False)
        await until(lambda: second.closed, "the second one to be refused")
        assert not first.closed
        first.say(training(4))
        await agent.until_fact(lambda f: f.step == 4, "the first one to be heard")

    async def test_another_process_cannot_speak_for_a_rank(self, agent: Agent) -> None:
        agent.assign("a")
        pid = agent.spawned()
        other = await agent.connect(pid=pid + 1, met=False)
        await until(lambda: other.closed, "the other process to be refused")
        assert agent.fact().phase is WorkerPhase.SPAWNING

    async def test_it_may_come_before_the_forkserver_tells_the_pid(self, agent: Agent) -> None:
        agent.assign("a")
        pid = agent.process()
        await agent.connect(pid=pid)
        agent.spawned(pid=pid)
        assert (agent.fact().phase, agent.fact().pid) == (WorkerPhase.CONNECTING, pid)

    async def test_who_comes_when_its_job_is_over_is_killed(self, agent: Agent) -> None:
        agent.assign("a")
        agent.log.ok(c.CancelJob(job_id="job", reason="r"))
        agent.converge()
        pid = agent.process()
        await agent.connect(pid=pid)
        agent.spawned(pid=pid)
        await until(lambda: agent.killed(pid), "the late one to be killed")

    async def test_a_first_frame_that_is_no_hello_is_refused(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.connect(9, met=False)
        await until(lambda: worker.closed, "the connection to be closed")


class TestMessages:
    async def test_progress_and_phases(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        worker.say(training(2, MetricRecord(1, 0, 1.0, {"loss": 2.0})))
        fact = await agent.until_fact(lambda f: f.step == 2, "progress")
        assert (fact.phase, fact.total_steps) == (WorkerPhase.TRAINING, 100)
        assert agent.metrics == [MetricRecord(1, 0, 1.0, {"loss": 2.0})]
        changes = agent.changes
        worker.say(training(3))
        await agent.until_fact(lambda f: f.step == 3, "more progress")
        assert agent.changes == changes, "steps alone wait for the next regular report"

    async def test_training_does_not_suffer_from_a_broken_history(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.sink_fails = True
        agent.write_log("line\n")
        worker.say(training(2, MetricRecord(1, 0, 1.0, {})))
        await agent.until_fact(lambda f: f.step == 2, "progress")
        agent.supervisor.tend()
        assert not worker.closed
        agent.spawner.events.exited(worker.pid, -9)
        await worker.hang_up()
        await agent.until_fact(lambda f: f.ended_at, "the end")

    async def test_a_rank_at_a_barrier_is_told_of_and_released(self, agent: Agent) -> None:
        agent.assign("a", "a")
        first, second = await agent.running(0), await agent.running(1)
        second.say(Arrive(generation=1, name="step/7", value=7))
        generation = RunGeneration("job", "run-job", 1)
        barrier = Barrier(generation, "step/7")
        await until(lambda: agent.arrived == [(barrier, 1, 7)], "the arrival to be handed on")
        awaited = Awaited(generation=1, name="step/7", missing=(0,))
        released = Released(generation=1, name="step/7", value=9)
        for news in (awaited, released):
            agent.supervisor.tell_ranks(generation, (1, 2), news)
        await until(lambda: second.got == [awaited, released], "the release")
        assert first.got == []

    async def test_a_rank_at_too_many_barriers_is_ended_and_told_why(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.full = True
        worker.say(Arrive(generation=1, name="one more"))
        await until(lambda: worker.closed, "the connection to be closed")
        failure = (await agent.until_fact(lambda f: f.failure, "the failure")).failure
        assert failure is not None
        assert "barriers" in failure.error

    async def test_a_stop_is_told_once_also_to_who_connects_later(self, agent: Agent) -> None:
        agent.assign("a", "a")
        early = await agent.running(0)
        agent.log.ok(c.StopJob(job_id="job", reason="r"))
        agent.converge()
        agent.converge()
        late = await agent.running(1)
        await until(lambda: early.got == late.got == [Stop()], "both to be told")

    async def test_a_request_to_save_is_told_once_per_generation_until_it_is_answered(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
        agent.log.ok(c.RequestCheckpoint(job_id="job"))
        agent.converge()
        agent.converge()
        await until(lambda: worker.got == [Save(generation=1, request=1)], "it to be told once")
        agent.log.ok(c.RequestCheckpoint(job_id="job"))
        agent.converge()
        await until(lambda: worker.got[1:] == [Save(generation=1, request=2)], "the second one")
        answer = msgspec.structs.replace(checkpoint(10), save_request=2)
        agent.log.ok(c.CommitCheckpoint(job_id="job", generation=1, checkpoint=answer))
        agent.converge()
        assert not agent.log.job("job").is_to_save

    async def test_durable_shards_are_carried_until_their_step_is_committed(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
        for step in (10, 20):
            worker.say(shard(step))
        await agent.until_fact(lambda f: len(f.shards) == 2, "both shards")
        agent.log.ok(c.CommitCheckpoint(job_id="job", generation=1, checkpoint=checkpoint(10)))
        agent.converge()
        assert [one.step for one in agent.fact().shards] == [20]

    async def test_a_shard_is_told_once_other_nodes_have_it_too(self, agent: Agent) -> None:
        agent.assign("a")
        copies = FakeCopies()
        agent.supervisor._copies = copies
        worker = await agent.running()
        agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
        agent.converge()
        for step in (10, 20):
            worker.say(shard(step))
        await agent.until_fact(lambda f: f.copying == (10, 20), "both to be under way")
        assert agent.fact().shards == ()
        copies.settle("")
        await agent.until_fact(lambda f: len(f.shards) == 1, "the first one")
        copies.settle("too slow")
        told = await agent.until_fact(lambda f: f.abandoned, "the second one to be given up")
        assert (told.abandoned, told.copying) == (((20, "too slow"),), ())

    async def test_a_shard_counts_although_its_worker_has_ended_meanwhile(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        copies = FakeCopies()
        agent.supervisor._copies = copies
        worker = await agent.running()
        worker.say(shard(10))
        worker.say(Finished(generation=1, outcome=outcome()))
        await agent.until_fact(lambda f: f.outcome, "the outcome")
        await worker.hang_up()
        agent.spawner.events.exited(worker.pid, 0)
        await agent.until_fact(lambda f: f.ended_at, "the end")
        copies.settle("")
        await agent.until_fact(lambda f: len(f.shards) == 1, "the shard")
        assert agent.fact().phase is WorkerPhase.FINISHED

    async def test_a_worker_is_told_when_its_checkpoint_is_here(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        need = NeedCheckpoint(number=7, checkpoint=checkpoint(10))
        worker.say(need)
        await until(lambda: worker.got == [CheckpointHere(number=7)], "the answer of a lone node")
        copies = FakeCopies()
        agent.supervisor._copies = copies
        worker.say(need)
        bad = CheckpointHere(number=7, problem="nobody has it", kind=FailureKind.CORRUPT_CHECKPOINT)
        await until(lambda: copies.needs == [need], "the question to be passed on")
        copies.answers[0](bad)
        await until(lambda: worker.got[1:] == [bad], "the answer")

    @pytest.mark.parametrize("delta", [True, False])
    async def test_workers_that_write_deltas_are_told_of_each_commit_once(
        self, agent: Agent, delta: bool
    ) -> None:
        agent.log.ok(submit("job", workers=1, checkpointing=Checkpointing(delta=delta)))
        agent.assign("a")
        worker = await agent.running()
        agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
        told = []
        for step in (10, 20):
            command = c.CommitCheckpoint(job_id="job", generation=1, checkpoint=checkpoint(step))
            agent.log.ok(command)
            agent.converge()
            agent.converge()
            told.append(Committed(checkpoint=agent.state.jobs["job"].newest_checkpoint()))
        agent.log.ok(c.StopJob(job_id="job", reason="r"))
        agent.converge()
        await until(lambda: Stop() in worker.got, "the end of what it is told")
        assert worker.got == [*(told if delta else ()), Stop()]

    async def test_what_a_fact_carries_is_bounded(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        for step in range(MAX_SHARDS + 10):
            worker.say(shard(step))
            worker.say(ShardAbandoned(generation=1, step=step, reason="r" * 100_000))
        names = {f"metric-{number:04d}-{'n' * 1000}": 1.0 for number in range(500)}
        worker.say(Finished(generation=1, outcome=outcome(metrics=names)))
        fact = await agent.until_fact(lambda f: f.outcome, "the outcome")
        assert len(fact.shards) == MAX_SHARDS
        assert fact.shards[-1].step == MAX_SHARDS + 9
        assert len(fact.abandoned) == MAX_ABANDONED
        assert fact.outcome is not None
        report = NodeReport(node="a", incarnation=1, sequence=1, at=0.0, slots=1, workers=(fact,))
        assert len(msgspec.msgpack.encode(report)) < 64 * 1024


class TestRendezvous:
    async def test_keys_reach_local_and_remote_ranks_whoever_comes_first(
        self, agent: Agent
    ) -> None:
        agent.assign("a", "a", "b")
        first = await agent.running(0)
        first.say(Rendezvous(key="g1/0/0", value=b"zero"))
        await agent.until_fact(lambda f: f.rendezvous, "the key in the report")
        agent.supervisor.take_peer_report(_peer({"g1/0/2": b"two"}))
        second = await agent.running(1)
        second.say(Rendezvous(key="g1/0/1", value=b"one"))
        wanted = {"g1/0/0": b"zero", "g1/0/1": b"one", "g1/0/2": b"two"}
        await until(lambda: _keys(second.got) == _without(wanted, "g1/0/1"), "all keys at rank 1")
        await until(lambda: _keys(first.got) == _without(wanted, "g1/0/0"), "all keys at rank 0")

    async def test_a_key_is_sent_once_however_often_it_is_reported(self, agent: Agent) -> None:
        agent.assign("a", "b")
        worker = await agent.running(0)
        for _ in range(3):
            agent.supervisor.take_peer_report(_peer({"g1/0/1": b"one"}))
        worker.say(training(1))
        await agent.until_fact(lambda f: f.step == 1, "progress")
        agent.supervisor.take_peer_report(_peer({"g1/0/9": b"nine"}))
        await until(lambda: "g1/0/9" in _keys(worker.got), "the last key")
        assert len(worker.got) == 2

    async def test_keys_of_other_generations_are_not_passed_on(self, agent: Agent) -> None:
        agent.assign("a", "b")
        worker = await agent.running(0)
        agent.supervisor.take_peer_report(_peer({"g0/1": b"old"}, generation=0))
        agent.supervisor.take_peer_report(_peer({"g2/1": b"next"}, generation=2))
        agent.supervisor.take_peer_report(_peer({"x": b"x"}, run_id="run-other"))
        agent.supervisor.take_peer_report(_peer({"g1/0/1": b"one"}))
        await until(lambda: bool(worker.got), "a key")
        assert worker.got == [RendezvousKeys(keys={"g1/0/1": b"one"})]
        agent.converge()
        assert len(agent.supervisor._keys) == 2, "keys of this generation and the next"
        agent.log.ok(c.CancelJob(job_id="job", reason="r"))
        agent.converge()
        assert len(agent.supervisor._keys) == 0

    async def test_a_worker_that_publishes_without_end_is_ended(self, agent: Agent) -> None:
        agent.assign("a")
        worker = await agent.running()
        worker.say(Rendezvous(key="g1/0/0", value=b"v" * (MAX_RENDEZVOUS_BYTES + 1)))
        fact = await agent.until_fact(lambda f: f.failure, "the failure")
        assert fact.failure is not None
        assert "rendezvous" in fact.failure.error
        assert fact.rendezvous == {}


def _peer(keys: dict[str, bytes], *, run_id: str = "run-job", generation: int = 1) -> NodeReport:
    fact = WorkerFact(
        job_id="job",
        run_id=run_id,
        generation=generation,
        rank=1,
        phase=WorkerPhase.CONNECTING,
        rendezvous=keys,
    )
    return NodeReport(node="b", incarnation=1, sequence=1, at=0.0, slots=1, workers=(fact,))


def _keys(messages: list[object]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for message in messages:
        assert isinstance(message, RendezvousKeys)
        found |= message.keys
    return found


def _without(keys: dict[str, bytes], own: str) -> dict[str, bytes]:
    return {key: value for key, value in keys.items() if key != own}


class TestLogs:
    async def test_lines_go_into_history_as_they_come(self, agent: Agent) -> None:
        agent.assign("a")
        agent.spawned()
        agent.write_log("one\n")
        await until(lambda: agent.lines == ["one"], "the line")

    async def test_what_an_earlier_life_left_under_the_same_name_is_not_told_again(
        self, agent: Agent, tmp_path: Path
    ) -> None:
        path = log_path(tmp_path / "workers", "run-job", 1_000_001)
        path.parent.mkdir(parents=True)
        path.write_text("old news\n")
        agent.assign("a")
        agent.spawned()
        agent.write_log("news\n")
        agent.supervisor.tend()
        assert agent.lines == ["news"]

    async def test_files_of_removed_jobs_go_once_the_node_knows_the_log(
        self, agent: Agent, tmp_path: Path
    ) -> None:
        file = log_path(tmp_path / "workers", "run-gone", 7)
        gone = file.parent
        gone.mkdir(parents=True)
        file.touch()
        agent.assign("a")
        await until(lambda: not gone.exists(), "the old run's files to go")
        assert Path(agent.spawner.plans[0].log_path).parent.exists()

    async def test_before_that_they_stay(self, agent: Agent, tmp_path: Path) -> None:
        kept = log_path(tmp_path / "workers", "run-x", 7).parent
        kept.mkdir(parents=True)
        agent.registered = False
        for _ in range(3):
            agent.supervisor._prune_when_due()
        assert agent.supervisor._output.prune_due, "nothing was looked for"
        assert kept.exists()

    async def test_the_last_lines_of_workers_that_a_stopping_node_kills_are_kept(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        pid = agent.spawned()
        agent.write_log("last line")
        await agent.supervisor.stop()
        assert agent.lines == ["last line"]
        await until(lambda: agent.killed(pid), "the worker to be killed")
        agent.converge()
        assert len(agent.spawner.plans) == 1
        assert not agent.socket.exists()
