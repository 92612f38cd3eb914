"""What workers write enters history in order; what the disk cannot take is dropped and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime import history_sink as module
from distroml.runtime.control import MetricRecord
from distroml.runtime.history_sink import HistoryWriter
from distroml.runtime.store.records import StreamKey, decode_log, decode_metric

FACT = WorkerFact(job_id="j", run_id="r", generation=2, rank=1, phase=WorkerPhase.TRAINING)


class FakeStore:
    """Streams in lists; ``room`` records fit."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.streams: dict[StreamKey, list[bytes]] = {}

    def next_seq(self, key: StreamKey) -> int:
        return len(self.streams.get(key, []))

    def read(self, key: StreamKey, from_seq: int) -> list[bytes]:
        return self.streams[key][from_seq:]

    def append(self, key: StreamKey, first_seq: int, records: Sequence[bytes]) -> int:
        assert first_seq == self.next_seq(key)
        self.streams.setdefault(key, []).extend(records[: self.room])
        return self.next_seq(key)


def writer(store: FakeStore) -> HistoryWriter:
    made: Any = store
    return HistoryWriter(made)


def test_records_of_a_rank_follow_each_other_in_its_own_streams() -> None:
    store = FakeStore()
    history = writer(store)
    for step in (1, 2):
        history.take_metrics(FACT, (MetricRecord(step, 0, 1.0, {"loss": 0.5}),))
        history.take_logs(FACT, [f"line {step}"])
    metrics = store.streams[StreamKey("j", "r", 2, 1, "metrics")]
    logs = store.streams[StreamKey("j", "r", 2, 1, "logs")]
    assert [decode_metric(raw).step for raw in metrics] == [1, 2]
    assert [decode_log(raw).line for raw in logs] == ["line 1", "line 2"]
    assert history.dropped == 0


def test_what_a_worker_tells_the_next_agent_again_is_kept_once() -> None:
    store = FakeStore()
    records = [MetricRecord(step, 0, float(step), {"loss": 0.5}) for step in range(1, 8)]
    evaluated = MetricRecord(3, 0, 3.5, {"accuracy": 0.9})
    writer(store).take_metrics(FACT, (*records[:3], evaluated))

    successor = writer(store)
    successor.take_metrics(FACT, (*records[1:3], evaluated, *records[3:5]))
    successor.take_metrics(FACT, (records[5],))
    successor.take_metrics(FACT, (records[6],))

    (stored,) = store.streams.values()
    assert [decode_metric(raw).step for raw in stored] == [1, 2, 3, 3, 4, 5, 6, 7]


def test_what_the_next_agent_has_not_heard_of_is_all_new() -> None:
    store = FakeStore()
    records = [MetricRecord(step, 0, float(step), {"loss": 0.5}) for step in (1, 2, 3)]
    writer(store).take_metrics(FACT, tuple(records[:1]))

    writer(store).take_metrics(FACT, tuple(records[1:]))

    (stored,) = store.streams.values()
    assert [decode_metric(raw).step for raw in stored] == [1, 2, 3]


def test_what_a_slow_disk_cannot_take_is_counted() -> None:
    history = writer(FakeStore(room=1))
    history.take_logs(FACT, ["a", "b", "c"])
    assert history.dropped == 2


def test_a_record_that_is_too_large_does_not_take_the_others_with_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 100)
    store = FakeStore()
    history = writer(store)
    history.take_logs(FACT, ["short", "x" * 200, "also short"])
    (records,) = store.streams.values()
    assert [decode_log(raw).line for raw in records] == ["short", "also short"]
    assert history.dropped == 1
