"""The leader's loop: decisions in order per job, side by side otherwise, and only by who leads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from distroml import commands as c
from distroml.commands import AnyCommand, Entry, Outcome, encode_entry
from distroml.consensus.replica import Replica
from distroml.errors import OutcomeUnknown, StoreError, Unavailable
from distroml.model import Checkpoint, Event, JobStatus, NodeStatus
from distroml.reports import DataCursor, NodeReport, ShardFact
from distroml.runtime import committing
from distroml.runtime import coordinator as module
from distroml.runtime.checkpoint.stores.opening import Stores
from distroml.runtime.coordinator import Coordinator, CoordinatorSettings
from distroml.runtime.decisions import Decision, WriteManifest
from distroml.runtime.observations import Observations
from tests.builders import checkpoint, form, members, node, submit
from tests.consensus.live import until


class FakeRaft:
    def __init__(self) -> None:
        self.leads = True
        self.term = 3
        self.asked = 0

    @property
    def is_leader(self) -> bool:
        self.asked += 1
        return self.leads


class Proposed:
    """A proposal under way; the test says what becomes of it."""

    def __init__(self, command: AnyCommand, term: int | None) -> None:
        self.command = command
        self.term = term
        self.answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def name(self) -> str:
        return type(self.command).__name__


class World:
    """A coordinator on node ``a``; what it would decide is a list, what it proposes another."""

    def __init__(self) -> None:
        self.raft = FakeRaft()
        self.replica = Replica()
        self.sequence = 0
        self.decisions: list[Decision] = []
        self.turns = 0
        self.facts = module.Facts(nodes={})
        self.proposed: list[Proposed] = []
        self.observations = Observations(name="a", monotonic=lambda: 0.0)
        self.coordinator = Coordinator(
            node="a",
            raft=self.raft,
            replica=self.replica,
            observations=self.observations,
            propose=self._propose,
            stores=Stores("/nonexistent"),
            settings=CoordinatorSettings(),
        )

    async def _propose(
        self, command: AnyCommand, timeout_s: float, *, term: int | None = None
    ) -> Outcome:
        one = Proposed(command, term)
        self.proposed.append(one)
        return await one.answer

    def reconcile(self, state: object, facts: module.Facts, *_: object) -> list[Decision]:
        self.turns += 1
        self.facts = facts
        return list(self.decisions)

    def apply(self, command: AnyCommand) -> None:
        self.sequence += 1
        entry = Entry("a", 1, self.sequence, self.sequence, float(self.sequence), command)
        self.replica.apply(self.sequence, encode_entry(entry))

    def decides(self, *actions: AnyCommand | WriteManifest) -> None:
        self.decisions = [Decision(action=action, reason="because") for action in actions]
        self.coordinator.kick()

    async def until_proposed(self, *names: str) -> None:
        await until(lambda: [one.name for one in self.proposed] == list(names), f"{names}")

    async def turn(self) -> None:
        """At least one whole turn from now on."""
        turns = self.turns
        self.coordinator.kick()
        await until(lambda: self.turns >= turns + 2, "a turn")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "TURN_S", 0.001)
    world = World()
    monkeypatch.setattr(module, "reconcile", world.reconcile)
    world.coordinator.start()
    yield world
    await world.coordinator.stop()


def begin(job_id: str, step: int = 1) -> c.BeginCheckpoint:
    return c.BeginCheckpoint(job_id=job_id, generation=1, step=step)


def lost(name: str) -> c.SetNodeStatus:
    return c.SetNodeStatus(name=name, incarnation=1, status=NodeStatus.LOST, reason="silent")


def whole(job_id: str, step: int) -> WriteManifest:
    shard = ShardFact(
        step=step, cursor=DataCursor(0, 0), rank=0, file="f", size_bytes=1, sha256="0" * 64
    )
    return WriteManifest(job_id=job_id, run_id="r", generation=1, step=step, shards=(shard,))


OK = Outcome(1)


class TestOrder:
    async def test_a_slow_proposal_holds_up_its_own_job_only(self, world: World) -> None:
        world.decides(lost("b"), begin("x", 1), begin("x", 2), begin("y"))
        await world.until_proposed("SetNodeStatus", "BeginCheckpoint", "BeginCheckpoint")
        assert [getattr(one.command, "job_id", "-") for one in world.proposed] == ["-", "x", "y"]
        world.proposed[1].answer.set_result(OK)
        await until(lambda: len(world.proposed) == 4, "the second decision on x")
        assert world.proposed[3].command == begin("x", 2)

    async def test_nothing_is_decided_again_while_it_is_under_way(self, world: World) -> None:
        world.decides(begin("x"))
        await world.until_proposed("BeginCheckpoint")
        await world.turn()
        assert len(world.proposed) == 1
        world.proposed[0].answer.set_result(OK)
        await until(lambda: len(world.proposed) == 2, "the next turn to look at x again")

    @pytest.mark.parametrize(
        "ending", [Unavailable("no leader"), OutcomeUnknown("who knows"), RuntimeError("defect")]
    )
    async def test_after_a_failure_the_next_turns_go_on(
        self, world: World, ending: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "REFUSED_PAUSE_S", 0.0)
        world.decides(begin("x"), begin("x", 2))
        await world.until_proposed("BeginCheckpoint")
        world.proposed[0].answer.set_exception(ending)
        await until(lambda: len(world.proposed) == 2, "another attempt")
        assert world.proposed[1].command == begin("x"), "the rest of a failed chain is dropped"

    async def test_what_was_refused_is_not_repeated_at_full_speed(self, world: World) -> None:
        world.decides(begin("x"))
        await world.until_proposed("BeginCheckpoint")
        world.proposed[0].answer.set_result(Outcome(1, "no-slot", "no free slot"))
        await world.turn()
        await world.turn()
        assert len(world.proposed) == 1
        world.decides(begin("x"), begin("y"))
        await until(lambda: len(world.proposed) == 2, "another job's decision")

    async def test_proposals_under_way_are_bounded(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_UNDER_WAY", 2)
        world.decides(begin("x"), begin("y"), begin("z"))
        await until(lambda: len(world.proposed) == 2, "two proposals")
        await world.turn()
        assert len(world.proposed) == 2
        world.decides(begin("z"))
        world.proposed[0].answer.set_result(OK)
        await until(lambda: len(world.proposed) == 3, "room for the third")
        assert world.proposed[2].command == begin("z")

    async def test_a_defect_in_a_turn_does_not_end_the_loop(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        turns = 0

        def fails(*_: object) -> list[Decision]:
            nonlocal turns
            turns += 1
            raise RuntimeError("defect")

        monkeypatch.setattr(module, "reconcile", fails)
        await until(lambda: turns >= 3, "three failing turns")
        monkeypatch.setattr(module, "reconcile", world.reconcile)
        world.decides(begin("x"))
        await world.until_proposed("BeginCheckpoint")


class TestLeadership:
    async def test_only_the_leader_decides_and_names_its_term(self, world: World) -> None:
        world.raft.leads = False
        world.decides(begin("x"))
        await until(lambda: world.raft.asked > 5, "some turns")
        assert world.proposed == []
        world.raft.leads = True
        await world.until_proposed("BeginCheckpoint")
        assert world.proposed[0].term == 3

    async def test_a_new_term_starts_from_nothing_although_no_turn_saw_the_old_one_end(
        self, world: World
    ) -> None:
        world.apply(node("b"))
        await world.turn()
        first = world.facts.node_sightings["b"].since_s
        world.raft.term = 5
        await world.turn()
        assert world.facts.node_sightings["b"].since_s > first
        world.decides(begin("x"))
        await world.until_proposed("BeginCheckpoint")
        assert world.proposed[0].term == 5

    async def test_any_node_tells_why_jobs_wait(self, world: World) -> None:
        world.raft.leads = False
        world.apply(node("a", slots=1))
        world.apply(submit("x", workers=4))
        world.observations.take(
            NodeReport(node="a", incarnation=1, sequence=1, at=0.0, slots=1, applied_index=2)
        )
        assert "needs 4 slots" in world.coordinator.waiting()["x"]


class TestCheckpoints:
    """The manifest is written in a thread; then the log decides."""

    async def test_it_is_written_once_and_then_proposed(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = _writes(monkeypatch, lambda step: checkpoint(step))
        world.decides(whole("x", 10))
        await world.until_proposed("CommitCheckpoint")
        await world.turn()
        assert written == [10]
        assert ("x", 1, 10) in world.facts.writing
        world.decides()
        world.proposed[0].answer.set_result(OK)
        await until(lambda: not world.facts.writing, "the commit to be over")
        assert world.facts.write_failures == {}

    @pytest.mark.parametrize("error", [StoreError("full"), OSError("gone"), TypeError("defect")])
    async def test_a_store_that_fails_is_told_to_the_next_turn(
        self, world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fails(step: int) -> Checkpoint:
            raise error

        monkeypatch.setattr(committing, "PATIENCE_S", 0.0)
        written = _writes(monkeypatch, fails)
        world.decides(whole("x", 10))
        await until(lambda: bool(world.facts.write_failures), "the failure to be told")
        world.decides()
        assert list(world.facts.write_failures) == [("x", 1, 10)]
        assert world.proposed == []
        assert written[0] == 10

    async def test_a_commit_of_unknown_outcome_is_tried_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "REFUSED_PAUSE_S", 0.0)
        _writes(monkeypatch, lambda step: checkpoint(step))
        world.decides(whole("x", 10))
        await world.until_proposed("CommitCheckpoint")
        world.proposed[0].answer.set_exception(OutcomeUnknown("who knows"))
        await until(lambda: len(world.proposed) == 2, "another attempt")
        assert world.facts.write_failures == {}

    async def test_a_refused_commit_is_given_up(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _writes(monkeypatch, lambda step: checkpoint(step))
        world.decides(whole("x", 10))
        await world.until_proposed("CommitCheckpoint")
        world.decides()
        world.proposed[0].answer.set_result(Outcome(1, "stale-generation", "too late"))
        await until(lambda: bool(world.facts.write_failures), "the refusal to be told")

    async def test_a_store_that_hangs_keeps_nobody_from_stopping_or_deciding(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = threading.Event()

        def hangs(step: int) -> Checkpoint:
            release.wait(10)
            return checkpoint(step)

        _writes(monkeypatch, hangs)
        try:
            world.decides(*(whole("x", step) for step in range(20)), begin("y"))
            await world.until_proposed("BeginCheckpoint")
            await asyncio.to_thread(lambda: None)  # the loop's own threads are free
            async with asyncio.timeout(5):
                await world.coordinator.stop()
        finally:
            release.set()

    async def test_latest_follows_the_newest_commit_and_skips_those_between(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        published: list[int] = []
        release = threading.Event()

        def publish(store: object, newest: Checkpoint) -> None:
            published.append(newest.step)
            release.wait(10)

        monkeypatch.setattr(committing, "publish_latest", publish)
        for command in (
            node("a"),
            submit("x", workers=1),
            form("x", 1, members("a")),
            c.MarkRunning(job_id="x", generation=1, total_steps=100),
        ):
            world.apply(command)
        try:
            for step in (10, 20, 30):
                commit = c.CommitCheckpoint(job_id="x", generation=1, checkpoint=checkpoint(step))
                world.apply(commit)
                world.coordinator.on_events((_committed(step),))
                await until(lambda: bool(published), "the first to be published")
        finally:
            release.set()
        await until(lambda: published == [10, 30], "the newest to be published")
        assert world.replica.state.jobs["x"].status is JobStatus.RUNNING

    async def test_latest_goes_back_when_the_newest_was_removed_and_not_for_older_ones(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        published: list[int] = []
        monkeypatch.setattr(
            committing, "publish_latest", lambda store, newest: published.append(newest.step)
        )
        for command in (
            node("a"),
            submit("x", workers=1),
            form("x", 1, members("a")),
            c.MarkRunning(job_id="x", generation=1, total_steps=100),
            *(
                c.CommitCheckpoint(job_id="x", generation=1, checkpoint=checkpoint(step))
                for step in (10, 20, 30)
            ),
            c.CancelJob(job_id="x", reason="r"),
        ):
            world.apply(command)
        for step in (10, 30):
            world.apply(c.RemoveCheckpoint(job_id="x", step=step))
            retired = Event(
                index=1, at=0.0, type="checkpoint_retired", job_id="x", data={"step": step}
            )
            world.coordinator.on_events((retired,))
        await until(lambda: published == [20], "the one before to be published")

    async def test_followers_publish_nothing(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(committing, "publish_latest", pytest.fail)
        world.raft.leads = False
        world.coordinator.on_events((_committed(10),))
        assert world.coordinator._committer._publishing == set()


def _committed(step: int) -> Event:
    return Event(index=step, at=0.0, type="checkpoint", job_id="x", data={"step": step})


def _writes(monkeypatch: pytest.MonkeyPatch, made: Callable[[int], Checkpoint]) -> list[int]:
    """Stand-in of the writer; the steps that it was asked to write."""
    asked: list[int] = []

    def write(store: object, *, shards: Sequence[ShardFact], **_: object) -> Checkpoint:
        asked.append(shards[0].step)
        return made(shards[0].step)

    monkeypatch.setattr(committing, "write_manifest", write)
    return asked
