"""Looking at the head of the queue only never changes who starts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distroml.consensus.state import ClusterState
from distroml.model import JobStatus
from distroml.runtime.queue_window import queue_window
from distroml.runtime.scheduler import Host, Request, Schedule, schedule
from tests.builders import Log, form, members, node, submit

SLOTS = 4


def queue_of(jobs: list[tuple[int, int]]) -> ClusterState:
    """Two nodes of 2 slots and one QUEUED job per (workers, priority)."""
    log = Log()
    log.ok(node("a", slots=2))
    log.ok(node("b", slots=2))
    for number, (workers, priority) in enumerate(jobs):
        log.ok(submit(f"job-{number}", workers=workers, priority=priority))
    return log.state


def started(state: ClusterState) -> Schedule:
    requests = [
        Request(
            job_id=job.job_id,
            workers=job.spec.resources.workers,
            priority=job.spec.priority,
            submit_index=job.submit_index,
        )
        for job in state.active_jobs()
    ]
    hosts = [Host(node=name, incarnation=1, slots=2, free=2) for name in "ab"]
    return schedule(requests, hosts)


@given(
    st.lists(st.tuples(st.integers(1, 2 * SLOTS), st.integers(0, 2)), max_size=25),
    st.integers(SLOTS, 10),
)
def test_the_same_jobs_start_at_the_same_places(jobs: list[tuple[int, int]], window: int) -> None:
    state = queue_of(jobs)
    assert started(queue_window(state, window)).placements == started(state).placements


def test_a_short_queue_is_looked_at_as_it_is() -> None:
    state = queue_of([(1, 0)] * 3)
    assert queue_window(state, 3) is state


def test_only_queued_jobs_are_left_out() -> None:
    log = Log()
    log.state = queue_of([(1, 0)] * 6)
    log.sequence = 100
    log.ok(form("job-5", 1, members("a")))
    seen = queue_window(log.state, 2)
    assert list(seen.jobs) == ["job-0", "job-1", "job-5"]
    assert seen.jobs["job-5"].status is JobStatus.STARTING
    assert (seen.index, seen.nodes) == (log.state.index, log.state.nodes)


def test_jobs_that_never_fit_hide_nobody() -> None:
    state = queue_of([(99, 5)] * 10 + [(1, 0)])
    assert "job-10" in queue_window(state, 2).jobs
