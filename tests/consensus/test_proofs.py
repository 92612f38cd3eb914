"""Voters whose directory is new: they count for nothing until the log proves them, and found a cluster only with all."""

from __future__ import annotations

import pytest

from distroml.consensus.messages import (
    NO_OP,
    Append,
    AppendReply,
    PreVote,
    ReadEcho,
    ReadProbe,
    RequestVote,
    SnapshotReply,
    TimeoutNow,
    VoteGranted,
    VoteReply,
    decode,
    encode,
)
from distroml.consensus.proofs import PROOF_PAUSE_S, nonces_in, proof
from distroml.consensus.raft_log import (
    AppendRecords,
    LogImage,
    NonceRecord,
    RaftLog,
    RewriteLog,
    apply_record,
    blank_image,
    image_records,
)
from distroml.consensus.raft_types import Role
from distroml.consensus.snapshot import Snapshot
from distroml.consensus.storage import join
from tests.consensus.lone import FIVE, NONCE, THREE, Lone, entries, image

ELSE = NONCE + 1
"""The nonce of another directory."""


def leader(voters: tuple[str, ...] = THREE) -> Lone:
    node = Lone(voters, image=image(3, term=1))
    node.lead()
    return node


def proofs_in(node: Lone) -> list[dict[str, int]]:
    return [named for command, _, _ in node.raft.log.entries if (named := nonces_in(command))]


def last(node: Lone) -> int:
    return int(node.raft.log.last_index)


# ---------------------------------------------------------------------- what a proof is


@pytest.mark.parametrize(
    "command", [NO_OP, NO_OP + b"\xc1", NO_OP + b"\x91\x01", NO_OP + b"\x81\xa1b\xff", b"\x00x"]
)
def test_what_is_no_proof_names_nobody(command: bytes) -> None:
    assert nonces_in(command) == {}


def test_a_proof_names_voters_and_is_an_entry_like_any_other() -> None:
    command = proof({"c": 2, "b": 1})
    assert nonces_in(command) == {"b": 1, "c": 2}
    assert decode(encode(Append(1, 1, 0, 1, [(command, 2, 1)])))
    node = Lone(image=image(3, term=1))
    node.feed("b", Append(1, 3, 1, 4, [(command, 4, 1)]))
    assert node.raft.applied_index == 4
    assert node.raft.apply_failures == 0


def test_messages_of_a_version_without_nonces_are_understood() -> None:
    assert decode(b"\x94\x06\x05\xc3\x09") == AppendReply(5, True, 9)
    assert decode(b"\x92\x04\x05") == VoteGranted(5)


# ---------------------------------------------------------------------- the directory's name


def test_a_new_directory_has_its_nonce_on_disk_before_it_says_anything() -> None:
    node = Lone()
    nonce = node.raft.log.nonce
    assert nonce > 0
    named = LogImage([(NO_OP, 1, 0)], 0, None, False, nonce)
    assert Lone(image=named).raft.log.nonce == nonce, "it outlives the process"
    assert Lone(image=image(3, term=1)).raft.log.nonce == 0, "who is proven needs none"


def test_the_nonce_is_part_of_the_first_turn() -> None:
    node = Lone()
    (op,) = node.first.disk
    assert isinstance(op, AppendRecords)
    assert NonceRecord(node.raft.log.nonce) in op.records


def test_a_directory_keeps_its_nonce_whatever_becomes_of_its_log() -> None:
    held = LogImage([(NO_OP, 1, 0), *entries(2, 9, 1)], 1, None, False, NONCE)
    rebuilt = blank_image()
    for record in image_records(held):
        apply_record(rebuilt, record)
    assert rebuilt == held == held.copy()
    snapshot = Snapshot.take(20, 2, list(THREE), b"")
    assert join(held, snapshot, "here").nonce == NONCE
    log = RaftLog(held.copy())
    log.reset_to(snapshot)
    (_, rewritten) = log.take_ops()
    assert isinstance(rewritten, RewriteLog)
    assert rewritten.image.nonce == NONCE


# ---------------------------------------------------------------------- the leader's side


def test_what_an_unproven_voter_acknowledges_commits_nothing() -> None:
    node = leader()
    committed = node.raft.commit_index
    node.submit(b"x")
    node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    node.turn()
    assert node.raft.commit_index == committed
    assert node.raft.match_index[node.raft.nodes["c"]] == 0
    node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    assert node.raft.next_index[node.raft.nodes["c"]] == last(node) + 1, "and yet it is sent all"
    node.ack("c")
    node.turn()
    assert node.raft.commit_index == last(node), "until it is proven"


def test_what_was_known_of_another_directory_is_forgotten() -> None:
    node = leader()
    node.submit(b"x")
    node.ack("c")
    node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
    peer = node.raft.nodes["c"]
    assert (node.raft.match_index[peer], node.raft.progress[peer].match) == (0, 0)
    node.feed("c", AppendReply(node.raft.term, True, 4, NONCE))
    # An answer that the old directory gave comes late. It counts as far as that had come, and no further.
    node.feed("c", AppendReply(node.raft.term, True, 3))
    assert node.raft.match_index[peer] == 2


def test_an_unproven_voter_is_proven_by_one_entry_after_it_spoke() -> None:
    node = leader()
    before = last(node)
    node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
    assert proofs_in(node) == [{"c": NONCE}]
    assert last(node) == before + 1
    for _ in range(9):
        node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
        node.ack("b")
        node.wait(0.1)
    assert len(proofs_in(node)) == 1
    node.feed("c", AppendReply(node.raft.term, False, 2, ELSE))
    assert proofs_in(node) == [{"c": NONCE}, {"c": ELSE}], "another directory needs another"


def test_a_receiver_of_a_snapshot_is_proven_as_well() -> None:
    node = leader()
    node.feed("c", SnapshotReply(node.raft.term, 9, b"x" * 32, 0, NONCE))
    assert proofs_in(node) == [{"c": NONCE}]


def test_proofs_of_one_voter_keep_a_distance() -> None:
    node = leader()
    node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
    node.feed("c", AppendReply(node.raft.term, False, 2, ELSE))
    node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
    assert len(proofs_in(node)) == 1


def test_a_voter_that_passed_its_proof_without_seeing_it_gets_another() -> None:
    node = leader()
    node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
    node.ack("b")
    node.now += PROOF_PAUSE_S
    for _ in range(2):
        node.feed("c", AppendReply(node.raft.term, True, last(node), NONCE))
    assert len(proofs_in(node)) == 1, "it may see it yet"
    for _ in range(2):
        node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    assert len(proofs_in(node)) == 2
    node.now += PROOF_PAUSE_S
    for _ in range(2):
        node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    assert len(proofs_in(node)) == 2, "the last one is not committed"


def test_a_founder_needs_no_other_proof_than_the_founding_entry() -> None:
    node = Lone()
    node.lead()
    node.feed("c", AppendReply(node.raft.term, False, 2, NONCE))
    assert proofs_in(node) == [node.raft.founders]


def test_an_unproven_voter_is_no_part_of_a_leaders_quorum() -> None:
    node = leader()
    for _ in range(12):
        node.wait(0.1)
        node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    assert node.core.role is Role.FOLLOWER


def test_an_answer_of_an_unproven_voter_needs_a_turn() -> None:
    node = leader()
    node.ack("b")
    assert node.core.receive_heartbeat("b", AppendReply(node.raft.term, True, 4, NONCE)) is None


def test_an_unproven_voter_is_no_successor() -> None:
    node = leader()
    node.ack("c")
    node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    assert node.core.transfer("c") is None
    assert node.core.transfer(None) == "b"


def test_a_read_needs_echoes_of_voters_that_are_proven() -> None:
    node = leader()
    node.feed("c", AppendReply(node.raft.term, True, last(node) + 1, NONCE))
    node.turn(lambda: node.core.request_read(7))
    node.feed("c", ReadEcho(node.raft.term, 1))
    assert node.last.reads == []
    node.feed("b", ReadEcho(node.raft.term, 1))
    assert [token for token, _ in node.last.reads] == [7]


# ---------------------------------------------------------------------- the voter's side


def emptied() -> Lone:
    """Knows nothing but that its directory has the nonce `NONCE`."""
    return Lone(image=LogImage([(NO_OP, 1, 0)], 0, None, False, NONCE))


def test_a_voter_is_proven_by_a_committed_entry_that_names_its_directory() -> None:
    node = emptied()
    proven = (proof({"a": NONCE}), 6, 6)
    reply = node.feed("b", Append(6, 1, 0, 5, [*entries(2, 5, 6), proven]))
    assert reply == [AppendReply(6, True, 7, NONCE)]
    assert not node.raft.log.proven, "it is not committed"
    reply = node.feed("b", Append(6, 6, 6, 7, []))
    assert not node.raft.log.proven, "something is committed that this log lacks"
    reply = node.feed("b", Append(6, 6, 6, 7, entries(7, 7, 6)))
    assert node.raft.log.proven
    assert reply == [AppendReply(6, True, 8)]
    node.now += 0.29
    assert node.feed("b", PreVote(7, 90, 6)) == [VoteReply(7, True, 6)]


def test_a_commit_of_entries_that_were_there_before_proves_nothing() -> None:
    node = emptied()
    node.feed("b", Append(6, 1, 0, 5, entries(2, 5, 6)))
    assert node.raft.commit_index == 5
    assert not node.raft.log.proven


def test_the_proof_of_an_earlier_directory_proves_nothing() -> None:
    node = emptied()
    others = [(proof({"a": ELSE}), 3, 6), (proof({"b": NONCE}), 4, 6)]
    node.feed("b", Append(6, 1, 0, 4, [*entries(2, 2, 6), *others]))
    assert node.raft.commit_index == 4
    assert not node.raft.log.proven


def test_a_proof_counts_once_the_leader_of_this_term_has_committed_an_entry_of_its_own() -> None:
    node = emptied()
    old = [*entries(2, 2, 6), (proof({"a": NONCE}), 3, 6)]
    node.feed("b", Append(7, 1, 0, 3, old))
    assert node.raft.commit_index == 3
    assert not node.raft.log.proven, "another candidate of term 7 may have such a log"
    node.feed("b", Append(7, 3, 6, 4, entries(4, 4, 7)))
    assert node.raft.log.proven


def test_a_founder_is_proven_by_the_founding_entry_alone() -> None:
    node = emptied()
    founded = (proof({"a": NONCE, "b": 5, "c": 6}), 2, 1)
    assert node.feed("b", Append(1, 1, 0, 1, [founded])) == [AppendReply(1, True, 3)]
    assert node.raft.log.proven
    other = emptied()
    other.feed("b", Append(1, 1, 0, 2, [(proof({"a": ELSE, "b": 5, "c": 6}), 2, 1)]))
    assert not other.raft.log.proven, "it founded with a directory that is lost"


def test_an_unproven_voter_vouches_for_no_leader() -> None:
    node = emptied()
    node.feed("b", Append(6, 1, 0, 5, entries(2, 5, 6)))
    assert node.feed("b", ReadProbe(6, 3)) == []
    node.feed("b", Append(6, 5, 6, 6, [(proof({"a": NONCE}), 6, 6)]))
    assert node.feed("b", ReadProbe(6, 3)) == [ReadEcho(6, 3)]


def test_an_unproven_voter_does_not_campaign_when_told_to() -> None:
    node = emptied()
    node.feed("b", Append(1, 1, 0, 1, []))
    node.feed("b", TimeoutNow(1))
    assert node.raft.term == 1


# ---------------------------------------------------------------------- founding


def ask(node: Lone) -> None:
    """Until it has asked for pre-votes and nothing else."""
    node.wait(0.3)
    assert node.raft.pre_vote_term == 1


def test_a_majority_founds_nothing() -> None:
    node = Lone()
    ask(node)
    node.feed("b", VoteReply(1, True, 0, NONCE))
    assert node.core.role is Role.FOLLOWER
    assert "not heard yet" not in node.raft.awaited()
    node.turn(lambda: node.core.set_link("c", False))
    assert node.raft.awaited() == (
        "a new cluster is founded once by all of its voters; not heard yet: c"
    )
    node.feed("c", VoteReply(1, True, 0, ELSE))
    assert node.core.role is Role.CANDIDATE
    node.feed("b", VoteGranted(1, NONCE))
    assert node.core.role is Role.CANDIDATE
    node.feed("c", VoteGranted(1, ELSE))
    assert node.core.role is Role.LEADER
    assert proofs_in(node) == [{"a": node.raft.log.nonce, "b": NONCE, "c": ELSE}]
    assert node.raft.awaited() == ""


def test_a_voter_that_is_proven_founds_nothing() -> None:
    node = Lone()
    ask(node)
    node.feed("b", VoteReply(1, True, 0, NONCE))
    node.feed("c", VoteReply(1, True, 0))
    assert node.core.role is Role.FOLLOWER
    assert node.raft.awaited().startswith(
        "this voter's data directory is new, but not that of c: the cluster exists"
    )


def test_a_founding_vote_counts_only_for_the_directory_of_the_pre_vote() -> None:
    node = Lone()
    ask(node)
    for peer in ("b", "c"):
        node.feed(peer, VoteReply(1, True, 0, NONCE))
    node.feed("b", VoteGranted(1, NONCE))
    node.feed("c", VoteGranted(1, ELSE))
    assert node.core.role is Role.CANDIDATE


def test_votes_of_an_older_round_found_nothing() -> None:
    node = Lone()
    ask(node)
    for peer in ("b", "c"):
        node.feed(peer, VoteReply(1, True, 0, NONCE))
    node.feed("b", VoteGranted(1, NONCE))
    node.wait(1.0)
    assert node.raft.pre_vote_term == 2
    node.feed("c", VoteReply(2, True, 1, ELSE))
    node.feed("c", VoteGranted(1, ELSE))
    assert node.core.role is Role.CANDIDATE


def test_a_blank_voter_helps_to_found_and_is_not_proven_by_that() -> None:
    node = emptied()
    assert node.feed("b", PreVote(1, 1, 0)) == [VoteReply(1, True, 0, NONCE)]
    assert node.feed("b", RequestVote(1, 1, 0, False)) == [VoteGranted(1, NONCE)]
    assert not node.raft.log.proven
    assert node.feed("c", RequestVote(1, 1, 0, False)) == []
    assert node.feed("b", RequestVote(1, 1, 0, False)) == [VoteGranted(1, NONCE)]


def test_a_founder_votes_for_who_can_name_its_directory() -> None:
    node = emptied()
    assert node.feed("b", PreVote(2, 2, 1, ELSE)) == [VoteReply(2, False, 0, NONCE)]
    assert node.feed("b", RequestVote(2, 2, 1, False, ELSE)) == []
    assert node.feed("b", PreVote(3, 2, 1, NONCE)) == [VoteReply(3, True, 2, NONCE)]
    assert node.feed("b", RequestVote(3, 2, 1, False, NONCE)) == [VoteGranted(3, NONCE)]
    assert not node.raft.log.proven, "it does not have the entry yet"


def test_a_founder_back_with_the_founding_entry_counts_founders_only() -> None:
    founded = (proof({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}), 2, 1)
    node = Lone(FIVE, image=LogImage([(NO_OP, 1, 0), founded], 1, "a", True))
    sent = node.wait(0.3)
    assert {message.founded for message in sent if isinstance(message, PreVote)} == {2, 3, 4, 5}
    node.feed("b", VoteReply(2, True, 1, ELSE))
    node.feed("c", VoteReply(2, True, 1, ELSE))
    assert node.core.role is Role.FOLLOWER, "b and c were emptied since"
    node.feed("d", VoteReply(2, True, 1, 4))
    node.feed("e", VoteReply(2, True, 1))
    assert node.core.role is Role.CANDIDATE
    node.feed("b", VoteGranted(2, ELSE))
    node.feed("c", VoteGranted(2, ELSE))
    node.feed("d", VoteGranted(2, 4))
    assert node.core.role is Role.CANDIDATE
    node.feed("e", VoteGranted(2))
    assert node.core.role is Role.LEADER


def test_a_single_voter_founds_its_cluster_itself() -> None:
    node = Lone(("a",))
    assert node.core.role is Role.LEADER
    assert proofs_in(node) == [{"a": node.raft.log.nonce}]
    assert node.raft.log.proven
