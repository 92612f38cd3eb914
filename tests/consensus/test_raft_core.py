"""What `raft_core` adds to the library: linearizable reads (S15) and leadership transfer."""

from __future__ import annotations

import asyncio
import random

import pytest

from distroml.consensus.messages import (
    Append,
    AppendReply,
    Message,
    PreVote,
    ReadEcho,
    ReadProbe,
    ReadReply,
    ReadRequest,
    RequestVote,
    TimeoutNow,
    VoteGranted,
    VoteReply,
)
from distroml.consensus.raft_core import TRANSFER_LIMIT_S, Turn
from distroml.consensus.raft_types import (
    NotLeader,
    Role,
)
from distroml.consensus.read_barriers import ReadBarriers
from tests.consensus.lone import FIVE, Lone, entries, image


def read(node: Lone, token: int = 1) -> Turn:
    return node.turn(lambda: node.core.request_read(token))


def test_a_leaders_entries_go_out_while_it_writes_them_itself() -> None:
    node = Lone()
    node.lead()
    node.ack("c")
    turn = node.submit(b"x")
    assert [peer for peer, m in turn.early if isinstance(m, Append)] == ["b", "c"]
    assert turn.messages == []
    assert node.raft.commit_index < node.raft.log.last_index, "its own copy counts later"


def test_nothing_else_leaves_before_the_disk() -> None:
    follower = Lone(image=image(3, term=1))
    follower.feed("b", Append(1, 3, 1, 3, entries(4, 5, term=1)))
    assert follower.last.disk
    assert follower.last.early == []
    assert [type(m) for _, m in follower.last.messages] == [AppendReply]


def test_a_candidate_asks_for_votes_once_its_own_is_on_disk() -> None:
    node = Lone(image=image(3, term=1))
    node.wait(1.0)
    asked = node.feed("b", VoteReply(2, True, 1))
    assert node.last.disk
    assert (node.last.early, [type(m) for m in asked]) == ([], [RequestVote])


def test_s15_a_read_waits_for_echoes_of_a_majority() -> None:
    node = Lone(FIVE)
    term = node.lead()
    probes = [m for _, m in read(node).messages if isinstance(m, ReadProbe)]
    assert len(probes) == 4
    assert node.last.reads == []
    nonce = probes[0].nonce
    node.feed("b", ReadEcho(term, nonce), ReadEcho(term, nonce))
    node.feed("mallory", ReadEcho(term, nonce))
    node.feed("c", ReadEcho(term - 1, nonce), ReadEcho(term, nonce - 1))
    assert node.last.reads == []
    node.feed("c", ReadEcho(term, nonce))
    assert node.last.reads == [(1, node.raft.commit_index)]


def test_s15_a_new_leader_answers_no_read_before_its_own_entry_is_committed() -> None:
    node = Lone(image=image(9, term=1))
    node.wait(1.0)
    node.feed("b", VoteReply(2, True, 1))
    node.feed("b", VoteGranted(2))
    assert node.core.role is Role.LEADER
    assert not any(isinstance(m, ReadProbe) for _, m in read(node).messages)
    node.ack("b")
    probes = [m for _, m in node.turn().messages if isinstance(m, ReadProbe)]
    probes += [m for m in node.wait(0.1) if isinstance(m, ReadProbe)]
    assert probes


def test_a_deposed_leader_refuses_its_reads() -> None:
    node = Lone()
    term = node.lead()
    read(node, token=5)
    node.feed("b", AppendReply(term + 1, False, 1))
    assert node.last.reads == [(5, 0)]


def test_a_follower_asks_the_leader() -> None:
    node = Lone()
    assert read(node, token=1).reads == [(1, 0)]
    node.feed("b", Append(1, 1, 0, 1, []))
    assert ("b", ReadRequest(2)) in read(node, token=2).messages
    node.feed("c", ReadReply(2, 77))
    assert node.last.reads == [], "only the asked node may answer"
    node.feed("b", ReadReply(2, 77))
    assert node.last.reads == [(2, 77)]
    read(node, token=3)
    node.turn(lambda: node.core.set_link("b", False))
    assert node.last.reads == [(3, 0)]


def test_what_a_follower_asked_before_its_link_broke_is_not_answered_to_its_next_life() -> None:
    node = Lone()
    term = node.lead()
    node.feed("c", ReadRequest(1))
    nonce = next(m.nonce for _, m in node.last.messages if isinstance(m, ReadProbe))
    node.turn(lambda: (node.core.set_link("c", False), node.core.set_link("c", True)))
    node.feed("b", ReadEcho(term, nonce))
    assert not any(isinstance(m, ReadReply) for _, m in node.last.messages)


def test_reads_of_two_lives_have_different_names() -> None:
    lives = [ReadBarriers(random.Random(seed)) for seed in range(2)]

    async def ask() -> set[int]:
        return {life.ask()[0] for life in lives for _ in range(100)}

    assert len(asyncio.run(ask())) == 200


def test_a_probe_is_echoed_only_in_its_own_term() -> None:
    node = Lone(image=image(3, term=4))
    assert node.feed("b", ReadProbe(4, 9)) == [ReadEcho(4, 9)]
    assert node.feed("b", ReadProbe(3, 9)) == []
    assert node.feed("b", ReadProbe(5, 9)) == []


def test_transfer_waits_until_the_successor_has_everything() -> None:
    node = Lone()
    term = node.lead()
    node.ack("c")
    node.submit(b"x")
    turn = node.turn(lambda: node.core.transfer("c"))
    assert not any(isinstance(m, TimeoutNow) for _, m in turn.messages)
    with pytest.raises(NotLeader, match="'c'"):
        node.core.check_append(b"y")
    node.ack("c")
    assert ("c", TimeoutNow(term)) in node.last.messages


def test_a_successor_that_does_not_take_over_is_given_up() -> None:
    node = Lone()
    node.lead()
    node.ack("c")
    node.turn(lambda: node.core.transfer("c"))
    with pytest.raises(NotLeader, match="'c'"):
        node.core.check_append(b"y")
    end = node.now + TRANSFER_LIMIT_S * 1.1
    while node.now < end:
        node.now += node.settings.heartbeat_s
        node.ack("b")
        node.ack("c")
    node.core.check_append(b"y")
    assert node.core.role is Role.LEADER


def test_only_the_current_leader_can_make_a_node_campaign() -> None:
    node = Lone(image=image(3, term=1))
    node.feed("b", Append(1, 3, 1, 3, []))
    node.feed("c", TimeoutNow(1))
    assert node.raft.term == 1
    sent = node.feed("b", TimeoutNow(1))
    assert node.raft.term == 2
    assert sent == [RequestVote(2, 3, 1, True)]


# ---------------------------------------------------------------------- heartbeats between turns


def follower() -> Lone:
    """Follows b in term 2, with entries up to 9 of which 7 are committed."""
    node = Lone(image=image(9, term=1))
    node.feed("b", Append(2, 9, 1, 7, []))
    return node


def test_a_heartbeat_without_news_is_answered_at_once_and_keeps_the_follower_loyal() -> None:
    node = follower()
    node.now += 0.2
    assert node.core.receive_heartbeat("b", Append(2, 9, 1, 7, [])) == [AppendReply(2, True, 10)]
    assert node.raft.election_deadline >= node.now + node.settings.election_min_s
    assert node.raft.heard_leader_at == node.now
    node.now += node.settings.election_min_s * 0.8
    assert node.feed("c", PreVote(3, 99, 2)) == [VoteReply(3, False, 2)]


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ("b", Append(2, 9, 1, 7, [(b"\x00x", 10, 2)])),
        ("b", Append(3, 9, 1, 7, [])),
        ("b", Append(1, 9, 1, 7, [])),
        ("b", Append(2, 9, 1, 8, [])),
        ("b", Append(2, 10, 2, 7, [])),
        ("b", Append(2, 9, 2, 7, [])),
        ("c", Append(2, 9, 1, 7, [])),
        ("a", Append(2, 9, 1, 7, [])),
        ("mallory", Append(2, 9, 1, 7, [])),
        ("b", VoteReply(3, True, 2)),
    ],
)
def test_what_brings_news_to_a_follower_needs_a_turn(peer: str, message: Message) -> None:
    node = follower()
    deadline = node.raft.election_deadline
    node.now += 0.1
    assert node.core.receive_heartbeat(peer, message) is None
    assert (node.raft.election_deadline, node.raft.term) == (deadline, 2)


def test_a_voter_that_has_not_caught_up_learns_from_a_turn_that_it_has() -> None:
    node = Lone(image=image(9, term=1, proven=False))
    node.feed("b", Append(2, 9, 1, 7, []))
    assert not node.raft.log.proven
    assert node.core.receive_heartbeat("b", Append(2, 9, 1, 7, [])) is None


def test_an_acknowledgement_without_news_only_says_that_its_sender_lives() -> None:
    node = Lone()
    term, last = node.lead(), node.raft.log.last_index
    node.now += 0.5
    assert node.core.receive_heartbeat("b", AppendReply(term, True, last + 1)) == []
    node.wait(node.settings.check_quorum_s - 0.1)
    assert node.core.role is Role.LEADER
    node.wait(0.3)
    assert node.core.role is Role.FOLLOWER


def test_what_brings_news_to_a_leader_needs_a_turn() -> None:
    node = Lone()
    term, last = node.lead(), node.raft.log.last_index
    needs_a_turn = [
        ("b", AppendReply(term, False, last + 1)),
        ("b", AppendReply(term + 1, True, last + 1)),
        ("b", AppendReply(term - 1, True, last + 1)),
        ("c", AppendReply(term, True, last + 1)),  # is still probed
        ("mallory", AppendReply(term, True, last + 1)),
    ]
    for peer, reply in needs_a_turn:
        assert node.core.receive_heartbeat(peer, reply) is None, (peer, reply)
    node.submit(b"new")
    assert node.core.receive_heartbeat("b", AppendReply(term, True, last + 2)) is None
