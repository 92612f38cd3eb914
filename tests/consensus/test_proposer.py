"""Proposals reach the log once, whoever leads; what cannot be done is said, and nothing is kept for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distroml import commands as c
from distroml.commands import Entry, Outcome, decode_entry, encode_entry
from distroml.consensus import proposer as module
from distroml.consensus.peers import Channel
from distroml.consensus.proposer import MAX_DECISION_BYTES, Proposer
from distroml.errors import InvalidSpec, OutcomeUnknown, TooManyRequests, Unavailable
from distroml.model import Cause, FailureKind, NodeStatus
from distroml.spec import MAX_WORKERS
from tests.builders import fail, form, members, node, submit
from tests.consensus.live import until

SOON_S = 5.0


class Full(Exception):
    """What this raft raises when it cannot take an entry."""


class FakeRaft:
    """Takes entries into a list while it leads."""

    def __init__(self) -> None:
        self.leader: str | None = "a"
        self.term = 1
        self.full = False
        self.taken: list[bytes] = []

    @property
    def is_leader(self) -> bool:
        return self.leader == "a"

    def append(self, entry: bytes) -> None:
        if self.full:
            raise Full
        self.taken.append(entry)


class FakeLinks:
    def __init__(self) -> None:
        self.up = True
        self.sent: list[tuple[str, bytes]] = []

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        assert channel is Channel.PROPOSE
        if self.up:
            self.sent.append((peer, body))
        return self.up


class World:
    """Node ``a`` with its proposer; the test plays the log."""

    def __init__(self) -> None:
        self.raft = FakeRaft()
        self.links = FakeLinks()
        self.proposer = self.restarted(1)
        self.tasks: list[asyncio.Task[Outcome]] = []

    def restarted(self, incarnation: int) -> Proposer:
        made = Proposer(
            name="a",
            incarnation=incarnation,
            raft=self.raft,
            links=self.links,
            refusal=(Full,),
            clock=lambda: 7.0,
        )
        made.registered = True
        return made

    def propose(
        self, command: c.AnyCommand, timeout_s: float = SOON_S, term: int | None = None
    ) -> asyncio.Task[Outcome]:
        task = asyncio.create_task(self.proposer.propose(command, timeout_s, term=term))
        self.tasks.append(task)
        return task

    def entries(self) -> list[Entry]:
        return [decode_entry(data) for data in self.raft.taken]

    def lead(self, leader: str | None) -> None:
        self.raft.leader = leader
        self.raft.term += 1
        self.proposer.on_leader_change()

    def apply(self, entry: Entry, index: int = 1) -> None:
        self.proposer.on_applied(entry, Outcome(index, job_id="job"), ())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for task in world.tasks:
        task.cancel()
    await asyncio.gather(*world.tasks, return_exceptions=True)


async def test_the_answer_comes_with_the_entry_that_is_applied_here(world: World) -> None:
    first, second = world.propose(submit("x")), world.propose(submit("y"))
    await until(lambda: len(world.raft.taken) == 2, "both entries")
    one, two = world.entries()
    assert (one.proposer, one.incarnation, one.at) == ("a", 1, 7.0)
    assert one.sequence < two.sequence
    world.apply(two, index=9)
    assert (await second).index == 9
    assert not first.done()
    world.apply(one, index=10)
    assert (await first).index == 10


async def test_entries_of_others_and_of_an_earlier_life_answer_nobody(world: World) -> None:
    task = world.propose(submit("x"))
    await until(lambda: world.raft.taken, "the entry")
    (entry,) = world.entries()
    other = Entry("b", 1, entry.sequence, entry.settled, 0.0, entry.command)
    earlier = Entry("a", 0, entry.sequence, entry.settled, 0.0, entry.command)
    for stranger in (other, earlier):
        world.apply(stranger)
    world.proposer.on_applied(None, Outcome(1), ())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()


async def test_settled_never_passes_a_proposal_that_still_waits(world: World) -> None:
    first = world.propose(submit("x"))
    await until(lambda: len(world.raft.taken) == 1, "the first entry")
    world.propose(submit("y"))
    await until(lambda: len(world.raft.taken) == 2, "the second entry")
    one, two = world.entries()
    assert one.settled == two.settled == one.sequence
    world.apply(one)
    await first
    world.propose(submit("z"))
    await until(lambda: len(world.raft.taken) == 3, "the third entry")
    assert world.entries()[2].settled == two.sequence


async def test_a_new_leader_is_offered_the_same_entry_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 60.0)
    world.raft.leader = None
    task = world.propose(submit("x"))
    await asyncio.sleep(0)
    assert not world.raft.taken
    assert not world.links.sent
    world.lead("b")
    await until(lambda: world.links.sent, "the entry to be sent to b")
    world.lead("a")
    await until(lambda: world.raft.taken, "the entry to be appended here")
    assert world.links.sent[0] == ("b", world.raft.taken[0])
    world.apply(world.entries()[0])
    assert (await task).job_id == "job"


async def test_an_entry_that_nobody_answers_is_offered_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_MOST_S", 0.001)
    task = world.propose(submit("x"))
    await until(lambda: len(world.raft.taken) >= 3, "the entry to be offered three times")
    assert len(set(world.raft.taken)) == 1
    world.apply(world.entries()[0])
    await task
    world.apply(world.entries()[0])  # the repeats are applied too, and harm nobody


async def test_an_entry_that_was_sent_away_is_sent_again_sooner_than_one_that_is_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.001)
    world.propose(submit("x"))
    await until(lambda: world.raft.taken, "the entry to be appended here")
    world.lead("b")
    await until(lambda: len(world.links.sent) >= 3, "the entry to be sent three times")
    assert len(world.raft.taken) == 1


async def test_without_a_leader_nothing_was_done_and_that_is_said(world: World) -> None:
    world.raft.leader = "b"
    world.links.up = False
    with pytest.raises(Unavailable, match="nothing was changed") as caught:
        await world.propose(submit("x"), timeout_s=0.01)
    assert not isinstance(caught.value, OutcomeUnknown)


async def test_an_entry_that_was_handed_over_may_still_happen_and_that_is_said(
    world: World,
) -> None:
    with pytest.raises(OutcomeUnknown):
        await world.propose(submit("x"), timeout_s=0.01)
    world.apply(world.entries()[0])  # late: nobody waits any more


async def test_a_full_leader_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.001)
    world.raft.full = True
    task = world.propose(submit("x"))
    await asyncio.sleep(0.005)
    assert not task.done()
    world.raft.full = False
    await until(lambda: world.raft.taken, "the entry")
    world.apply(world.entries()[0])
    await task


async def test_a_cancelled_caller_leaves_nothing_behind(world: World) -> None:
    cancelled = world.propose(submit("x"))
    await until(lambda: world.raft.taken, "the entry")
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    world.apply(world.entries()[0])
    after = world.propose(submit("y"))
    await until(lambda: len(world.raft.taken) == 2, "the next entry")
    assert world.entries()[1].settled == world.entries()[1].sequence
    world.apply(world.entries()[1])
    await after


async def test_a_restarted_node_never_names_an_entry_as_before(world: World) -> None:
    world.propose(submit("x"))
    await until(lambda: world.raft.taken, "the entry")
    world.proposer = world.restarted(2)
    world.propose(submit("y"))
    await until(lambda: len(world.raft.taken) == 2, "the entry of the next life")
    one, two = world.entries()
    assert (one.incarnation, one.sequence) != (two.incarnation, two.sequence)


async def test_before_it_is_registered_a_node_proposes_its_registration_only(
    world: World,
) -> None:
    """Until then another process may have used the same names, and its outcomes would be taken for ours."""
    world.proposer.registered = False
    with pytest.raises(Unavailable, match="not registered"):
        await world.propose(submit("x"))
    world.propose(node("a"))
    await until(lambda: world.raft.taken, "the registration")


async def test_waiting_proposals_are_bounded_and_clients_leave_room_for_the_node(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(module, "MAX_OWN_IN_FLIGHT", 1)
    world.propose(submit("x"))
    world.propose(submit("y"))
    await until(lambda: len(world.raft.taken) == 2, "two writes")
    with pytest.raises(TooManyRequests):
        await world.propose(submit("z"))
    own = world.propose(form("x", 1, members("a")))
    await until(lambda: len(world.raft.taken) == 3, "the node's own entry")
    with pytest.raises(TooManyRequests):
        await world.propose(form("y", 1, members("a")))
    world.apply(world.entries()[2])
    await own
    world.propose(form("y", 1, members("a")))
    await until(lambda: len(world.raft.taken) == 4, "room again")


class TestFence:
    """A decision is offered only by the leader that made it."""

    lost = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.LOST, reason="silent")

    async def test_a_decision_is_not_handed_to_the_next_leader(self, world: World) -> None:
        world.raft.full = True
        task = world.propose(self.lost, term=1)
        await asyncio.sleep(0)
        world.lead("b")
        with pytest.raises(Unavailable, match="does not lead"):
            await task
        assert not world.links.sent

    async def test_nor_is_it_offered_in_a_later_term_of_its_own(self, world: World) -> None:
        task = world.propose(self.lost, term=1)
        await until(lambda: world.raft.taken, "the decision")
        world.lead("b")
        world.lead("a")
        with pytest.raises(OutcomeUnknown):
            await task
        assert len(world.raft.taken) == 1

    async def test_its_outcome_is_told_while_it_leads(self, world: World) -> None:
        task = world.propose(self.lost, term=1)
        await until(lambda: world.raft.taken, "the decision")
        world.apply(world.entries()[0], index=5)
        assert (await task).index == 5


class TestForwarded:
    entry = encode_entry(Entry("b", 1, 1, 0, 1.5, submit("x")))

    def test_the_leader_takes_a_followers_entry(self, world: World) -> None:
        world.proposer.on_forwarded("b", self.entry)
        assert world.raft.taken == [self.entry]

    def test_who_cannot_take_it_counts_it(self, world: World) -> None:
        world.raft.full = True
        world.proposer.on_forwarded("b", self.entry)
        world.raft.leader = "c"
        world.proposer.on_forwarded("b", self.entry)
        assert world.proposer.forwarded_dropped == 2

    @given(st.binary(max_size=200))
    @example(b"\x91" * 100_000)
    @example(entry.replace(b"SubmitJob", b"ShapeJobs"))
    def test_the_leader_refuses_what_it_cannot_read(self, data: bytes) -> None:
        world = World()
        world.proposer.on_forwarded("b", data)
        assert world.raft.taken == []
        assert (world.proposer.forwarded_unreadable, world.proposer.forwarded_dropped) == (1, 0)

    def test_what_the_leader_skips_does_not_get_into_the_log(self, world: World) -> None:
        newer = msgspec.msgpack.decode(self.entry)
        (newer[-1] if isinstance(newer, list) else newer["command"])["unheard_of"] = [[[]]]
        world.proposer.on_forwarded("b", msgspec.msgpack.encode(newer))
        assert world.raft.taken == [self.entry]


class TestSize:
    async def test_the_largest_generation_with_the_longest_names_fits(self, world: World) -> None:
        names = [f"{number:0>63}" for number in range(7)]
        where = members(*(names[rank % 7] for rank in range(MAX_WORKERS)), incarnation=2**40)
        world.propose(form("job-1", 2**31, where, resume_step=2**60))
        await until(lambda: world.raft.taken, "the entry")
        assert len(world.raft.taken[0]) < MAX_DECISION_BYTES

    async def test_the_longest_cause_fits(self, world: World) -> None:
        cause = Cause(
            kind=FailureKind.ERROR,
            rank=1023,
            node="n" * 63,
            error="e" * 1024,
            traceback="t" * 8192,
            last_lines=("l" * 400,) * 20,
        )
        command = fail(
            "job-1", 1, cause=cause, collateral=tuple(range(MAX_WORKERS)), reason="r" * 500
        )
        world.propose(command)
        await until(lambda: world.raft.taken, "the entry")

    async def test_a_request_that_is_too_large_is_refused_before_the_log(
        self, world: World
    ) -> None:
        with pytest.raises(InvalidSpec, match="the limit is 32768"):
            await world.propose(submit(name="n" * 40_000))
        assert not world.raft.taken
        task = world.propose(submit("next"))
        await until(lambda: world.raft.taken, "the next entry")
        assert world.entries()[0].settled == world.entries()[0].sequence
        world.apply(world.entries()[0])
        await task
