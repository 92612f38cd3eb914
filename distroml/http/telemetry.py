"""Prometheus: what is counted as it happens (requests here, jobs in ``tally``), and facts read at each scrape.

Labels are bounded: route names instead of paths, active jobs only, registered nodes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client import Counter as HttpCounter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distroml.http import views
from distroml.http.services import Services
from distroml.model import NodeStatus

MAX_JOBS = 256
"""Active jobs with series of their own; the oldest are shown."""
_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_JOB_METRICS = ("loss", "throughput", "accuracy")
MAX_RANKS = 1024
"""Ranks with series of their own, of all active jobs together."""
_STEP_PARTS = ("step", "data", "compute", "communication", "idle")


class Telemetry:
    """The registry of one node's HTTP server."""

    def __init__(self, services: Services) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # start times of series: a third more lines that nobody reads
        self._registry = CollectorRegistry()
        self._requests = HttpCounter(
            "distroml_http_requests_total",
            "HTTP requests answered.",
            ("method", "route", "code"),
            registry=self._registry,
        )
        self._durations = Histogram(
            "distroml_http_request_duration_seconds",
            "Time to answer an HTTP request; streams are left out.",
            ("method", "route"),
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(_ClusterFacts(services))
        self._registry.register(services.tally)

    def answered(self, method: str, route: str, code: int, duration_s: float | None) -> None:
        """Count one answer; ``duration_s`` is None for streams."""
        self._requests.labels(method, route, str(code)).inc()
        if duration_s is not None:
            self._durations.labels(method, route).observe(duration_s)

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)


class _ClusterFacts(Collector):
    def __init__(self, services: Services) -> None:
        self._services = services

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing to read before the node is up

    def collect(self) -> Iterator[Metric]:
        yield from _raft(self._services)
        yield from _nodes(self._services)
        yield from _jobs(self._services)
        yield from _counters(self._services)


def _raft(services: Services) -> Iterator[Metric]:
    raft = services.raft()
    gauges = {
        "raft_term": ("Raft term.", raft.term),
        "raft_is_leader": ("1 on the leader.", raft.leader == services.name),
        "raft_has_leader": ("1 where a leader is known.", raft.leader is not None),
        "raft_commit_index": ("Highest log index known to be committed.", raft.commit_index),
        "raft_applied_index": ("Highest log index applied here.", raft.applied_index),
        "raft_healthy": ("1 while consensus is healthy here.", raft.healthy),
    }
    for name, (help_, value) in gauges.items():
        yield GaugeMetricFamily(f"distroml_{name}", help_, value=float(value))
    info = GaugeMetricFamily(
        "distroml_node_info", "Name and version of this node.", labels=("node", "version")
    )
    info.add_metric((services.name, services.version), 1.0)
    yield info


def _nodes(services: Services) -> Iterator[Metric]:
    state = services.state()
    up = GaugeMetricFamily("distroml_node_up", "1 where the node is ALIVE.", labels=("node",))
    age = GaugeMetricFamily(
        "distroml_node_heartbeat_age_seconds", "Age of the last heartbeat here.", labels=("node",)
    )
    slots = GaugeMetricFamily(
        "distroml_slots", "Places for workers of living nodes.", labels=("node", "state")
    )
    used = state.slots_used()
    observed = services.observed()
    for name, node in sorted(state.nodes.items()):
        alive = node.status is NodeStatus.ALIVE
        busy = used.get(name, 0)
        up.add_metric((name,), float(alive))
        slots.add_metric((name, "used"), float(busy))
        slots.add_metric((name, "free"), float(max(0, node.slots - busy) if alive else 0))
        if name in observed:
            age.add_metric((name,), observed[name].age_s)
    yield from (up, age, slots)


def _jobs(services: Services) -> Iterator[Metric]:
    state = services.state()
    by_status = GaugeMetricFamily("distroml_jobs", "Jobs by status.", labels=("status",))
    for status, count in state.counts().items():
        by_status.add_metric((status.value,), float(count))
    yield by_status
    yield GaugeMetricFamily(
        "distroml_jobs_stored", "Jobs kept, finished ones included.", value=float(len(state.jobs))
    )
    yield from _active_jobs(services)


def _active_jobs(services: Services) -> Iterator[Metric]:
    labels = ("job", "name")
    position = {
        name: GaugeMetricFamily(f"distroml_job_{name}", help_, labels=labels)
        for name, help_ in (
            ("step", "Steps completed."),
            ("total_steps", "Steps in total."),
            ("generation", "Current generation."),
            ("restarts", "Failed generations."),
            ("workers", "Ranks that report."),
        )
    }
    measured = {
        name: GaugeMetricFamily(f"distroml_job_{name}", f"Newest {name}.", labels=labels)
        for name in _JOB_METRICS
    }
    step_time = GaugeMetricFamily(
        "distroml_worker_step_seconds",
        "Moving mean of a step's duration and of where it goes; a straggler idles least.",
        labels=(*labels, "rank", "part"),
    )
    ranks_left = MAX_RANKS
    facts = views.facts_of(services.observed())
    for job in services.state().active_jobs()[:MAX_JOBS]:
        key = (job.job_id, job.name)
        latest = services.history.latest_metrics(job.job_id)
        view = views.job_view(job, facts, latest, 0.0)
        reporting = sum(worker.phase != views.PENDING for worker in view.workers)
        position["step"].add_metric(key, float(view.step))
        if view.total_steps is not None:
            position["total_steps"].add_metric(key, float(view.total_steps))
        position["generation"].add_metric(key, float(view.generation))
        position["restarts"].add_metric(key, float(view.restarts))
        position["workers"].add_metric(key, float(reporting))
        for name, family in measured.items():
            if name in latest:
                family.add_metric(key, latest[name])
        timed = [worker for worker in view.workers if worker.timing is not None][:ranks_left]
        ranks_left -= len(timed)
        for worker in timed:
            for part in _STEP_PARTS:
                value = getattr(worker.timing, f"{part}_s")
                step_time.add_metric((*key, str(worker.rank), part), value)
    yield from (*position.values(), *measured.values(), step_time)


def _counters(services: Services) -> Iterator[Metric]:
    families: dict[str, Metric] = {}
    for one in services.counters():
        kind = "counter" if one.name.endswith("_total") else "gauge"
        name = one.name if one.name.startswith("distroml_") else f"distroml_{one.name}"
        family = families.setdefault(
            name, Metric(name.removesuffix("_total"), one.help or one.name, kind)
        )
        family.add_sample(name, one.labels, one.value)
    yield from families.values()
