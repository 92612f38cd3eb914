"""Learners: they get everything, and they count for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from distroml.consensus.frames import NONCE_BYTES, PROTOCOL_VERSION, Address, Hello, Lane
from distroml.consensus.learner_table import FORGET_S, MAX_LEARNERS, LearnerTable
from distroml.consensus.messages import (
    Append,
    AppendReply,
    PreVote,
    ReadEcho,
    ReadProbe,
    ReadReply,
    ReadRequest,
    RequestVote,
    SnapshotChunk,
    TimeoutNow,
    TransferRequest,
    VoteGranted,
    VoteReply,
)
from distroml.consensus.raft_log import LogImage
from distroml.consensus.raft_types import RaftSettings, Role
from tests.consensus.lone import Lone, entries, image

LEARNS_FROM = ("b", "c", "d")
"""The voters of a cluster in which node a is a learner."""


def leader_with_learner(**options: Any) -> Lone:
    node = Lone(**options)
    node.lead()
    node.turn(lambda: node.core.set_link("x", True))
    return node


# ---------------------------------------------------------------------- the leader's side


def test_a_learner_is_sent_the_log_and_its_answers_commit_nothing() -> None:
    node = leader_with_learner()
    node.ack("c")
    node.feed("x", AppendReply(node.raft.term, True, node.raft.log.last_index + 1))
    turn = node.submit(b"new")
    assert {peer for peer, m in turn.early if isinstance(m, Append) and m.entries} >= {"x"}
    node.feed("x", AppendReply(node.raft.term, True, node.raft.log.last_index + 1))
    assert node.raft.commit_index == node.raft.log.last_index - 1
    node.ack("b")
    assert node.raft.commit_index == node.raft.log.last_index


def test_a_learner_far_behind_gets_a_snapshot() -> None:
    node = leader_with_learner(image=image(200, term=1), settings=RaftSettings(trailing_entries=5))
    node.raft.compact()
    sent = node.feed("x", AppendReply(node.raft.term, False, 2))
    assert sent
    assert all(isinstance(message, SnapshotChunk) for message in sent)


def test_learners_do_not_keep_a_leader_in_office() -> None:
    node = leader_with_learner()
    end = node.now + node.settings.check_quorum_s * 1.5
    while node.now < end:
        node.feed("x", AppendReply(node.raft.term, True, node.raft.log.last_index + 1))
        node.now += node.settings.heartbeat_s
    assert node.core.role is Role.FOLLOWER


def test_learners_do_not_make_a_leader_loyal_to_itself() -> None:
    node = leader_with_learner()
    term = node.raft.term
    node.now += node.settings.election_min_s
    node.feed("x", AppendReply(term, True, node.raft.log.last_index + 1))
    node.feed("c", RequestVote(term + 1, 99, term, False))
    assert node.raft.term == term + 1


@pytest.mark.parametrize(
    "message",
    [
        VoteReply(1, True, 0),
        VoteGranted(1),
        PreVote(9, 99, 9),
        RequestVote(9, 99, 9, True),
        Append(9, 1, 0, 1, []),
        TimeoutNow(1),
        ReadEcho(1, 1),
    ],
)
def test_what_a_learner_has_no_business_to_say_is_refused(message: Any) -> None:
    node = Lone()
    node.turn(lambda: node.core.set_link("x", True))
    node.wait(1.0)
    before, refused = (node.raft.term, node.core.role), node.raft.refused
    assert node.feed("x", message) == []
    assert (node.raft.term, node.core.role) == before
    assert node.raft.refused == refused + 1


def test_a_learner_may_ask_for_a_read_index_and_for_a_new_leader() -> None:
    node = leader_with_learner()
    node.ack("c")
    term = node.raft.term
    node.feed("x", ReadRequest(7))
    nonce = next(m.nonce for peer, m in node.last.messages if isinstance(m, ReadProbe))
    assert not any(peer == "x" for peer, m in node.last.messages if isinstance(m, ReadProbe))
    node.feed("b", ReadEcho(term, nonce))
    assert ("x", ReadReply(7, node.raft.commit_index)) in node.last.messages
    node.feed("x", TransferRequest("c"))
    assert ("c", TimeoutNow(term)) in [*node.last.messages, *node.turn().messages]


def test_a_learner_that_goes_leaves_nothing_behind() -> None:
    node = leader_with_learner()
    node.feed("x", ReadRequest(7))
    (nonce,) = {m.nonce for _, m in node.last.messages if isinstance(m, ReadProbe)}
    node.turn(lambda: node.core.set_link("x", False))
    turn = node.submit(b"more")
    assert "x" not in {peer for peer, _ in turn.messages}
    for table in (node.raft.progress, node.raft.next_index, node.raft.match_index):
        assert {str(known.id) for known in table} == {"b", "c"}
    assert not any(isinstance(m, ReadProbe) for m in node.wait(0.2))
    node.feed("b", ReadEcho(node.raft.term, nonce))
    assert not any(peer == "x" for peer, _ in node.last.messages)


def test_a_new_leader_serves_the_learners_it_knows() -> None:
    node = Lone()
    node.turn(lambda: node.core.set_link("x", True))
    node.lead()
    (append,) = node.feed("x", AppendReply(node.raft.term, False, 2))
    assert isinstance(append, Append)
    assert [index for _, index, _ in append.entries] == [2]


# ---------------------------------------------------------------------- the learner's side


def learner(**options: Any) -> Lone:
    return Lone(LEARNS_FROM, **options)


def test_a_learner_follows_and_says_what_it_is() -> None:
    node = learner()
    assert node.feed("b", Append(3, 1, 0, 3, entries(2, 3, 3))) == [AppendReply(3, True, 4)]
    assert (node.core.role, node.core.leader) == (Role.LEARNER, "b")
    assert node.ledger.entries == [b"x2", b"x3"]


def test_a_learner_never_campaigns_and_knows_no_leader_after_silence() -> None:
    node = learner(image=image(5, term=2))
    node.feed("b", Append(2, 5, 2, 5, []))
    sent = node.wait(5.0)
    assert not any(isinstance(m, (PreVote, RequestVote)) for m in sent)
    assert (node.raft.term, node.core.leader) == (2, None)
    node.feed("b", Append(2, 5, 2, 5, []), TimeoutNow(2))
    assert node.raft.term == 2


def test_what_a_learner_kept_from_its_time_as_a_voter_does_not_stand_in_its_way() -> None:
    node = learner(image=LogImage(entries=image(9, term=4).entries, term=4, vote="a", proven=True))
    node.wait(2.0)
    assert (node.core.role, node.raft.term) == (Role.LEARNER, 4)
    assert node.feed("b", Append(5, 6, 4, 7, entries(7, 7, 5))) == [AppendReply(5, True, 8)]
    assert (node.raft.log.last_index, node.raft.commit_index, node.raft.voted_for) == (7, 7, None)


def test_a_leader_goes_to_the_term_that_a_learner_knows_from_its_time_as_a_voter() -> None:
    node = leader_with_learner()
    term = node.raft.term
    node.feed("x", AppendReply(term + 3, False, 2))
    assert (node.core.role, node.raft.term, node.raft.voted_for) == (
        Role.FOLLOWER,
        term + 3,
        None,
    )


@pytest.mark.parametrize("question", [PreVote(3, 99, 2), RequestVote(3, 99, 2, True)])
def test_a_learner_answers_no_candidate(question: Any) -> None:
    node = learner(image=image(5, term=2))
    assert node.feed("c", question) == []
    assert (node.raft.term, node.raft.voted_for) == (2, None)


def test_a_learner_vouches_for_no_leader() -> None:
    node = learner(image=image(5, term=2))
    node.feed("b", Append(2, 5, 2, 5, []))
    assert node.feed("x", ReadProbe(2, 1)) == []


# ---------------------------------------------------------------------- who is let in


def hello(name: str = "x", at: str = "10.0.0.1:7000") -> Hello:
    return Hello(
        PROTOCOL_VERSION, "c", name, "a", 1, 1, Lane.CONTROL, bytes(NONCE_BYTES), learner_at=at
    )


def test_a_learner_is_dialed_where_it_says_and_only_anew_if_it_moved() -> None:
    table = LearnerTable(lambda name: False)
    assert table.refusal(hello()) is None
    assert table.enter(hello(), 0.0)
    assert table.address("x") == Address("10.0.0.1", 7000)
    assert not table.enter(hello(), 1.0)
    assert table.enter(hello(at="10.0.0.2:7000"), 2.0)


def test_a_second_living_node_of_one_name_is_refused() -> None:
    table = LearnerTable(lambda name: True)
    table.enter(hello(), 0.0)
    assert table.refusal(hello()) is None
    assert table.refusal(hello(at="10.0.0.2:7000")) == "name_taken"


@pytest.mark.parametrize("at", ["", "nowhere", "10.0.0.1:", "10.0.0.1:99999"])
def test_an_address_that_cannot_be_dialed_is_refused(at: str) -> None:
    assert LearnerTable(lambda name: False).refusal(hello(at=at)) == "learner_address"


def test_the_table_is_bounded_and_forgets_who_has_gone() -> None:
    here: set[str] = {"l0"}
    table = LearnerTable(here.__contains__)
    for number in range(MAX_LEARNERS):
        table.enter(hello(f"l{number}"), 0.0)
    assert table.refusal(hello("one more")) == "too_many_learners"
    assert table.refusal(hello("l7")) is None
    gone = table.forgettable(FORGET_S + 1)
    assert len(gone) == MAX_LEARNERS - 1
    assert "l0" not in gone
    for name in gone:
        table.forget(name)
    assert (len(table), "l0" in table, "l1" in table) == (1, True, False)
