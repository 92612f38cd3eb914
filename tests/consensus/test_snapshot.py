"""Snapshots: their file, their way to a follower, and how they and the log are joined at a start."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus.disk import RealDisk
from distroml.consensus.messages import SnapshotChunk
from distroml.consensus.proofs import proof
from distroml.consensus.raft_log import (
    AppendRecords,
    EntryRecord,
    LogImage,
    ProvenRecord,
    RaftLog,
    StoreSnapshot,
    TermRecord,
)
from distroml.consensus.raft_types import StorageCorrupt, StorageInUse
from distroml.consensus.snapshot import (
    STALL_S,
    IncomingSnapshot,
    OutgoingSnapshot,
    Snapshot,
    decode_file,
    encode_file,
)
from distroml.consensus.storage import Recovered, Storage, open_storage, snapshot_name
from distroml.consensus.wal import Identity, segment_name
from tests.consensus.faulty_disk import EIO, ENOSPC, FaultyDisk

IDENTITY = Identity("cluster", "a")
VOTERS = ["a", "b", "c"]


def snapshot(index: int = 10, term: int = 2, blob: bytes = b"state") -> Snapshot:
    return Snapshot.take(index, term, VOTERS, blob)


# ---------------------------------------------------------------------- the file


@given(st.binary(max_size=300))
def test_a_snapshot_survives_its_file(blob: bytes) -> None:
    assert decode_file(encode_file(snapshot(blob=blob)), "x") == snapshot(blob=blob)


@given(st.binary(min_size=1, max_size=60), st.data())
def test_any_changed_byte_or_cut_is_found(blob: bytes, data: st.DataObject) -> None:
    content = bytearray(encode_file(snapshot(blob=blob)))
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    with pytest.raises(StorageCorrupt, match="where"):
        decode_file(bytes(content), "where")


# ---------------------------------------------------------------------- the stream


@given(st.binary(max_size=200), st.integers(0, 2**32))
def test_a_transfer_arrives_whole_through_loss_and_disorder(blob: bytes, seed: int) -> None:
    rng = random.Random(seed)
    source = snapshot(blob=blob)
    outgoing = OutgoingSnapshot(source, chunk_bytes=16, window_chunks=3, now=0.0)
    incoming, now, delivered = IncomingSnapshot(), 0.0, None
    for _ in range(400):
        in_flight = [outgoing.keepalive(5)]
        while (chunk := outgoing.next_chunk(5)) is not None:
            in_flight.append(chunk)
        for chunk in rng.sample(in_flight, len(in_flight)):
            if rng.random() < 0.1:
                continue
            delivered = incoming.receive(chunk, VOTERS) or delivered
            if delivered is not None:
                assert delivered == source
                return
            outgoing.acknowledged(incoming.next_offset, now)
        now += STALL_S
        outgoing.rewind_if_stalled(now)
    raise AssertionError("the transfer never ended")


def test_the_window_bounds_what_is_in_flight() -> None:
    outgoing = OutgoingSnapshot(
        snapshot(blob=bytes(1000)), chunk_bytes=10, window_chunks=4, now=0.0
    )
    assert len(list(iter(lambda: outgoing.next_chunk(1), None))) == 4
    outgoing.acknowledged(20, 0.0)
    assert len(list(iter(lambda: outgoing.next_chunk(1), None))) == 2


def chunk_of(source: Snapshot, offset: int, data: bytes) -> SnapshotChunk:
    return SnapshotChunk(
        1, source.index, source.term, source.sha256, len(source.blob), offset, data
    )


def test_chunks_of_two_snapshots_are_never_joined() -> None:
    old, new = snapshot(10, 2, b"aaaabbbb"), snapshot(12, 2, b"ccccdddd")
    incoming = IncomingSnapshot()
    assert incoming.receive(chunk_of(old, 0, b"aaaa"), VOTERS) is None
    assert incoming.receive(chunk_of(new, 4, b"dddd"), VOTERS) is None
    assert (incoming.next_offset, incoming.refused) == (0, 0)
    assert incoming.receive(chunk_of(new, 0, b"cccc"), VOTERS) is None
    assert incoming.receive(chunk_of(new, 4, b"dddd"), VOTERS) == new


def test_bytes_without_the_announced_hash_are_thrown_away() -> None:
    source = snapshot(blob=b"good")
    incoming = IncomingSnapshot()
    assert incoming.receive(chunk_of(source, 0, b"evil"), VOTERS) is None
    assert incoming.refused == 1
    assert incoming.next_offset == 0
    assert incoming.receive(chunk_of(source, 0, b"good"), VOTERS) == source


def test_a_follower_that_cannot_use_a_snapshot_is_not_flooded_with_it() -> None:
    outgoing = OutgoingSnapshot(
        snapshot(blob=bytes(100)), chunk_bytes=10, window_chunks=100, now=0.0
    )
    assert len(list(iter(lambda: outgoing.next_chunk(1), None))) == 10
    for sent_again in (10, 0, 0):  # it may have lost the first chunk, once
        for _ in range(10):
            outgoing.acknowledged(0, 0.0)
        assert len(list(iter(lambda: outgoing.next_chunk(1), None))) == sent_again
    outgoing.rewind_if_stalled(0.0)
    outgoing.rewind_if_stalled(STALL_S * 1.1)
    assert outgoing.next_chunk(1) is not None


# ---------------------------------------------------------------------- log and snapshot together


def reopen(directory: Path, disk: RealDisk | None = None) -> Recovered:
    storage, recovered = open_storage(directory, IDENTITY, disk or RealDisk())
    storage.close()
    return recovered


def filled(directory: Path, last: int, disk: RealDisk | None = None) -> tuple[Storage, RaftLog]:
    """A directory whose log holds entries 2..last of term 2."""
    storage, recovered = open_storage(directory, IDENTITY, disk or RealDisk())
    log = RaftLog(recovered.image)
    log.set_term(2, "a")
    for index in range(2, last + 1):
        log.append(b"\x00%d" % index, index, 2)
    flush(storage, log)
    return storage, log


def flush(storage: Storage, log: RaftLog) -> None:
    for op in log.take_ops():
        storage.perform(op)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_directory_that_does_not_name_its_voters_is_known_by_what_it_holds(
    tmp_path: Path, compacted: bool
) -> None:
    storage, recovered = open_storage(tmp_path, IDENTITY, RealDisk())
    log = RaftLog(recovered.image)
    log.append(proof({"a": 1, "b": 2, "c": 3}), 2, 1)
    if compacted:
        log.compact(snapshot(2, term=1), 2)
    flush(storage, log)
    storage.close()
    others = Identity("cluster", "a", ("a", "b", "c", "d", "e"))
    with pytest.raises(StorageCorrupt, match=r"voters a, b, c, but this node was given .* d, e"):
        open_storage(tmp_path, others, RealDisk())
    storage, _ = open_storage(tmp_path, Identity("cluster", "a", ("a", "b", "c")), RealDisk())
    storage.close()


def test_compaction_keeps_the_trailing_window(tmp_path: Path) -> None:
    storage, log = filled(tmp_path, 20)
    log.compact(snapshot(15), 10)
    flush(storage, log)
    storage.close()
    recovered = reopen(tmp_path)
    assert recovered.snapshot == snapshot(15)
    assert [index for _, index, _ in recovered.image.entries] == list(range(10, 21))


def test_s2_dying_between_snapshot_and_trim_keeps_the_acknowledged_tail(tmp_path: Path) -> None:
    storage, log = filled(tmp_path, 32)
    log.compact(snapshot(22), 22)
    stored = log.take_ops()[0]
    assert isinstance(stored, StoreSnapshot)
    storage.perform(stored)
    storage.close()  # the log was not rewritten
    recovered = reopen(tmp_path)
    assert recovered.image.last_index == 32
    assert recovered.snapshot is not None
    assert recovered.snapshot.index == 22


def test_dying_after_a_snapshot_that_contradicts_the_tail_drops_the_tail(tmp_path: Path) -> None:
    storage, _ = filled(tmp_path, 32)
    storage.perform(StoreSnapshot(snapshot(22, term=3)))
    storage.close()
    recovered = reopen(tmp_path)
    assert (recovered.image.anchor_index, recovered.image.last_index) == (22, 22)
    assert recovered.image.term == 3
    assert recovered.image.vote is None


def test_dying_after_a_snapshot_ahead_of_the_log_starts_at_the_snapshot(tmp_path: Path) -> None:
    storage, _ = filled(tmp_path, 5)
    storage.perform(StoreSnapshot(snapshot(40)))
    storage.close()
    assert reopen(tmp_path).image.entries == [(b"\x01", 40, 2)]
    assert reopen(tmp_path).image.entries == [(b"\x01", 40, 2)]


def test_l6_a_log_without_its_snapshot_refuses_to_start(tmp_path: Path) -> None:
    storage, log = filled(tmp_path, 20)
    log.compact(snapshot(15), 15)
    flush(storage, log)
    storage.close()
    path = tmp_path / snapshot_name(15, 2)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(StorageCorrupt, match=r"starts behind entry 15.*Move the whole"):
        reopen(tmp_path)


def test_a_snapshot_without_its_log_refuses_to_start(tmp_path: Path) -> None:
    storage, log = filled(tmp_path, 20)
    log.compact(snapshot(15), 15)
    flush(storage, log)
    storage.close()
    (tmp_path / segment_name(2)).unlink()
    with pytest.raises(StorageCorrupt, match="term and vote are lost"):
        reopen(tmp_path)


def test_older_snapshots_go_only_once_the_log_needs_them_no_more(tmp_path: Path) -> None:
    storage, log = filled(tmp_path, 20)
    for index in (10, 15):
        log.compact(snapshot(index), index)
        flush(storage, log)
    storage.close()
    assert [path.name for path in tmp_path.glob("*.snap")] == [snapshot_name(15, 2)]


@pytest.mark.parametrize("call", ["write", "sync", "replace", "sync_directory"])
@pytest.mark.parametrize("step", [0, 1])
def test_dying_at_any_failed_call_of_a_compaction_loses_nothing(
    tmp_path: Path, call: str, step: int
) -> None:
    disk = FaultyDisk()
    storage, log = filled(tmp_path, 20, disk)
    log.compact(snapshot(15), 10)
    ops = log.take_ops()
    for op in ops[:step]:
        storage.perform(op)
    disk.fail[call] = ENOSPC
    with pytest.raises(OSError, match="No space"):
        storage.perform(ops[step])
    storage.close()
    recovered = reopen(tmp_path)
    assert recovered.image.last_index == 20
    assert recovered.image.anchor_index <= (15 if recovered.snapshot else 1)


def test_operations_can_be_performed_again_after_a_failure(tmp_path: Path) -> None:
    disk = FaultyDisk()
    storage, log = filled(tmp_path, 20, disk)
    log.compact(snapshot(15), 10)
    log.append(b"\x00last", 21, 2)
    for op in log.take_ops():
        for call in ("write", "sync", "remove"):
            disk.fail = {call: EIO}
            try:
                storage.perform(op)
            except OSError:
                continue
        disk.fail = {}
        if not isinstance(op, AppendRecords):
            storage.perform(op)
    storage.close()
    assert reopen(tmp_path).image.last_index >= 20


def test_two_processes_cannot_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distroml.consensus.storage.LOCK_WAIT_S", 0.05)
    storage, _ = filled(tmp_path, 3)
    with pytest.raises(StorageInUse, match="in use by another process"):
        reopen(tmp_path)
    storage.close()
    assert reopen(tmp_path).image.last_index == 3


# ---------------------------------------------------------------------- the log in memory


def test_the_log_and_its_operations_tell_the_same_story(tmp_path: Path) -> None:
    storage, log = filled(tmp_path, 9)
    log.truncate_from(6)
    log.append(b"\x00new", 6, 3)
    log.set_term(3, "b")
    log.set_proven()
    log.reset_to(snapshot(50, 4))
    log.append(b"\x00later", 51, 4)
    flush(storage, log)
    storage.close()
    image: LogImage = reopen(tmp_path).image
    assert image.entries == [(b"\x01", 50, 4), (b"\x00later", 51, 4)]
    assert (image.term, image.vote, image.proven) == (3, "b", True)


def test_equal_term_and_vote_cost_no_sync() -> None:
    log = RaftLog(LogImage([(b"\x01", 1, 0)], 3, "b", True))
    log.set_term(3, "b")
    log.set_proven()
    assert log.take_ops() == []
    log.set_term(3, "c")
    assert log.take_ops() == [AppendRecords([TermRecord(3, "c")])]
    log.append(b"\x00x", 2, 3)
    assert log.take_ops() == [AppendRecords([EntryRecord(b"\x00x", 2, 3)])]
    assert ProvenRecord() not in [log.take_ops()]
