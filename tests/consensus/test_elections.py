"""Elections, hazards S8 and L4: who may campaign, who gets a vote, and who never does."""

from __future__ import annotations

from distroml.consensus.messages import (
    Append,
    PreVote,
    RequestVote,
    TimeoutNow,
    VoteGranted,
    VoteReply,
)
from distroml.consensus.raft_log import LogImage
from distroml.consensus.raft_types import (
    Role,
)
from tests.consensus.lone import FIVE, Lone, entries, image


def test_s8_a_voter_counts_once_and_strangers_never() -> None:
    node = Lone(FIVE, image=image(3, term=1))
    node.wait(1.0)
    node.feed("b", VoteReply(2, True, 1), VoteReply(2, True, 1))
    assert node.raft.term == 1, "one peer's pre-vote, twice, is not a majority of five"
    node.feed("c", VoteReply(2, True, 1))
    assert node.core.role is Role.CANDIDATE
    node.feed("b", VoteGranted(2), VoteGranted(2))
    node.feed("mallory", VoteGranted(2))
    node.feed("a", VoteGranted(2))
    assert node.core.role is Role.CANDIDATE
    node.feed("d", VoteGranted(2))
    assert node.core.role is Role.LEADER


def test_l4_a_node_that_nobody_supports_raises_no_term() -> None:
    node = Lone()
    sent = node.wait(5.0)
    assert {type(message) for message in sent} == {PreVote}
    assert node.raft.term == 0
    assert node.core.role is Role.FOLLOWER


def test_l4_a_voter_is_loyal_to_a_leader_it_hears() -> None:
    node = Lone(image=image(3, term=1))
    node.feed("b", Append(1, 3, 1, 3, []))
    assert node.feed("c", PreVote(2, 9, 1)) == [VoteReply(2, False, 1)]
    assert node.feed("c", RequestVote(2, 9, 1, False)) == []
    assert node.raft.term == 1
    node.now += 0.29
    assert node.feed("c", PreVote(2, 9, 1)) == [VoteReply(2, True, 1)]


def test_l4_a_broken_connection_ends_loyalty() -> None:
    node = Lone(image=image(3, term=1))
    node.feed("b", Append(1, 3, 1, 3, []))
    node.turn(lambda: node.core.set_link("b", False))
    assert node.last.wake_at <= node.now + node.settings.link_loss_election_s
    assert node.feed("c", PreVote(2, 9, 1)) == [VoteReply(2, True, 1)]


def test_of_two_equal_candidates_at_once_only_the_first_by_name_goes_on() -> None:
    first = Lone(image=image(3, term=1))
    while first.raft.pre_vote_term is None:
        first.now = first.last.wake_at + 1e-4
        first.turn()
    assert first.feed("b", PreVote(2, 3, 1)) == [VoteReply(2, False, 1)]
    assert first.feed("b", PreVote(2, 4, 1)) == [VoteReply(2, True, 1)], "a longer log is no rival"
    first.now += 0.1
    assert VoteReply(2, True, 1) in first.feed("b", PreVote(2, 3, 1)), "only in the same moment"


def test_who_has_just_supported_another_lets_it_have_its_election() -> None:
    node = Lone(image=image(3, term=1))
    node.feed("b", PreVote(2, 3, 1))
    assert node.last.wake_at >= node.now + node.settings.pre_vote_retry_s / 2


def test_l4_refusals_carry_the_term_so_that_the_slow_catch_up() -> None:
    node = Lone(image=image(3, term=5))
    assert node.feed("c", RequestVote(2, 9, 5, False)) == [VoteReply(2, False, 5)]
    node.feed("c", VoteReply(6, False, 9))
    assert node.raft.term == 9


def test_l4_a_leader_with_a_live_quorum_ignores_a_higher_vote_request() -> None:
    node = Lone()
    term = node.lead()
    node.feed("c", RequestVote(term + 1, 99, term, False))
    assert node.core.role is Role.LEADER
    node.feed("c", RequestVote(term + 1, 99, term, True))
    assert node.core.role is Role.FOLLOWER, "unless a transfer was asked for"


def test_check_quorum_deposes_a_leader_that_nobody_answers() -> None:
    node = Lone()
    node.lead()
    node.wait(node.settings.check_quorum_s * 1.2)
    assert node.core.role is Role.FOLLOWER
    assert node.core.leader is None


def test_a_log_behind_gets_no_vote() -> None:
    node = Lone(image=image(5, term=2))
    assert node.feed("b", PreVote(3, 4, 2)) == [VoteReply(3, False, 2)]
    assert node.feed("b", RequestVote(3, 9, 1, False)) == []
    assert node.raft.voted_for is None


def test_a_vote_is_on_disk_before_it_is_told_and_given_once_per_term() -> None:
    node = Lone(image=image(3, term=1))
    assert node.feed("b", RequestVote(2, 3, 1, False)) == [VoteGranted(2)]
    assert node.last.disk != []
    assert node.feed("c", RequestVote(2, 3, 1, False)) == []
    assert node.feed("b", RequestVote(2, 3, 1, False)) == [VoteGranted(2)], (
        "a lost answer is repeated"
    )


def test_a_vote_survives_a_restart() -> None:
    voted = LogImage([(b"\x01", 1, 0), *entries(2, 3, 1)], 2, "b", True)
    node = Lone(image=voted)
    assert node.feed("c", RequestVote(2, 3, 1, False)) == []
    assert node.feed("b", RequestVote(2, 3, 1, False)) == [VoteGranted(2)]


def test_a_single_voter_elects_itself_at_once_but_commits_only_what_is_durable() -> None:
    node = Lone(("a",))
    assert node.core.role is Role.LEADER
    assert node.raft.commit_index < node.raft.log.last_index
    assert node.last.again
    node.turn()
    assert node.raft.commit_index == node.raft.log.last_index


# ---------------------------------------------------------------------- forgetful voters


def test_a_voter_that_lost_its_directory_helps_nobody_that_has_a_log() -> None:
    node = Lone()
    nonce = node.raft.log.nonce
    assert node.feed("b", PreVote(6, 90, 5)) == [VoteReply(6, False, 0, nonce)]
    assert node.feed("b", RequestVote(6, 90, 5, False)) == []
    assert node.raft.voted_for is None
    assert not node.raft.log.proven


def test_a_forgetful_voter_with_half_a_log_does_not_campaign() -> None:
    node = Lone(image=image(4, term=6, proven=False))
    assert node.wait(3.0) == []
    node.feed("b", TimeoutNow(6))
    assert node.raft.term == 6
