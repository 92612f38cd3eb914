"""The part of a long queue that a turn of the coordinator looks at.

Pure. The queue is strict, so of thousands of waiting jobs only the first ones can start; looking at all of them
would take longer than an election timeout. Everything that is not QUEUED stays.
"""

from __future__ import annotations

from msgspec.structs import replace

from distroml.consensus.state import ClusterState
from distroml.model import Job, JobStatus

WINDOW = 512
"""QUEUED jobs that are looked at; far more than can start in one turn."""


def queue_window(state: ClusterState, window: int = WINDOW) -> ClusterState:
    """``state`` without the QUEUED jobs behind the first ``window`` ones.

    Jobs larger than all registered nodes together stand aside in the scheduler, so they are counted apart: any
    number of them at the head of the queue keeps nobody else from being seen.
    """
    queued = [job for job in state.jobs.values() if job.status is JobStatus.QUEUED]
    if len(queued) <= window:
        return state
    slots = sum(node.slots for node in state.nodes.values())
    queued.sort(key=_queue_order)
    fitting = [job for job in queued if job.spec.resources.fewest <= slots]
    larger = [job for job in queued if job.spec.resources.fewest > slots]
    # Those that wait to begin with another job's checkpoint are seen, lest that be retired.
    behind = {job.job_id for job in (*fitting[window:], *larger[window:]) if job.initial is None}
    return replace(state, jobs={key: job for key, job in state.jobs.items() if key not in behind})


def _queue_order(job: Job) -> tuple[int, int, str]:
    return (-job.spec.priority, job.submit_index, job.job_id)
