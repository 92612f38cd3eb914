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

MAX_OWN_STREAMS = 4096


class HistoryWriter:
    """Appends what the supervisor hands it; counts what the store could not take.

    The store refuses only while more than its ``pending_bytes`` wait for a disk that does not keep up. Then new
    records are dropped rather than kept in memory: training does not wait for its own telemetry. So are records
    that are too large to keep, which only the user's own code can make.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self.dropped = 0
        self._own: dict[StreamKey, None] = {}
        """Streams that this process has added to, the newest last."""

    def take_metrics(self, worker: WorkerFact, records: tuple[MetricRecord, ...]) -> None:
        """Append metrics of one rank.

        A worker whose agent crashed tells the next one its newest metrics again; those that were written are left out.
        """
        key = _key(worker, "metrics")
        encoded = [encode_metric(record) for record in records]
        if encoded and (newest := self._newest(key)) in encoded:
            encoded = encoded[encoded.index(newest) + 1 :]
        self._append(key, encoded)

    def take_logs(self, worker: WorkerFact, lines: list[str]) -> None:
        """Append lines of one rank's output."""
        now = time.time()
        self._append(_key(worker, "logs"), [encode_log(now, line) for line in lines])

    def _newest(self, key: StreamKey) -> bytes | None:
        """The last record that an earlier process wrote; None once this one has added to the stream."""
        if key in self._own or not (after := self._store.next_seq(key)):
            return None
        return next(reversed(self._store.read(key, after - 1)), None)

    def _append(self, key: StreamKey, records: list[bytes]) -> None:
        fitting = [record for record in records if len(record) <= MAX_RECORD_BYTES]
        self.dropped += len(records) - len(fitting)
        self._own[key] = None
        while len(self._own) > MAX_OWN_STREAMS:
            del self._own[next(iter(self._own))]
        first = self._store.next_seq(key)
        wanted = self._store.append(key, first, fitting)
        self.dropped += max(0, first + len(fitting) - wanted)


def _key(worker: WorkerFact, kind: Kind) -> StreamKey:
    return StreamKey(worker.job_id, worker.run_id, worker.generation, worker.rank, kind)
