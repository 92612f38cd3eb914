"""Where the output of local workers enters history: one stream per rank of a generation and kind."""

from __future__ import annotations

import time

from distroml.reports import WorkerFact
from distroml.runtime.control import MetricRecord
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import (
    MAX_RECORD_BYTES,
    Kind,
    StreamKey,
    encode_log,
    encode_metric,
)


class HistoryWriter:
    """Appends what the supervisor hands it; counts what the store could not take.

    The store refuses only while more than its ``pending_bytes`` wait for a disk that does not keep up. Then new
    records are dropped rather than kept in memory: training does not wait for its own telemetry. So are records
    that are too large to keep, which only the user's own code can make.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self.dropped = 0

    def take_metrics(self, worker: WorkerFact, records: tuple[MetricRecord, ...]) -> None:
        """Append metrics of one rank."""
        self._append(worker, "metrics", [encode_metric(record) for record in records])

    def take_logs(self, worker: WorkerFact, lines: list[str]) -> None:
        """Append lines of one rank's output."""
        now = time.time()
        self._append(worker, "logs", [encode_log(now, line) for line in lines])

    def _append(self, worker: WorkerFact, kind: Kind, records: list[bytes]) -> None:
        fitting = [record for record in records if len(record) <= MAX_RECORD_BYTES]
        self.dropped += len(records) - len(fitting)
        key = StreamKey(worker.job_id, worker.run_id, worker.generation, worker.rank, kind)
        first = self._store.next_seq(key)
        wanted = self._store.append(key, first, fitting)
        self.dropped += max(0, first + len(fitting) - wanted)
