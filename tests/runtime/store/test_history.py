"""What a store accepts, keeps over a crash, gives up, and tells its followers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.errors import TooManyRequests
from distroml.runtime.store import segments
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import MAX_RECORD_BYTES
from distroml.runtime.store.retention import HistoryLimits, to_evict
from distroml.runtime.store.subscriptions import Written
from tests.runtime.store.histories import JOB, content, key, lines

SMALL = HistoryLimits(
    segment_bytes=1000, log_stream_bytes=4000, metric_stream_bytes=4000, job_bytes=12_000
)


def test_accepts_what_comes_next_ignores_duplicates_refuses_gaps(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    assert store.append(key(), 0, lines(0, 5)) == 5
    assert store.append(key(), 3, lines(3, 8)) == 8
    assert store.append(key(), 0, lines(0, 2)) == 8
    assert store.append(key(), 9, lines(9, 10)) == 8
    store.flush()
    assert store.heads(JOB) == {key(): 8}
    assert store.read(key(), 0) == lines(0, 8)
    assert store.read(key(), 6) == lines(6, 8)
    assert store.read(key(), 8) == []


def test_only_what_is_written_can_be_read(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    store.append(key(), 0, lines(0, 5))
    assert store.next_seq(key()) == 5
    assert store.heads(JOB) == {key(): 0}
    assert HistoryStore(tmp_path).heads() == {}


def test_a_restarted_store_goes_on_where_it_was(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, SMALL)
    for start in range(0, 60, 3):
        store.append(key(), start, lines(start, start + 3))
        store.append(key(kind="metrics"), start, lines(start, start + 3))
        store.flush()
    again = HistoryStore(tmp_path, SMALL)
    assert again.jobs() == [JOB]
    assert content(again) == content(store)
    assert again.append(key(), 60, lines(60, 61)) == 61
    again.flush()
    assert again.read(key(), 60) == lines(60, 61)


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(1, 400), records=st.integers(1, 12), flip=st.booleans())
def test_a_torn_tail_is_cut_and_the_prefix_stays(
    tmp_path_factory: pytest.TempPathFactory, cut: int, records: int, flip: bool
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    store = HistoryStore(directory)
    for number in range(records):
        store.append(key(), number, lines(number, number + 1))
        store.flush()
    path = next((directory / JOB).iterdir())
    size = path.stat().st_size
    position = max(0, size - cut)
    with path.open("r+b") as file:
        if flip:
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes([byte[0] ^ 0xFF]))
        else:
            file.truncate(position)
    again = HistoryStore(directory)
    head = again.heads(JOB)[key()]
    assert head < records
    assert again.read(key(), 0) == lines(0, head)
    assert again.append(key(), head, lines(head, records + 1)) == records + 1
    again.flush()
    assert HistoryStore(directory).read(key(), 0) == lines(0, records + 1)


def test_reads_are_bounded_in_bytes_but_never_empty(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, HistoryLimits(segment_bytes=500))
    big = [bytes([number]) * 300 for number in range(10)]
    store.append(key(), 0, big)
    store.flush()
    assert store.read(key(), 2, max_bytes=1) == big[2:3]
    assert store.read(key(), 2, max_bytes=650) == big[2:4]
    assert store.read(key(), 0) == big
    seq, found = 0, []
    while part := store.read(key(), seq, max_bytes=700):
        found += part
        seq += len(part)
    assert found == big


def test_large_records_and_wrong_keys_are_refused(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    with pytest.raises(ValueError, match="over"):
        store.append(key(), 0, [b"x" * (MAX_RECORD_BYTES + 1)])
    with pytest.raises(ValueError, match="job_id"):
        store.append(key(job_id="../etc"), 0, [b"x"])
    with pytest.raises(ValueError, match="run_id"):
        store.append(key(run_id="a/b"), 0, [b"x"])
    store.append(key(), 0, [b"x" * MAX_RECORD_BYTES] * 9)
    store.flush()
    assert HistoryStore(tmp_path).heads(JOB) == {key(): 9}


def test_a_full_stream_drops_its_oldest_and_says_where_it_begins(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, SMALL)
    for number in range(400):
        store.append(key(), number, lines(number, number + 1))
        store.flush()
    first = store.first_seq(key())
    assert 0 < first < 400
    assert store.size_bytes <= SMALL.log_stream_bytes + SMALL.segment_bytes
    assert store.read(key(), 0) == []
    assert store.read(key(), first) == lines(first, 400)
    on_disk = sum(path.stat().st_size for path in (tmp_path / JOB).iterdir())
    assert on_disk == store.size_bytes
    assert content(HistoryStore(tmp_path, SMALL)) == content(store)


def test_a_full_job_drops_from_its_oldest_generation(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, SMALL)
    for generation in (1, 2, 3, 4, 5):
        for number in range(100):
            store.append(key(generation=generation), number, lines(number, number + 1))
            store.flush()
    assert store.size_bytes <= SMALL.job_bytes
    assert store.span(key(generation=1)) == (100, 100)
    assert store.span(key(generation=5))[1] == 100
    # an emptied stream still knows where it was, also after a restart
    assert HistoryStore(tmp_path, SMALL).span(key(generation=1)) == (100, 100)


def test_too_many_streams_drop_the_oldest_generations_for_good(tmp_path: Path) -> None:
    limits = HistoryLimits(streams_per_job=6)
    store = HistoryStore(tmp_path, limits)
    for generation in range(1, 6):
        for rank in range(2):
            store.append(key(rank, generation), 0, lines(0, 3))
    store.flush()
    kept = {k.generation for k in store.heads(JOB)}
    assert kept == {3, 4, 5}
    assert store.wanted(key(0, 1)) is None
    assert store.append(key(0, 1), 0, lines(0, 3)) == 3
    again = HistoryStore(tmp_path, limits)
    assert {k.generation for k in again.heads(JOB)} == kept
    assert again.wanted(key(0, 2)) is None


def test_the_oldest_finished_job_makes_room(tmp_path: Path) -> None:
    now = [0.0]
    store = HistoryStore(
        tmp_path,
        HistoryLimits(total_bytes=5000),
        active=lambda: {"first"},
        clock=lambda: now[0],
    )
    for job_id in ("first", "second", "third"):
        now[0] += 1
        store.append(key(job_id=job_id), 0, [b"x" * 1800])
        store.flush()
    assert store.jobs() == ["third", "first"]
    assert store.evicted("second")
    assert store.append(key(job_id="second"), 7, lines(7, 9)) == 9
    assert store.wanted(key(job_id="second")) is None
    again = HistoryStore(tmp_path)
    assert again.evicted("second")
    assert set(again.jobs()) == {"first", "third"}
    again.remove("second")
    again.flush()
    assert not HistoryStore(tmp_path).evicted("second")


def test_eviction_spares_the_newest_and_takes_active_ones_last() -> None:
    sizes = {"old": 10, "running": 10, "newest": 10, "empty": 0}
    touched = {"old": 3.0, "running": 1.0, "newest": 9.0, "empty": 0.0}
    assert to_evict(sizes, touched, {"running"}, 5) == ["old"]
    assert to_evict(sizes, touched, {"running"}, 15) == ["old", "running"]
    assert to_evict(sizes, touched, {"running"}, 999) == ["old", "running"]


def test_remove_deletes_everything_also_what_was_pending(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    store.append(key(), 0, lines(0, 5))
    store.flush()
    store.append(key(), 5, lines(5, 9))
    store.remove(JOB)
    assert store.jobs() == []
    assert store.pending_bytes == 0
    store.flush()
    assert list(tmp_path.iterdir()) == []
    assert store.heads() == {}


def test_skip_leaves_no_hole(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    store.append(key(), 0, lines(0, 5))
    assert store.skip_to(key(), 50) == 5  # not while something waits to be written
    store.flush()
    assert store.skip_to(key(), 50) == 50
    assert store.append(key(), 50, lines(50, 55)) == 55
    store.flush()
    assert store.span(key()) == (50, 55)
    assert content(HistoryStore(tmp_path)) == {key(): (50, lines(50, 55))}


def test_a_damaged_old_segment_is_dropped_with_all_before_it(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, HistoryLimits(segment_bytes=300))
    for number in range(60):
        store.append(key(), number, lines(number, number + 1))
        store.flush()
    files = sorted((tmp_path / JOB).iterdir())
    parsed = segments.parse_name(JOB, files[2].name)
    assert parsed is not None
    with files[1].open("r+b") as file:
        file.seek(40)
        file.write(b"\xff\xff\xff")
    again = HistoryStore(tmp_path, HistoryLimits(segment_bytes=300))
    found: list[bytes] = []
    while part := again.read(key(), len(found)):
        found += part
    assert found == lines(0, len(found))
    assert again.first_seq(key()) == parsed[1]
    assert again.read(key(), parsed[1]) == lines(parsed[1], 60)


def test_a_disk_that_refuses_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HistoryStore(tmp_path, HistoryLimits(pending_bytes=200, segment_bytes=300))
    store.append(key(), 0, lines(0, 3))
    store.flush()
    real = os.pwrite
    with monkeypatch.context() as patch:

        def torn(handle: int, data: bytes, offset: int) -> int:
            real(handle, bytes(data[:7]), offset)
            raise OSError(28, "No space left on device")

        patch.setattr(os, "pwrite", torn)
        wanted = store.append(key(), 3, lines(3, 20))
        store.flush()
        assert wanted == 20
        assert store.heads(JOB) == {key(): 3}
        assert store.append(key(), 20, lines(20, 30)) == 20, "too much waits for the disk"
    store.append(key(), 20, lines(20, 30))
    store.flush()
    assert store.append(key(), 20, lines(20, 30)) == 30
    store.flush()
    assert content(HistoryStore(tmp_path)) == {key(): (0, lines(0, 30))}


def test_digests_tell_how_far_streams_are_and_nothing_else(tmp_path: Path) -> None:
    one = HistoryStore(tmp_path / "1", SMALL)
    other = HistoryStore(tmp_path / "2")
    for number in range(200):
        one.append(key(), number, lines(number, number + 1))
        one.flush()
    other.append(key(), 0, lines(0, 200))
    assert one.digest(JOB) != other.digest(JOB)
    other.flush()
    assert one.first_seq(key()) > 0
    assert one.digest(JOB) == other.digest(JOB) != b""
    assert one.digest("other") == b""
    assert HistoryStore(tmp_path / "2").digest(JOB) == one.digest(JOB)


def test_idle_jobs_are_closed_and_opened_again(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, HistoryLimits(open_jobs=2))
    jobs = [f"job-{number}" for number in range(6)]
    for job_id in jobs:
        store.append(key(job_id=job_id), 0, lines(0, 4))
        store.flush()
    assert {job_id for job_id in jobs if store.digest_known(job_id)} == set(jobs[-2:])
    for job_id in jobs:
        assert store.append(key(job_id=job_id), 4, lines(4, 6)) == 6
    store.flush()
    assert all(store.read(key(job_id=job_id), 0) == lines(0, 6) for job_id in jobs)


async def test_background_writing_and_subscriptions(tmp_path: Path) -> None:
    async with HistoryStore(tmp_path, HistoryLimits(flush_s=0.001)) as store:
        subscription = store.subscribe(JOB)
        heard: list[tuple[Written, bool]] = []
        store.listen(lambda written, local: heard.append((written, local)))
        store.append(key(), 0, lines(0, 3))
        store.append(key(job_id="other"), 0, lines(0, 1), local=False)
        await store.settled()
        store.append(key(), 3, lines(3, 4))
        await store.settled()
        assert await subscription.get() == Written(key(), 0, lines(0, 3))
        assert await subscription.get() == Written(key(), 3, lines(3, 4))
        assert {(written.key.job_id, local) for written, local in heard} == {
            (JOB, True),
            ("other", False),
        }
        store.append(key(), 4, lines(4, 5))
    assert await subscription.get() == Written(key(), 4, lines(4, 5))
    assert await subscription.get() is None
    assert not subscription.slow
    assert HistoryStore(tmp_path).heads(JOB) == {key(): 5}


async def test_a_slow_subscriber_is_dropped_and_others_are_not(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    slow, quick = store.subscribe(JOB), store.subscribe(JOB)
    for number in range(40):
        store.append(key(), number, [b"x" * 60_000])
        store.flush()
        assert await quick.get() is not None
    assert slow.slow
    assert await slow.get() is None
    assert not quick.slow


def test_subscriptions_are_limited(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, HistoryLimits(subscriptions=2))
    first = store.subscribe(JOB)
    store.subscribe("other")
    with pytest.raises(TooManyRequests):
        store.subscribe(JOB)
    store.unsubscribe(first)
    store.unsubscribe(first)
    store.subscribe(JOB)


async def test_removal_ends_followers_even_during_a_write(tmp_path: Path) -> None:
    async with HistoryStore(tmp_path, HistoryLimits(flush_s=0.0)) as store:
        subscription = store.subscribe(JOB)
        store.append(key(), 0, lines(0, 3))
        store.remove(JOB)
        await store.settled()
        assert await subscription.get() is None
        assert store.pending_bytes == 0
    assert HistoryStore(tmp_path).jobs() == []


async def test_a_closed_store_has_no_live_end(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    await store.close()
    assert await store.subscribe(JOB).get() is None


def test_segments_that_vanish_are_passed_over(tmp_path: Path) -> None:
    limits = HistoryLimits(segment_bytes=300)
    store = HistoryStore(tmp_path, limits)
    for number in range(60):
        store.append(key(), number, lines(number, number + 1))
        store.flush()
    files = sorted((tmp_path / JOB).iterdir())
    files[0].unlink()
    assert store.read(key(), 0) == []
    assert store.read(key(), store.first_seq(key())) == lines(store.first_seq(key()), 60)
    assert content(HistoryStore(tmp_path, limits)) == content(store)


def test_a_job_that_cannot_be_made_is_offered_again(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path)
    (tmp_path / JOB).write_text("in the way")
    assert store.append(key(), 0, lines(0, 3)) == 0
    (tmp_path / JOB).unlink()
    assert store.append(key(), 0, lines(0, 3)) == 3
