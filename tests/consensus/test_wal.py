"""The log file: what is read back after any cut, any flipped bit, and any failing call."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.consensus import wal
from distroml.consensus.disk import RealDisk
from distroml.consensus.raft_log import (
    AnchorRecord,
    EntryRecord,
    LogImage,
    ProvenRecord,
    Record,
    TermRecord,
    TruncateRecord,
    apply_record,
    blank_image,
    image_records,
)
from distroml.consensus.raft_types import StorageCorrupt
from distroml.consensus.wal import (
    Identity,
    Wal,
    encode_batch,
    encode_segment,
    replay,
    segment_name,
)
from tests.consensus.faulty_disk import EIO, ENOSPC, FaultyDisk

IDENTITY = Identity("cluster", "a")
SALT = 12345


@st.composite
def histories(draw: st.DrawFn) -> list[list[Record]]:
    """Batches of records as a correct node would write them."""
    image = blank_image()
    batches: list[list[Record]] = []
    for _ in range(draw(st.integers(0, 5))):
        batch: list[Record] = []
        for kind in draw(st.lists(st.sampled_from("eeeettrpa"), min_size=1, max_size=4)):
            record: Record
            if kind == "e":
                command = b"\x00" + draw(st.binary(max_size=20))
                record = EntryRecord(
                    command, image.last_index + 1, max(image.term, image.last_term)
                )
            elif kind == "t":
                vote = draw(st.none() | st.sampled_from("abc"))
                record = TermRecord(image.term + draw(st.integers(0, 2)), vote)
            elif kind == "r" and len(image.entries) > 1:
                record = TruncateRecord(draw(st.integers(image.anchor_index + 1, image.last_index)))
            elif kind == "a":
                record = AnchorRecord(image.last_index + draw(st.integers(0, 9)), image.last_term)
            else:
                record = ProvenRecord()
            apply_record(image, record)
            batch.append(record)
        batches.append(batch)
    return batches


def segment(batches: list[list[Record]]) -> tuple[bytes, list[int], list[LogImage]]:
    """A segment's bytes, the offset behind each of its batches, and the image at each of them."""
    image = blank_image()
    content = encode_segment(IDENTITY, 1, SALT, image)
    ends, images = [len(content)], [image.copy()]
    for sequence, batch in enumerate(batches, start=1):
        content += encode_batch(SALT, sequence, batch)
        for record in batch:
            apply_record(image, record)
        ends.append(len(content))
        images.append(image.copy())
    return content, ends, images


@given(histories())
def test_replay_at_every_cut_gives_exactly_the_whole_batches(batches: list[list[Record]]) -> None:
    content, ends, images = segment(batches)
    for cut in range(ends[0], len(content) + 1):
        whole = max(place for place, end in enumerate(ends) if end <= cut)
        replayed = replay(content[:cut], "log", IDENTITY)
        assert replayed.image == images[whole]
        assert (replayed.good_bytes, replayed.cut_bytes) == (ends[whole], cut - ends[whole])
        assert replayed.batches == whole + 1


@settings(max_examples=200)
@given(histories(), st.data())
def test_a_flipped_bit_is_found_wherever_it_is(
    batches: list[list[Record]], data: st.DataObject
) -> None:
    content, ends, images = segment(batches)
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        replayed = replay(bytes(damaged), "log", IDENTITY)
    except StorageCorrupt:
        assert len(ends) == 1 or place < ends[-2], "the last batch alone may be an unfinished write"
    else:
        assert len(ends) > 1
        assert place >= ends[-2], "only damage in the last batch can look like an unfinished write"
        assert replayed.image == images[-2]


@given(histories(), st.binary(max_size=200))
def test_rubbish_behind_the_last_batch_is_cut(batches: list[list[Record]], tail: bytes) -> None:
    content, _, images = segment(batches)
    replayed = replay(content + tail, "log", IDENTITY)
    assert replayed.image == images[-1]
    assert replayed.cut_bytes == len(tail)


def test_batches_of_an_earlier_segment_do_not_count() -> None:
    content, _, images = segment([[ProvenRecord()]])
    stale = encode_batch(SALT + 1, 2, [TermRecord(9, "x")])
    assert replay(content + stale, "log", IDENTITY).image == images[-1]


def test_a_length_beyond_32_bits_is_an_unfinished_write_not_an_overflow() -> None:
    content, _, images = segment([[ProvenRecord()]])
    header = struct.pack("<4sQQI", b"\xd1BT\x9e", 2, 2**40, 0)
    assert replay(content + header, "log", IDENTITY).image == images[-1]


def test_an_image_survives_its_own_records() -> None:
    image = LogImage([(b"\x01", 7, 3), (b"\x00x", 8, 3), (b"\x00y", 9, 4)], 5, "b", True)
    rebuilt = blank_image()
    for record in image_records(image):
        apply_record(rebuilt, record)
    assert rebuilt == image


@pytest.mark.parametrize(
    "record",
    [
        EntryRecord(b"\x00", 3, 1),
        EntryRecord(b"\x00", 1, 1),
        TruncateRecord(1),
        TruncateRecord(9),
    ],
)
def test_a_record_that_cannot_follow_is_refused(record: Record) -> None:
    with pytest.raises(StorageCorrupt):
        apply_record(blank_image(), record)


# ---------------------------------------------------------------------- on a real disk


def open_wal(directory: Path, disk: RealDisk | None = None) -> tuple[Wal, LogImage, int]:
    wal = Wal(directory, IDENTITY, disk or RealDisk())
    image, cut_bytes = wal.open() or (blank_image(), 0)
    wal.rewrite(image)
    return wal, image, cut_bytes


def entry(index: int, text: bytes = b"x") -> EntryRecord:
    return EntryRecord(b"\x00" + text, index, 0)


def reopened(directory: Path) -> LogImage:
    wal, image, _ = open_wal(directory)
    wal.close()
    return image


def test_what_was_appended_is_there_after_a_restart(tmp_path: Path) -> None:
    wal, _, _ = open_wal(tmp_path)
    wal.append([entry(2), TermRecord(4, "b")])
    wal.append([entry(3, b"z" * 100_000)])
    wal.close()
    image = reopened(tmp_path)
    assert [index for _, index, _ in image.entries] == [1, 2, 3]
    assert (image.term, image.vote) == (4, "b")


def test_a_torn_tail_is_cut_reported_and_written_over(tmp_path: Path) -> None:
    wal, _, _ = open_wal(tmp_path)
    wal.append([entry(2)])
    wal.append([entry(3)])
    wal.close()
    path = tmp_path / segment_name(1)
    path.write_bytes(path.read_bytes()[:-3])
    wal, image, cut_bytes = open_wal(tmp_path)
    assert image.last_index == 2
    assert cut_bytes > 0
    wal.append([entry(3, b"again")])
    wal.close()
    assert reopened(tmp_path).entries[-1][0] == b"\x00again"


def test_damage_in_the_middle_refuses_to_start_and_says_what_to_do(tmp_path: Path) -> None:
    wal, _, _ = open_wal(tmp_path)
    wal.append([entry(2, b"needle")])
    wal.append([entry(3)])
    wal.close()
    path = tmp_path / segment_name(1)
    path.write_bytes(path.read_bytes().replace(b"needle", b"noodle"))
    with pytest.raises(
        StorageCorrupt, match=r"log-.*wal is damaged at byte .*move the node's whole"
    ):
        open_wal(tmp_path)


@pytest.mark.parametrize("call", ["write", "sync"])
@pytest.mark.parametrize("number", [ENOSPC, EIO])
def test_a_failed_append_leaves_nothing_and_can_be_retried(
    tmp_path: Path, call: str, number: int
) -> None:
    disk = FaultyDisk()
    wal, _, _ = open_wal(tmp_path, disk)
    wal.append([entry(2)])
    disk.fail[call] = number
    for _ in range(3):
        with pytest.raises(OSError, match=r"\[Errno"):
            wal.append([entry(3)])
    disk.fail.clear()
    wal.append([entry(3)])
    wal.append([entry(4)])
    wal.close()
    assert [index for _, index, _ in reopened(tmp_path).entries] == [1, 2, 3, 4]


def test_dying_after_a_failed_append_keeps_what_was_promised(tmp_path: Path) -> None:
    disk = FaultyDisk()
    wal, _, _ = open_wal(tmp_path, disk)
    wal.append([entry(2)])
    disk.fail["write"] = ENOSPC
    with pytest.raises(OSError, match="No space"):
        wal.append([entry(3, b"y" * 1000)])
    assert reopened(tmp_path).last_index == 2


@pytest.mark.parametrize("call", ["write", "sync", "replace", "sync_directory"])
def test_a_rewrite_that_fails_anywhere_keeps_one_whole_log(tmp_path: Path, call: str) -> None:
    disk = FaultyDisk()
    wal, image, _ = open_wal(tmp_path, disk)
    wal.append([entry(2)])
    apply_record(image, entry(2))
    compacted = LogImage([(b"\x01", 2, 0)], 0, None, False)
    disk.fail[call] = ENOSPC
    with pytest.raises(OSError, match="No space"):
        wal.rewrite(compacted)
    # Dying here: either log is right, a mixture is not.
    assert reopened(tmp_path) in (image, compacted)


def test_a_failed_rewrite_can_be_retried(tmp_path: Path) -> None:
    disk = FaultyDisk()
    wal, _, _ = open_wal(tmp_path, disk)
    compacted = LogImage([(b"\x01", 40, 2), (b"\x00a", 41, 2)], 3, "c", True)
    disk.fail["sync_directory"] = EIO
    with pytest.raises(OSError, match="Input/output"):
        wal.rewrite(compacted)
    disk.fail.clear()
    wal.rewrite(compacted)
    wal.append([EntryRecord(b"\x00b", 42, 3)])
    wal.close()
    image = reopened(tmp_path)
    assert (image.anchor_index, image.last_index, image.term) == (40, 42, 3)
    assert [name for name in RealDisk().names(tmp_path) if name.endswith(".wal")] != []
    assert len(list(tmp_path.iterdir())) == 1


def test_the_log_of_another_node_is_refused(tmp_path: Path) -> None:
    open_wal(tmp_path)[0].close()
    with pytest.raises(StorageCorrupt, match="belongs to node 'a' of cluster 'cluster'"):
        Wal(tmp_path, Identity("cluster", "b"), RealDisk()).open()


def test_the_log_of_other_voters_is_refused_with_both_lists(tmp_path: Path) -> None:
    ours = Identity("cluster", "a", ("a", "b", "c"))
    wal = Wal(tmp_path, ours, RealDisk())
    wal.rewrite(blank_image())
    wal.close()
    for voters in (("a",), ("a", "b", "c", "d", "e"), ("a", "b", "d")):
        told = rf"voters a, b, c, but .* voters {', '.join(voters)}\. .*--peers"
        with pytest.raises(StorageCorrupt, match=told):
            Wal(tmp_path, Identity("cluster", "a", voters), RealDisk()).open()
    assert Wal(tmp_path, ours, RealDisk()).open() is not None


def test_a_log_without_the_voters_names_gets_them(tmp_path: Path) -> None:
    open_wal(tmp_path)[0].close()
    named = Wal(tmp_path, Identity("cluster", "a", ("a", "b")), RealDisk())
    image, _ = named.open() or (blank_image(), 0)
    named.rewrite(image)
    named.close()
    with pytest.raises(StorageCorrupt, match="the voters a, b, but"):
        Wal(tmp_path, Identity("cluster", "a", ("a", "c")), RealDisk()).open()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageCorrupt, match="not a log segment"):
        replay(b"DMLWAL\x00\x02" + b"\x00" * 40, "log", IDENTITY)


def test_bytes_that_look_like_batches_everywhere_do_not_keep_a_start_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 500
    size = struct.calcsize("<4sQQI")
    looks_like = b"".join(
        struct.pack("<4sQQI", b"\xd1BT\x9e", 1, size * (count - place - 1), 0)
        for place in range(count)
    )
    content = encode_segment(IDENTITY, 1, SALT, blank_image()) + looks_like
    summed, checksum = [0], wal._checksum

    def counting(salt: int, sequence: int, payload: bytes) -> int:
        summed[0] += len(payload)
        return checksum(salt, sequence, payload)

    monkeypatch.setattr(wal, "_checksum", counting)
    with pytest.raises(StorageCorrupt, match="looks like a batch in too many places"):
        replay(content, "log", IDENTITY)
    assert summed[0] <= 12 * len(content)
    few = encode_segment(IDENTITY, 1, SALT, blank_image()) + looks_like[-5 * size :]
    assert replay(few, "log", IDENTITY).cut_bytes == 5 * size
