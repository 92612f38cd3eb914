"""One directed test per hazard of the log, of apply and of the leader's side (see `hardening.py`).

Each fails if its override is taken away. Elections: `test_elections.py`; reads and transfer:
`test_raft_core.py`; whole clusters: `tests/sim`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus import hardening, library
from distroml.consensus.library import check_library
from distroml.consensus.messages import (
    Append,
    AppendReply,
    BadMessage,
    SnapshotChunk,
    SnapshotReply,
    decode,
    encode,
)
from distroml.consensus.raft_log import LogImage
from distroml.consensus.raft_types import (
    EntryTooLarge,
    NotLeader,
    RaftSettings,
    Role,
    SafetyViolation,
    UnreadableEntry,
    UnsafeLibrary,
)
from distroml.consensus.snapshot import Snapshot
from tests.consensus.ledger import Ledger
from tests.consensus.lone import FIVE, THREE, Lone, entries, image, sent_in

# ---------------------------------------------------------------------- the library itself


def test_another_library_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "syncobj.py"
    source.write_text(Path(library.syncobj.__file__).read_text() + "\n# patched\n")
    with pytest.raises(UnsafeLibrary, match=r"is not the PySyncObj 0\.3\.17.*Install pysyncobj==0"):
        check_library(source)
    check_library()


def test_a_wrong_library_keeps_a_node_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    library.adopt_library.cache_clear()
    monkeypatch.setattr(library, "LIBRARY_SHA256", "0" * 64)
    with pytest.raises(UnsafeLibrary):
        Lone()
    library.adopt_library.cache_clear()


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


@pytest.mark.parametrize("error", [MemoryError(), UnreadableEntry(2, "of a newer version")])
def test_what_is_not_the_same_on_all_nodes_stops_this_one(error: Exception) -> None:
    node = Lone(image=image(4, term=1))

    def apply(index: int, entry: bytes) -> None:
        raise error

    node.ledger.apply = apply  # type: ignore[method-assign]
    with pytest.raises(type(error)):
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
    appends = {peer: m for peer, m in turn.early if isinstance(m, Append)}
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


def test_p1_a_follower_that_does_not_answer_gets_one_probe_per_heartbeat() -> None:
    node = Lone()
    node.lead()
    node.turn(lambda: node.core.set_link("c", False))
    node.turn(lambda: node.core.set_link("c", True))
    probes = [m for peer, m in sent_in(node.last) if peer == "c"]
    assert len(probes) == 1
    for number in range(20):
        turn = node.submit(b"%d" % number)
        assert not [m for peer, m in sent_in(turn) if peer == "c"]
    assert [m for m in node.wait(node.settings.heartbeat_s * 1.5) if isinstance(m, Append)]


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
