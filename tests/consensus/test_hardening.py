"""One directed test per hazard of `hardening.py`: each fails if the override is taken away.

Most drive a single core by hand: messages in, messages out, a clock that only we move.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus import hardening
from distroml.consensus.hardening import check_library
from distroml.consensus.messages import (
    Append,
    AppendReply,
    BadMessage,
    Message,
    PreVote,
    ReadEcho,
    ReadProbe,
    ReadReply,
    ReadRequest,
    RequestVote,
    SnapshotChunk,
    SnapshotReply,
    TimeoutNow,
    VoteGranted,
    VoteReply,
    decode,
    encode,
)
from distroml.consensus.raft_core import RaftCore, Turn
from distroml.consensus.raft_log import LogImage, blank_image
from distroml.consensus.raft_types import (
    EntryTooLarge,
    NotLeader,
    RaftSettings,
    Role,
    SafetyViolation,
    UnsafeLibrary,
)
from distroml.consensus.snapshot import Snapshot
from distroml.consensus.storage import Recovered
from tests.consensus.simulator import Cluster, Ledger, Nemesis

THREE = ("a", "b", "c")
FIVE = ("a", "b", "c", "d", "e")


class Lone:
    """One core, node a, whose peers are played by the test."""

    def __init__(
        self,
        voters: tuple[str, ...] = THREE,
        *,
        image: LogImage | None = None,
        snapshot: Snapshot | None = None,
        settings: RaftSettings | None = None,
    ) -> None:
        self.now = 100.0
        self.ledger = Ledger()
        self.settings = settings or RaftSettings()
        self.core = RaftCore(
            name="a",
            voters=voters,
            settings=self.settings,
            machine=self.ledger,
            recovered=Recovered(image or blank_image(), snapshot, []),
            clock=lambda: self.now,
            rng=random.Random(7),
        )
        self.last: Turn = self.turn(
            lambda: [self.core.set_link(p, True) for p in voters if p != "a"]
        )

    @property
    def raft(self) -> Any:
        return self.core.raft

    @property
    def indexes(self) -> list[tuple[int, int]]:
        return [(index, term) for _, index, term in self.raft.log.entries]

    def turn(self, action: Any = None) -> Turn:
        self.core.begin()
        if action is not None:
            action()
        self.last = self.core.finish_turn()
        return self.last

    def wait(self, seconds: float) -> list[Message]:
        """Turns at the times the core asks for, until `seconds` have passed."""
        sent: list[Message] = []
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, max(self.now + 1e-4, self.last.wake_at))
            sent += [message for _, message in self.turn().messages]
        return sent

    def feed(self, peer: str, *messages: Message) -> list[Message]:
        """Delivers messages in one turn; returns what is sent back to that peer."""

        def deliver() -> None:
            for message in messages:
                self.core.receive(peer, decode(encode(message)))

        return [message for to, message in self.turn(deliver).messages if to == peer]

    def lead(self) -> int:
        """Wins an election with b's vote and commits the no-op; returns the term."""
        self.wait(self.settings.election_max_s)
        for _ in range(50):
            if self.raft.pre_vote_term == self.raft.term + 1:
                break
            self.wait(0.05)
        supporters = self.raft.voters[1 : len(self.raft.voters) // 2 + 1]
        for peer in supporters:
            self.feed(peer, VoteReply(self.raft.term + 1, True, self.raft.term))
        for peer in supporters:
            self.feed(peer, VoteGranted(self.raft.term))
        assert self.core.role is Role.LEADER
        for peer in supporters:
            self.ack(peer)
        self.turn()
        assert self.raft.commit_index == self.raft.log.last_index
        return int(self.raft.term)

    def ack(self, peer: str) -> None:
        self.feed(peer, AppendReply(self.raft.term, True, self.raft.log.last_index + 1))

    def submit(self, *entries: bytes) -> Turn:
        return self.turn(lambda: [self.core.submit(entry) for entry in entries])


def entries(first: int, last: int, term: int, text: bytes = b"x") -> list[tuple[bytes, int, int]]:
    return [(b"\x00%s%d" % (text, index), index, term) for index in range(first, last + 1)]


def image(last: int, term: int, *, proven: bool = True) -> LogImage:
    """A log of entries 2..last, all of `term`."""
    return LogImage([(b"\x01", 1, 0), *entries(2, last, term)], term, None, proven)


# ---------------------------------------------------------------------- the library itself


def test_another_library_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "syncobj.py"
    source.write_text(Path(hardening.library.__file__).read_text() + "\n# patched\n")
    with pytest.raises(UnsafeLibrary, match=r"is not the PySyncObj 0\.3\.17.*Install pysyncobj==0"):
        check_library(source)
    check_library()


def test_a_wrong_library_keeps_a_node_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    hardening.adopt_library.cache_clear()
    monkeypatch.setattr(hardening, "LIBRARY_SHA256", "0" * 64)
    with pytest.raises(UnsafeLibrary):
        Lone()
    hardening.adopt_library.cache_clear()


# ---------------------------------------------------------------------- the follower's log


def chunks(snapshot: Snapshot, term: int, size: int = 4) -> list[SnapshotChunk]:
    return [
        SnapshotChunk(
            term,
            snapshot.index,
            snapshot.term,
            snapshot.sha256,
            len(snapshot.blob),
            offset,
            snapshot.blob[offset : offset + size],
        )
        for offset in range(0, len(snapshot.blob), size)
    ]


def ledger_blob(*items: bytes) -> bytes:
    ledger = Ledger()
    for index, item in enumerate(items):
        ledger.apply(index, item)
    return ledger.snapshot()


def test_s1_a_snapshot_chunk_commits_nothing_by_itself() -> None:
    node = Lone(image=image(6, term=1))
    snapshot = Snapshot.take(40, 2, list(THREE), ledger_blob(b"one", b"two"))
    first = chunks(snapshot, term=2)[0]
    replies = node.feed("b", first)
    assert node.raft.commit_index == 1
    assert node.ledger.entries == []
    assert replies == [SnapshotReply(2, 40, snapshot.sha256, 4)]


def test_s9_a_whole_snapshot_replaces_state_and_is_acknowledged_once() -> None:
    node = Lone(image=image(6, term=1))
    snapshot = Snapshot.take(40, 2, list(THREE), ledger_blob(b"one", b"two"))
    replies = node.feed("b", *chunks(snapshot, term=2))
    assert replies[-1] == AppendReply(2, True, 41)
    assert node.ledger.entries == [b"one", b"two"]
    assert node.indexes == [(40, 2)]
    assert (node.raft.commit_index, node.raft.applied_index) == (40, 40)


def test_s9_chunks_of_different_snapshots_or_a_wrong_hash_install_nothing() -> None:
    node = Lone(image=image(6, term=1))
    one = chunks(Snapshot.take(40, 2, list(THREE), b"aaaabbbb"), term=2)
    two = chunks(Snapshot.take(41, 2, list(THREE), b"ccccdddd"), term=2)
    node.feed("b", one[0], two[1], one[1])
    forged = [msgspec.structs.replace(chunk, sha256=bytes(32)) for chunk in one]
    replies = node.feed("b", *forged)
    assert not any(isinstance(reply, AppendReply) for reply in replies)
    assert node.raft.commit_index == 1


def test_s9_an_older_snapshot_never_rolls_back() -> None:
    node = Lone(image=image(6, term=1))
    node.feed("b", Append(1, 6, 1, 6, []))
    assert node.raft.applied_index == 6
    before = list(node.ledger.entries)
    replies = node.feed("b", *chunks(Snapshot.take(4, 1, list(THREE), b"oldstate"), term=1))
    assert node.ledger.entries == before
    assert replies[-1] == AppendReply(1, True, 7)


def test_a_snapshot_that_the_machine_refuses_is_not_acknowledged() -> None:
    node = Lone(image=image(6, term=1))
    replies = node.feed("b", *chunks(Snapshot.take(40, 2, list(THREE), b"not msgpack"), term=2))
    assert not any(isinstance(reply, AppendReply) for reply in replies)
    assert node.raft.log.last_index == 6


def test_s6_a_delayed_append_truncates_nothing_that_matches() -> None:
    node = Lone(image=image(9, term=1))
    replies = node.feed("b", Append(1, 2, 1, 1, entries(3, 4, 1)))
    assert node.raft.log.last_index == 9
    assert replies == [AppendReply(1, True, 5)]
    assert node.last.disk == []


def test_s6_commit_stops_at_what_the_message_verified() -> None:
    node = Lone(image=image(9, term=1))
    node.feed("b", Append(2, 4, 1, 9, []))
    assert node.raft.commit_index == 4


def test_a_real_conflict_is_replaced_by_the_leaders_entries() -> None:
    node = Lone(image=image(9, term=1))
    node.feed("b", Append(3, 5, 1, 1, entries(6, 7, 3)))
    assert node.indexes[-3:] == [(5, 1), (6, 3), (7, 3)]


def test_a_leader_that_contradicts_a_committed_entry_stops_the_node() -> None:
    node = Lone(image=image(9, term=1))
    node.feed("b", Append(1, 9, 1, 9, []))
    with pytest.raises(SafetyViolation, match="contradicts committed entry 6"):
        node.feed("c", Append(3, 5, 1, 1, entries(6, 7, 3)))


def test_entries_below_the_anchor_are_known_already() -> None:
    snapshot = Snapshot.take(20, 1, list(THREE), ledger_blob())
    anchored = LogImage([(b"\x01", 20, 1), *entries(21, 22, 1)], 1, None, True)
    node = Lone(image=anchored, snapshot=snapshot)
    replies = node.feed("b", Append(1, 15, 1, 23, entries(16, 23, 1)))
    assert replies == [AppendReply(1, True, 24)]
    assert node.indexes == [(20, 1), (21, 1), (22, 1), (23, 1)]
    assert node.feed("b", Append(1, 3, 1, 3, entries(4, 5, 1))) == [AppendReply(1, True, 21)]


def test_l3_a_conflict_is_skipped_by_whole_terms() -> None:
    node = Lone(image=image(500, term=1))
    replies = node.feed("b", Append(3, 400, 2, 1, []))
    assert replies == [AppendReply(3, False, 2)]
    assert node.feed("b", Append(3, 900, 2, 1, [])) == [AppendReply(3, False, 501)]


def test_an_append_of_an_older_term_is_answered_with_ours() -> None:
    node = Lone(image=image(5, term=4))
    replies = node.feed("b", Append(3, 5, 3, 5, []))
    assert replies == [AppendReply(4, False, 6)]
    assert node.core.leader is None


# ---------------------------------------------------------------------- apply


def test_s10_l2_an_entry_that_raises_counts_as_empty_and_is_passed_once() -> None:
    node = Lone(image=image(4, term=1))
    calls: list[int] = []

    def apply(index: int, entry: bytes) -> None:
        calls.append(index)
        if index == 3:
            raise ValueError("a defect in one command")

    node.ledger.apply = apply  # type: ignore[method-assign]
    node.feed("b", Append(1, 4, 1, 4, []))
    node.turn()
    assert calls == [2, 3, 4]
    assert node.raft.applied_index == 4
    assert node.raft.apply_failures == 1


def test_running_out_of_memory_in_apply_stops_the_node() -> None:
    node = Lone(image=image(4, term=1))

    def apply(index: int, entry: bytes) -> None:
        raise MemoryError

    node.ledger.apply = apply  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        node.feed("b", Append(1, 4, 1, 4, []))


def test_a_long_replay_is_cut_into_turns() -> None:
    node = Lone(image=image(3000, term=1))
    node.feed("b", Append(1, 3000, 1, 3000, []))
    assert node.raft.applied_index == 1 + hardening.APPLY_PER_TURN
    turns = 0
    while node.last.again:
        node.turn()
        turns += 1
    assert node.raft.applied_index == 3000
    assert turns == 2


# ---------------------------------------------------------------------- the leader's side


def test_s7_an_acknowledgement_of_another_term_does_not_count() -> None:
    node = Lone(FIVE)
    term = node.lead()
    node.submit(b"x")
    matched = dict(node.raft.match_index)
    node.feed("d", AppendReply(term - 1, True, node.raft.log.last_index + 1))
    assert node.raft.match_index == matched
    node.feed("d", AppendReply(term, True, node.raft.log.last_index + 5))
    assert node.raft.match_index == matched, "an answer beyond our own log proves nothing"


def test_a_reply_with_a_higher_term_deposes() -> None:
    node = Lone()
    term = node.lead()
    node.feed("c", AppendReply(term + 3, False, 1))
    assert node.core.role is Role.FOLLOWER
    assert node.raft.term == term + 3


def test_l1_two_rejections_in_flight_do_not_undo_each_other() -> None:
    node = Lone(image=image(50, term=1))
    term = node.lead()
    last = node.raft.log.last_index
    node.feed("c", AppendReply(term, False, 10), AppendReply(term, False, last + 1))
    assert node.raft.next_index[node.raft.nodes["c"]] == 10
    node.feed("c", AppendReply(term, True, 21))
    node.feed("c", AppendReply(term, False, 5))
    assert node.raft.next_index[node.raft.nodes["c"]] >= 21, "never below what is known to match"


def test_l3_a_rejected_follower_is_probed_in_the_same_turn() -> None:
    node = Lone(image=image(50, term=1))
    term = node.lead()
    replies = node.feed("c", AppendReply(term, False, 10))
    assert [reply.prev_index for reply in replies if isinstance(reply, Append)] == [9]


def test_p2_entries_leave_in_the_turn_in_which_they_came() -> None:
    node = Lone()
    node.lead()
    node.ack("c")
    turn = node.submit(b"x", b"y")
    appends = {peer: m for peer, m in turn.messages if isinstance(m, Append)}
    assert sorted(appends) == ["b", "c"]
    assert [command for command, _, _ in appends["b"].entries] == [b"\x00x", b"\x00y"]
    assert turn.disk != []


def test_p2_a_new_commit_index_is_told_at_once() -> None:
    node = Lone()
    node.lead()
    node.ack("c")
    node.submit(b"x")
    node.feed("b", AppendReply(node.raft.term, True, node.raft.log.last_index + 1))
    told = [m for _, m in node.last.messages if isinstance(m, Append)]
    assert {m.commit_index for m in told} == {node.raft.log.last_index}


def compacted_leader(**changes: Any) -> Lone:
    node = Lone(image=image(200, term=1), settings=RaftSettings(trailing_entries=10, **changes))
    node.lead()
    node.raft.compact()
    node.turn()
    return node


def test_l7_compaction_keeps_a_window_for_followers_a_little_behind() -> None:
    node = compacted_leader()
    applied = node.raft.applied_index
    assert node.raft.log.anchor_index == applied - 10
    sent = node.feed("c", AppendReply(node.raft.term, False, applied - 5))
    assert [type(message) for message in sent] == [Append]
    sent = node.feed("c", AppendReply(node.raft.term, False, applied - 50))
    assert all(isinstance(message, SnapshotChunk) for message in sent)
    assert sent


def test_p1_a_follower_that_needs_a_snapshot_costs_a_bounded_number_of_messages() -> None:
    node = compacted_leader(snapshot_chunk_bytes=16, snapshot_window_chunks=4)
    node.feed("c", AppendReply(node.raft.term, False, 2))
    for _ in range(20):
        node.submit(b"more")
    sent = [m for m in node.wait(node.settings.heartbeat_s * 3) if isinstance(m, SnapshotChunk)]
    assert len(sent) <= 4


def test_p5_x1_only_capped_entries_of_our_own_bytes_enter_the_log() -> None:
    node = Lone()
    node.lead()
    with pytest.raises(EntryTooLarge, match="32769 bytes exceeds the limit of 32768"):
        node.core.check_append(bytes(32 * 1024 + 1))
    node.core.check_append(bytes(32 * 1024))


@pytest.mark.parametrize("command", [b"\x02add", b"\x03version", b"\x80\x02pickle", b"\xff"])
def test_s13_s14_other_kinds_of_commands_are_refused_on_the_wire(command: bytes) -> None:
    with pytest.raises(BadMessage, match="unknown command type"):
        decode(encode(Append(1, 1, 0, 1, [(command, 2, 1)])))


@pytest.mark.parametrize(
    "append",
    [
        Append(2, 5, 1, 1, [(b"\x00", 7, 1)]),
        Append(2, 5, 1, 1, [(b"\x00", 6, 3)]),
        Append(2, 5, 2, 1, [(b"\x00", 6, 1)]),
        Append(2, 5, 1, 1, [(b"\x00", 6, 2), (b"\x00", 8, 2)]),
    ],
)
def test_entries_that_do_not_follow_each_other_are_refused(append: Append) -> None:
    with pytest.raises(BadMessage, match="does not follow"):
        decode(encode(append))


@given(st.binary(max_size=80))
def test_rubbish_is_a_bad_message_and_nothing_else(body: bytes) -> None:
    try:
        decode(body)
    except BadMessage:
        return


def test_only_the_leader_accepts_entries() -> None:
    node = Lone()
    with pytest.raises(NotLeader) as refused:
        node.core.check_append(b"x")
    assert refused.value.leader is None
    node.feed("b", Append(1, 1, 0, 1, []))
    with pytest.raises(NotLeader, match="the leader is 'b'"):
        node.core.check_append(b"x")
    node.submit(b"x")
    assert node.raft.log.last_index == 1


# ---------------------------------------------------------------------- elections


def test_s8_a_voter_counts_once_and_strangers_never() -> None:
    node = Lone(FIVE)
    node.wait(1.0)
    node.feed("b", VoteReply(1, True, 0), VoteReply(1, True, 0))
    assert node.raft.term == 0, "one peer's pre-vote, twice, is not a majority of five"
    node.feed("c", VoteReply(1, True, 0))
    assert node.core.role is Role.CANDIDATE
    node.feed("b", VoteGranted(1), VoteGranted(1))
    node.feed("mallory", VoteGranted(1))
    assert node.core.role is Role.CANDIDATE
    node.feed("d", VoteGranted(1))
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
    assert node.feed("c", PreVote(2, 9, 1)) == [VoteReply(2, True, 1)]
    assert node.last.wake_at <= node.now + node.settings.link_loss_election_s


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
    assert node.feed("b", PreVote(6, 90, 5)) == [VoteReply(6, False, 0)]
    assert node.feed("b", RequestVote(6, 90, 5, False)) == []
    assert node.raft.voted_for is None
    assert not node.raft.log.proven


def test_it_votes_again_once_it_holds_what_its_leader_has_committed() -> None:
    node = Lone()
    node.feed("b", Append(6, 1, 0, 1, entries(2, 5, 6)))
    assert not node.raft.log.proven, "a commit index of an older term proves nothing"
    node.feed("b", Append(6, 5, 6, 7, []))
    assert not node.raft.log.proven
    node.feed("b", Append(6, 5, 6, 7, entries(6, 7, 6)))
    assert node.raft.log.proven
    node.now += 0.29
    assert node.feed("b", PreVote(7, 90, 6)) == [VoteReply(7, True, 6)]


def test_a_forgetful_voter_with_half_a_log_does_not_campaign() -> None:
    node = Lone(image=image(4, term=6, proven=False))
    assert node.wait(3.0) == []
    node.feed("b", TimeoutNow(6))
    assert node.raft.term == 6


def test_in_a_new_cluster_blank_voters_found_it_together() -> None:
    node = Lone()
    assert node.feed("b", PreVote(1, 1, 0)) == [VoteReply(1, True, 0)]
    assert node.feed("b", RequestVote(1, 1, 0, False)) == [VoteGranted(1)]
    assert node.raft.log.proven


# ---------------------------------------------------------------------- reads and transfer


def read(node: Lone, token: int = 1) -> Turn:
    return node.turn(lambda: node.core.request_read(token))


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


def test_only_the_current_leader_can_make_a_node_campaign() -> None:
    node = Lone(image=image(3, term=1))
    node.feed("b", Append(1, 3, 1, 3, []))
    node.feed("c", TimeoutNow(1))
    assert node.raft.term == 1
    sent = node.feed("b", TimeoutNow(1))
    assert node.raft.term == 2
    assert sent == [RequestVote(2, 3, 1, True)]


# ---------------------------------------------------------------------- whole clusters, simulated


def test_l1_a_divergent_follower_far_behind_catches_up() -> None:
    """The schedule that livelocked the library: a conflicting tail, and several batches missing."""
    cluster = Cluster(1, settings=RaftSettings(append_batch_bytes=4096))
    old = cluster.elect()
    cluster.isolate(old.name)
    cluster.submit(b"lost", old.name)
    cluster.run(0.02)
    assert old.raft.log.last_index > old.raft.commit_index

    def replaced() -> bool:
        leader = cluster.leader()
        return leader is not None and leader.name != old.name

    assert cluster.run_until(replaced)
    cluster.elect()
    for number in range(60):
        assert cluster.submit(b"%03d" % number + bytes(1000))
    cluster.run(1.5)
    cluster.heal()
    newest = cluster.leader()
    assert newest is not None
    assert cluster.run_until(lambda: old.raft.commit_index == newest.raft.log.last_index, 2.0)
    assert b"lost" not in old.ledger.known
    cluster.run(0.1)
    cluster.check_converged()


def test_a_partitioned_node_disturbs_nobody_when_it_returns() -> None:
    cluster = Cluster(2)
    leader = cluster.elect()
    lonely = next(name for name in cluster.names if name != leader.name)
    term = leader.raft.term
    cluster.isolate(lonely)
    cluster.run(5.0)
    cluster.heal()
    cluster.run(2.0)
    assert leader.core.role is Role.LEADER
    assert leader.raft.term == term


def test_losing_one_of_three_directories_loses_nothing() -> None:
    cluster = Cluster(3)
    leader = cluster.elect()
    for number in range(20):
        cluster.submit(b"%d" % number)
    cluster.run(0.5)
    assert len(cluster.acked) == 20
    victim, other = (name for name in cluster.names if name != leader.name)
    cluster.kill(other)
    cluster.kill(victim)
    cluster.wipe(victim)
    cluster.kill(leader.name)
    cluster.boot(victim)
    cluster.boot(other)
    cluster.run(5.0)
    assert cluster.leader() is None, "an emptied voter must not help to elect"
    cluster.boot(leader.name)
    cluster.elect()
    cluster.run(1.0)
    cluster.check_converged()
    assert cluster.nodes[victim].raft.log.proven


def test_a_leader_killed_at_any_moment_is_replaced_in_time() -> None:
    for seed in range(10):
        cluster = Cluster(seed)
        leader = cluster.elect()
        cluster.run(cluster.rng.uniform(0.1, 0.3))
        cluster.kill(leader.name)
        cluster.elect(limit_s=1.0)


def test_a_silent_leader_is_replaced_in_time() -> None:
    """No connection breaks: only heartbeats stop, as when a host freezes."""
    for seed in range(10):
        cluster = Cluster(seed)
        leader = cluster.elect()
        cluster.run(0.5)
        cluster.cut |= {(leader.name, other) for other in cluster.names}
        assert cluster.run_until(
            lambda c=cluster, old=leader: any(
                node is not old and node.core.role is Role.LEADER for node in c.nodes.values()
            ),
            2.0,
        )


SMALL = RaftSettings(
    compaction_entries=60,
    trailing_entries=20,
    snapshot_chunk_bytes=512,
    snapshot_window_chunks=4,
    append_batch_bytes=2048,
)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("size", "lossy"), [(3, False), (3, True), (5, False), (1, False), (2, True)]
)
def test_random_faults_break_no_invariant(seed: int, size: int, lossy: bool) -> None:
    cluster = Cluster(1000 + seed, size, settings=SMALL, lossy=lossy)
    nemesis = Nemesis(cluster)
    nemesis.run(12.0, settle_s=20.0)
    assert len(cluster.acked) > 50, "a run without work proves nothing"
    assert nemesis.counts["kill"] > 0
    assert sum(nemesis.counts.values()) > 5


def test_the_same_seed_gives_the_same_run() -> None:
    def fingerprint() -> tuple[object, ...]:
        cluster = Cluster(77, 3, settings=SMALL, lossy=True)
        Nemesis(cluster).run(6.0, settle_s=20.0)
        return (cluster.now, sorted(cluster.acked.items()), sorted(cluster.leaders.items()))

    assert fingerprint() == fingerprint()
