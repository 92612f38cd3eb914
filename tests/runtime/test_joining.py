"""Workers outlive generations: who is told to leave, to wait, to join which rank, and what they say on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from distroml import commands as c
from distroml.model import Cause, Culprit, FailureKind, Member, NodeStatus
from distroml.reports import (
    DataCursor,
    Former,
    Marks,
    NodeReport,
    ShardFact,
    WorkerFact,
    WorkerOutcome,
    WorkerPhase,
)
from distroml.runtime import endings
from distroml.runtime.control import (
    Abort,
    Finished,
    Join,
    MetricRecord,
    Parked,
    Progress,
    Rendezvous,
    RendezvousKeys,
    Save,
    ShardDurable,
)
from tests.builders import checkpoint, fail, form, members
from tests.consensus.live import until
from tests.runtime.agents import Agent, FakeWorker
from tests.runtime.scenes import shard


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(tmp_path)
    await agent.supervisor.start(warm=True)
    yield agent
    await agent.close()


def progress(
    generation: int,
    step: int,
    phase: WorkerPhase = WorkerPhase.TRAINING,
    *metrics: MetricRecord,
    **fields: object,
) -> Progress:
    return Progress(
        generation=generation,
        phase=phase,
        step=step,
        epoch=0,
        metrics=metrics,
        **fields,  # type: ignore[arg-type]
    )


def joins(worker: FakeWorker) -> list[tuple[int, int, int, bool]]:
    """Generation, rank, world size and whether at a boundary, of all that it was told to join."""
    return [
        (m.generation, m.rank, m.world_size, m.at_boundary)
        for m in worker.got
        if isinstance(m, Join)
    ]


def saves(worker: FakeWorker) -> list[tuple[int, int]]:
    """Generation and number of each request for a checkpoint."""
    return [(m.generation, m.request) for m in worker.got if isinstance(m, Save)]


def aborts(worker: FakeWorker) -> list[int]:
    return [message.generation for message in worker.got if isinstance(message, Abort)]


async def training(agent: Agent, *where: str, step: int = 5, **fields: object) -> list[FakeWorker]:
    """A job in generation 1 on ``where`` whose local ranks train."""
    agent.assign(*where, **fields)  # type: ignore[arg-type]
    workers = []
    for rank, name in enumerate(where):
        if name == "a":
            worker = await agent.running(rank)
            worker.say(progress(1, step))
            await agent.until_fact(lambda f: f.step == step, "progress", rank)
            workers.append(worker)
    agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
    agent.converge()
    return workers


class TestFailures:
    async def test_survivors_are_called_off_wait_and_join_the_next_generation(
        self, agent: Agent
    ) -> None:
        zero, one = await training(agent, "a", "a", "b")
        agent.log.ok(fail("job", 1, collateral=(0, 1)))
        agent.converge()
        await until(lambda: aborts(zero) == aborts(one) == [1], "both to be called off")
        zero.say(Parked(generation=1, step=6, at=50.0, reason="called off"))
        fact = await agent.until_fact(lambda f: f.phase == "PARKED", "it to be parked")
        assert (fact.step, fact.parked_at, fact.parked_reason) == (6, 50.0, "called off")
        agent.assign("a", "a", "a", generation=2)
        await until(lambda: joins(zero) == [(2, 0, 3, False)], "the first to be told")
        await until(lambda: joins(one) == [(2, 1, 3, False)], "the one that had not parked yet too")
        assert [plan.join.rank for plan in agent.spawner.plans[2:] if plan.join] == [2]
        assert not agent.killed(zero.pid)
        fact = agent.fact(0, 2)
        assert (fact.phase, fact.step, fact.marks.left_at) == (WorkerPhase.CONNECTING, 6, 50.0)

    async def test_a_request_to_save_that_a_failure_swallowed_is_told_again(
        self, agent: Agent
    ) -> None:
        agent.assign("a")
        worker = await agent.running()
        agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
        agent.log.ok(c.RequestCheckpoint(job_id="job"))
        agent.converge()
        await until(lambda: saves(worker) == [(1, 1)], "the request")
        agent.log.ok(fail("job", 1, collateral=(0,)))
        agent.converge()
        agent.log.ok(form("job", 2, members("a")))
        agent.converge()
        await until(lambda: saves(worker) == [(1, 1), (2, 1)], "it to be told in generation 2")
        answer = msgspec.structs.replace(checkpoint(10, 2), save_request=1)
        agent.log.ok(c.CommitCheckpoint(job_id="job", generation=2, checkpoint=answer))
        agent.log.ok(fail("job", 2, collateral=(0,)))
        agent.log.ok(form("job", 3, members("a"), checkpoint_step=10))
        agent.converge()
        await until(lambda: joins(worker)[-1][0] == 3, "generation 3")
        assert saves(worker) == [(1, 1), (2, 1)], "it was answered"

    async def test_who_is_to_blame_is_killed_and_replaced(self, agent: Agent) -> None:
        hung, other = await training(agent, "a", "a")
        agent.log.ok(
            fail(
                "job",
                1,
                cause=Cause(kind=FailureKind.HANG, rank=0),
                culprits=(Culprit("a", hung.worker[1]),),
            )
        )
        agent.converge()
        await until(lambda: agent.killed(hung.pid), "the hung one to be killed")
        assert not agent.killed(other.pid)
        agent.assign("a", "a", generation=2)
        assert [plan.join.rank for plan in agent.spawner.plans[2:] if plan.join] == [0]
        agent.spawner.events.exited(hung.pid, -9)
        await hung.hang_up()
        await until(lambda: agent.find(0, 1) is None, "the killed one to be forgotten")
        await until(lambda: joins(other) == [(2, 1, 2, False)], "the other one to be told")

    async def test_an_agent_that_missed_the_failure_does_the_same(self, agent: Agent) -> None:
        hung, other = await training(agent, "a", "a")
        agent.log.ok(
            fail(
                "job",
                1,
                cause=Cause(kind=FailureKind.HANG, rank=0),
                culprits=(Culprit("a", hung.worker[1]),),
            )
        )
        agent.assign("a", "a", generation=2)
        await until(lambda: agent.killed(hung.pid), "the hung one to be killed")
        await until(lambda: joins(other) == [(2, 1, 2, False)], "the other one to be told")

    async def test_survivors_of_a_smaller_world_take_the_ranks_that_are_left(
        self, agent: Agent
    ) -> None:
        (two,) = await training(agent, "b", "b", "a")
        agent.log.ok(fail("job", 1, collateral=(2,)))
        agent.converge()
        agent.assign("a", generation=2)
        await until(lambda: joins(two) == [(2, 0, 1, False)], "it to be told its new rank")
        assert len(agent.spawner.plans) == 1

    async def test_who_is_not_needed_any_more_is_killed(self, agent: Agent) -> None:
        zero, one = await training(agent, "a", "a")
        agent.log.ok(fail("job", 1, collateral=(0, 1)))
        agent.converge()
        agent.assign("a", generation=2)
        await until(lambda: agent.killed(one.pid), "the second one to be killed")
        assert not agent.killed(zero.pid)

    async def test_a_spawn_that_was_under_way_joins_when_it_is_there(self, agent: Agent) -> None:
        agent.assign("a")
        agent.log.ok(fail("job", 1, collateral=(0,)))
        agent.converge()
        agent.assign("a", generation=2)
        assert len(agent.spawner.plans) == 1
        late = await agent.connect(pid=agent.spawned(), met=False)
        await until(lambda: joins(late) == [(2, 0, 1, False)], "the late one to be told")

    async def test_one_that_died_in_its_generation_is_not_forked_again_by_the_agent(
        self, agent: Agent
    ) -> None:
        (zero,) = await training(agent, "a")
        agent.spawner.events.exited(zero.pid, -9)
        await zero.hang_up()
        await agent.until_fact(lambda f: f.ended_at, "the end")
        agent.converge()
        assert len(agent.spawner.plans) == 1, "the next generation decides"

    async def test_survivors_make_room_where_others_were_given_their_slots(
        self, agent: Agent
    ) -> None:
        workers = await training(agent, "a", "a", "a", "a")
        agent.log.ok(fail("job", 1, collateral=(0, 1, 2, 3)))
        agent.converge()
        agent.assign("a", "a", "a", job_id="other")
        await until(lambda: sum(agent.killed(w.pid) for w in workers) == 3, "room to be made")
        assert not agent.killed(workers[0].pid)

    async def test_on_a_node_that_is_lost_nobody_waits(self, agent: Agent) -> None:
        (zero,) = await training(agent, "a", "b")
        agent.log.ok(fail("job", 1, collateral=(0,)))
        agent.log.ok(c.SetNodeStatus(name="a", incarnation=1, status=NodeStatus.LOST, reason="r"))
        agent.converge()
        await until(lambda: agent.killed(zero.pid), "it to be killed")


class TestFence:
    async def test_a_parked_worker_that_repeats_itself_is_parked_still(self, agent: Agent) -> None:
        (zero,) = await training(agent, "a", "b")
        zero.say(Parked(generation=1, step=6, at=50.0, reason="broken"))
        await agent.until_fact(lambda f: f.phase == "PARKED", "it to be parked")
        agent.now_s += 5.0
        zero.say(progress(1, 5, WorkerPhase.TRAINING, MetricRecord(6, 0, 1.0, {"loss": 1.0})))
        fact = await agent.until_fact(lambda f: f.silent_s == 0.0, "the pulse")
        assert (fact.phase, fact.step) == (WorkerPhase.PARKED, 6)
        assert [record.step for record in agent.metrics] == [6]

    async def test_frames_of_a_generation_that_is_over_count_for_nothing_but_metrics(
        self, agent: Agent
    ) -> None:
        (zero,) = await training(agent, "a", "b")
        agent.log.ok(fail("job", 1, collateral=(0,)))
        agent.assign("a", "b", generation=2)
        await until(lambda: bool(joins(zero)), "it to be told")
        shard = ShardFact(
            step=9, cursor=DataCursor(0, 9), rank=0, file="f", size_bytes=1, sha256="0"
        )
        zero.say(ShardDurable(generation=1, shard=shard))
        zero.say(Rendezvous(key="g1/0/0", value=b"old"))
        zero.say(progress(1, 9, WorkerPhase.TRAINING, MetricRecord(9, 0, 1.0, {"loss": 1.0})))
        zero.say(Parked(generation=1, step=9, at=40.0, reason="broken"))
        zero.say(progress(2, 9, WorkerPhase.RESTORING))
        fact = await agent.until_fact(lambda f: f.phase == "RESTORING", "its own generation", 0, 2)
        assert (fact.generation, fact.shards, fact.rendezvous) == (2, (), {})
        assert (fact.step, fact.marks.left_at) == (9, 40.0)
        assert [record.step for record in agent.metrics] == [9], "its steps were done all the same"
        assert agent.supervisor._workers[agent.worker_of()].stale_frames == 3

    async def test_marks_are_told_at_once(self, agent: Agent) -> None:
        (zero,) = await training(agent, "a")
        changes = agent.changes
        zero.say(progress(1, 6, marks=Marks(stepped_at=7.0, resume_step=5, source="rank 1")))
        fact = await agent.until_fact(lambda f: f.marks.stepped_at, "the mark")
        assert fact.marks.source == "rank 1"
        assert agent.changes > changes


class TestPlannedChanges:
    async def planned(self, agent: Agent) -> FakeWorker:
        (zero,) = await training(agent, "a", "b")
        agent.log.ok(form("job", 2, members("a", "b", "b"), planned=True, joining=(2,)))
        agent.converge()
        return zero

    async def test_nobody_is_told_before_the_newcomers_can_be_met(self, agent: Agent) -> None:
        zero = await self.planned(agent)
        zero.say(progress(1, 7))
        await agent.until_fact(lambda f: f.step == 7, "progress")
        assert joins(zero) == []
        agent.supervisor.take_peer_report(peer(2, {"g2/0/2": b"two"}))
        await until(lambda: joins(zero) == [(2, 0, 3, True)], "it to be told")
        await until(lambda: zero.got[-1] == RendezvousKeys(keys={"g2/0/2": b"two"}), "the keys")
        zero.say(progress(1, 8))
        await agent.until_fact(lambda f: f.step == 8, "its last step in the first generation")
        assert agent.fact().generation == 1
        zero.say(Rendezvous(key="g2/0/0", value=b"zero"))
        fact = await agent.until_fact(lambda f: f.rendezvous, "the change", 0, 2)
        assert (fact.phase, fact.rendezvous) == (WorkerPhase.CONNECTING, {"g2/0/0": b"zero"})

    async def test_a_newcomer_is_forked_at_once(self, agent: Agent) -> None:
        (zero,) = await training(agent, "a", "b")
        agent.log.ok(form("job", 2, members("a", "b", "a"), planned=True, joining=(2,)))
        agent.converge()
        assert [plan.join.rank for plan in agent.spawner.plans[1:] if plan.join] == [2]
        new = await agent.running_in(2, 2)
        new.say(Rendezvous(key="g2/0/2", value=b"two"))
        await until(lambda: joins(zero) == [(2, 0, 3, True)], "the other one to be told")

    async def test_who_parks_at_the_boundary_before_it_was_told_joins_at_once(
        self, agent: Agent
    ) -> None:
        zero = await self.planned(agent)
        zero.say(Parked(generation=1, step=7, at=1.0, reason="the others changed over"))
        await until(lambda: joins(zero) == [(2, 0, 3, False)], "it to be told")

    async def test_what_a_rank_saved_is_still_known_when_it_has_changed_over(
        self, agent: Agent
    ) -> None:
        zero = await self.planned(agent)
        agent.supervisor.take_peer_report(peer(2, {"g2/0/2": b"two"}))
        await until(lambda: joins(zero) == [(2, 0, 3, True)], "it to be told")
        zero.say(ShardDurable(generation=1, shard=shard(0, 6)))
        zero.say(Parked(generation=1, step=12, at=1.0, reason="moves to the next generation"))
        zero.say(progress(2, 12, WorkerPhase.CONNECTING))
        zero.say(ShardDurable(generation=1, shard=shard(0, 12)))
        fact = await agent.until_fact(
            lambda f: f.former and len(f.former.shards) == 2, "both shards", 0, 2
        )
        assert fact.former == Former(generation=1, rank=0, shards=(shard(0, 6), shard(0, 12)))

    async def test_who_is_done_before_the_change_keeps_its_outcome(self, agent: Agent) -> None:
        zero = await self.planned(agent)
        done = WorkerOutcome(
            step=9,
            epoch=0,
            state_digest="d",
            sample_digest="s",
            metrics={},
            stopped=False,
            checkpoint_step=None,
        )
        zero.say(Finished(generation=1, outcome=done))
        await until(lambda: agent.fact(0).outcome is not None, "the outcome")
        agent.converge()
        assert agent.fact(0).generation == 1
        assert joins(zero) == []

    async def test_who_has_no_rank_any_more_waits_until_the_others_train(
        self, agent: Agent
    ) -> None:
        zero, one = await training(agent, "a", "a")
        agent.log.ok(form("job", 2, members("a"), planned=True))
        agent.converge()
        await until(lambda: joins(zero) == [(2, 0, 1, True)], "the first to be told")
        one.say(Parked(generation=1, step=7, at=1.0, reason="the others changed over"))
        await until(lambda: agent.fact(1).phase == "PARKED", "the second to park")
        assert not agent.killed(one.pid)
        zero.say(progress(2, 8))
        await until(lambda: agent.find(0, 2) is not None, "the first to train")
        agent.log.ok(c.MarkRunning(job_id="job", generation=2, total_steps=100))
        agent.converge()
        await until(lambda: agent.killed(one.pid), "the second to be killed")

    async def test_a_change_that_is_undone_finds_everybody_where_they_were(
        self, agent: Agent
    ) -> None:
        zero = await self.planned(agent)
        agent.log.ok(form("job", 3, members("a", "b"), planned=True))
        agent.converge()
        await until(lambda: joins(zero) == [(3, 0, 2, True)], "it to be told")

    async def test_who_was_on_its_way_when_the_change_was_undone_turns_back_at_once(
        self, agent: Agent
    ) -> None:
        zero = await self.planned(agent)
        agent.supervisor.take_peer_report(peer(2, {"g2/0/2": b"two"}))
        await until(lambda: joins(zero) == [(2, 0, 3, True)], "it to be told")
        agent.log.ok(form("job", 3, members("a", "b"), planned=True))
        agent.converge()
        await until(lambda: joins(zero)[1:] == [(3, 0, 2, True)], "it to be told again")
        zero.say(Parked(generation=1, step=7, at=1.0, reason="the others changed over"))
        await until(lambda: joins(zero)[2:] == [(3, 0, 2, False)], "it to join without a boundary")
        assert aborts(zero) == [2], "in case it has gone on to the change that was undone"

    async def test_a_failure_calls_off_both_generations(self, agent: Agent) -> None:
        zero = await self.planned(agent)
        agent.supervisor.take_peer_report(peer(2, {"g2/0/2": b"two"}))
        await until(lambda: bool(joins(zero)), "it to be told")
        agent.log.ok(fail("job", 2, cause=Cause(kind=FailureKind.EXIT, rank=1), collateral=(0, 2)))
        agent.converge()
        await until(lambda: aborts(zero) == [2], "it to be called off")
        assert not agent.killed(zero.pid)


class TestSpares:
    async def test_a_spare_is_forked_without_a_rank_and_takes_the_one_that_dies(
        self, agent: Agent
    ) -> None:
        agent.assign("a", "b", spares=(Member(2, 0, "a", 1),))
        assert [plan.join is None for plan in agent.spawner.plans] == [False, True]
        zero, spare = await agent.running(0), await agent.spare()
        spare.say(progress(0, 0, WorkerPhase.SPARE))
        await until(lambda: agent.find(0, 0) is not None, "the spare in the facts")
        agent.log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
        agent.log.ok(fail("job", 1, collateral=(0,)))
        agent.converge()
        assert aborts(spare) == []
        agent.assign("a", "a", generation=2)
        await until(lambda: joins(spare) == [(2, 1, 2, False)], "the spare to be told")
        await until(lambda: joins(zero) == [(2, 0, 2, False)], "the survivor to be told")
        assert len(agent.spawner.plans) == 2

    async def test_spares_make_room_for_ranks(self, agent: Agent) -> None:
        agent.assign("a", spares=(Member(1, 0, "a", 1), Member(2, 1, "a", 1)))
        await agent.spare()
        agent.assign("a", "a", "a", job_id="other")
        agent.converge()
        assert sum(plan.join is None for plan in agent.spawner.plans) == 2
        first = agent.spawner.plans[1].worker
        await until(
            lambda: agent.supervisor._workers["run-job", first].killed_at_s is not None,
            "the spare to be killed",
        )

    async def test_what_a_spare_writes_is_kept_until_it_has_a_rank(self, agent: Agent) -> None:
        agent.assign("b", spares=(Member(1, 0, "a", 1),))
        spare = await agent.spare()
        agent.write_to(agent.spawner.plans[0], "prepared\n")
        agent.supervisor.tend()
        assert agent.lines == []
        agent.log.ok(fail("job", 1, collateral=()))
        agent.assign("a", generation=2)
        await until(lambda: bool(joins(spare)), "the spare to be told")
        agent.supervisor.tend()
        assert agent.lines == ["prepared"]


class TestClocks:
    async def test_silence_and_a_stopped_process_are_told(
        self, agent: Agent, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (zero,) = await training(agent, "a")
        stopped = {zero.pid}
        monkeypatch.setattr(endings, "is_stopped", lambda pid: pid in stopped)
        agent.now_s += 3.0
        agent.supervisor.tend()
        agent.now_s += 2.0
        agent.supervisor.tend()
        assert (agent.fact().silent_s, agent.fact().stopped_s) == (5.0, 2.0)
        stopped.clear()
        agent.supervisor.tend()
        assert agent.fact().stopped_s == 0.0
        zero.say(progress(1, 6))
        await agent.until_fact(lambda f: f.silent_s == 0.0, "it to be heard")

    async def test_shards_go_with_their_commit_and_with_their_generation(
        self, agent: Agent
    ) -> None:
        (zero,) = await training(agent, "a", "b")
        for step in (10, 20):
            cursor = DataCursor(0, step)
            shard = ShardFact(step=step, cursor=cursor, rank=0, file="f", size_bytes=1, sha256="0")
            zero.say(ShardDurable(generation=1, shard=shard))
        await agent.until_fact(lambda f: len(f.shards) == 2, "both shards")
        agent.log.ok(c.CommitCheckpoint(job_id="job", generation=1, checkpoint=checkpoint(10)))
        agent.converge()
        assert [one.step for one in agent.fact().shards] == [20]
        agent.log.ok(fail("job", 1, collateral=(0,)))
        agent.converge()
        assert [one.step for one in agent.fact().shards] == [20], "it may still be committed"
        agent.assign("a", "b", generation=2)
        assert agent.fact(0, 2).shards == ()


def peer(rank: int, keys: dict[str, bytes], *, generation: int = 2) -> NodeReport:
    fact = WorkerFact(
        job_id="job",
        run_id="run-job",
        generation=generation,
        rank=rank,
        phase=WorkerPhase.CONNECTING,
        rendezvous=keys,
    )
    return NodeReport(node="b", incarnation=1, sequence=1, at=0.0, slots=1, workers=(fact,))
