"""What local workers put out on its way into history: their metrics, and the lines of their log files.

Training does not suffer from what happens to either, so nothing here raises. The log files of runs that are over
are removed here as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from distroml.reports import WorkerFact
from distroml.runtime.control import MetricRecord
from distroml.runtime.local_worker import LocalWorker
from distroml.runtime.log_tail import remove_logs, stale_logs

PRUNE_S = 60.0

_log = logging.getLogger(__name__)


class HistorySink(Struct, frozen=True, kw_only=True):
    """Where metrics and log lines of local workers go; both are called in the event loop."""

    metrics: Callable[[WorkerFact, tuple[MetricRecord, ...]], None]
    logs: Callable[[WorkerFact, list[str]], None]


class WorkerOutput:
    """Hands the output of local workers to ``sink``.

    Args:
        log_dir: where the log files of all runs are.
        monotonic: seconds of a clock that only goes forward.
    """

    def __init__(self, log_dir: Path, *, sink: HistorySink, monotonic: Callable[[], float]) -> None:
        self._log_dir = log_dir
        self._sink = sink
        self._monotonic = monotonic
        self._prune_due_s = 0.0
        self._pruning: asyncio.Task[None] | None = None

    def ship_metrics(self, fact: WorkerFact, metrics: tuple[MetricRecord, ...]) -> None:
        """Metrics that a worker told of."""
        with _telemetry_may_fail():
            self._sink.metrics(fact, metrics)

    def ship_log(self, local: LocalWorker, *, final: bool = False) -> None:
        """New lines of a worker's log; with ``final`` all that is left of it."""
        try:
            lines = local.tail.poll(final=final)
        except OSError as error:
            _log.warning("the log %s cannot be read: %s", local.tail.path, error)
            return
        if lines:
            with _telemetry_may_fail():
                self._sink.logs(local.fact, lines)

    @property
    def prune_due(self) -> bool:
        """Whether it is time to look for log files that can go."""
        busy = self._pruning is not None and not self._pruning.done()
        return not busy and self._monotonic() >= self._prune_due_s

    def prune(self, runs: Mapping[str, int], busy: Collection[tuple[str, int]]) -> None:
        """Remove log files in the background; ``runs`` and ``busy`` as in ``log_tail.stale_logs``."""
        self._prune_due_s = self._monotonic() + PRUNE_S
        # Looked up here and now, removed in a thread: what begins meanwhile is not on the list.
        stale = stale_logs(self._log_dir, runs, busy)
        if stale:
            self._pruning = asyncio.create_task(asyncio.to_thread(remove_logs, stale))


@contextlib.contextmanager
def _telemetry_may_fail() -> Iterator[None]:
    try:
        yield
    except Exception:
        _log.exception("metrics or log lines were lost")
