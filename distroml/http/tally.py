"""What happens to jobs, counted as the log is applied, for ``/metrics``: failures, commits and recoveries.

``node`` wires it to the replica: ``replica.listen(tally.applied)``. It counts occurrences, not what is kept of them:
jobs are removed and checkpoints retired, and a counter that falls would pass for a restart. Every node counts for itself,
from its start on; what a node missed, because it was down or was given a snapshot, it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from distroml.commands import CommitCheckpoint, Entry, Outcome
from distroml.consensus.state import ClusterState
from distroml.model import Event
from distroml.runtime.incident_traces import newly_closed

RECOVERY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Tally(Collector):
    """Counts what entries do to jobs.

    Args:
        state: the replicated state as of the entry that is told.
        caught_up: false while a node that has just started applies its log again.
    """

    def __init__(self, state: Callable[[], ClusterState], caught_up: Callable[[], bool]) -> None:
        self._state, self._caught_up = state, caught_up
        self._seen = state()
        self._incidents = Counter(
            "distroml_incidents_total",
            "Failures of jobs that this node saw in the log since it started.",
            registry=None,
        )
        self._committed = Counter(
            "distroml_checkpoints_committed_total",
            "Commits of checkpoints that this node saw in the log since it started.",
            registry=None,
        )
        self._recoveries = Histogram(
            "distroml_recovery_duration_seconds",
            "Recoveries from failures that ended since this node started, by phase; 'total' is all of one.",
            ("phase",),
            buckets=RECOVERY_BUCKETS_S,
            registry=None,
        )

    def applied(self, entry: Entry | None, outcome: Outcome, events: tuple[Event, ...]) -> None:
        """Replica listener. Without an entry a snapshot replaced the state, in which nothing happened."""
        before, self._seen = self._seen, self._state()
        if entry is None or not self._caught_up():
            return
        job = self._seen.jobs.get(outcome.job_id or "")
        if job is None:
            return
        was = before.jobs.get(job.job_id)
        self._incidents.inc(job.failures - (was.failures if was else 0))
        if isinstance(entry.command, CommitCheckpoint):
            self._committed.inc(sum(event.type == "checkpoint" for event in events))
        for incident in newly_closed(was, job):
            if incident.first_step_at is not None:
                for phase, took_ms in incident.phases_ms.items():
                    self._recoveries.labels(phase).observe(took_ms / 1000)

    def collect(self) -> Iterator[Metric]:
        for counted in (self._incidents, self._committed, self._recoveries):
            yield from counted.collect()
