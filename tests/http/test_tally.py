"""What a node counts as the log is applied, for Prometheus: no counter ever falls."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from distroml import commands as c
from distroml.consensus.state import encode_state
from distroml.http.tally import Tally
from distroml.model import Cause, FailureKind, JobStatus
from tests.builders import checkpoint
from tests.http.node import Api, MemoryNode

INCIDENTS = "distroml_incidents_total", ()
COMMITTED = "distroml_checkpoints_committed_total", ()
RECOVERIES = "distroml_recovery_duration_seconds_count", (("phase", "total"),)

Counts = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def running(node: MemoryNode) -> str:
    job_id = node.submit(max_restarts=5)
    node.run(job_id)
    return job_id


def commits(node: MemoryNode, job_id: str, *steps: int) -> None:
    number = node.job(job_id).generation_number
    for step in steps:
        one = checkpoint(step, generation=number)
        outcome = node.apply(c.CommitCheckpoint(job_id=job_id, generation=number, checkpoint=one))
        assert not outcome.error, outcome


def recovers(node: MemoryNode, job_id: str) -> c.MarkStepped:
    """A failure and the recovery from it; returns the command that ended it."""
    failed, now = node.job(job_id).generation_number, time.time()
    node.apply(
        c.FailGeneration(
            job_id=job_id,
            generation=failed,
            cause=Cause(kind=FailureKind.EXIT, rank=1, node="a"),
            observed_at=now,
            highest_step=30,
            reason="worker 1 exited",
            backoff_s=0.0,
        )
    )
    node.run(job_id)
    stepped = c.MarkStepped(job_id=job_id, generation=failed + 1, stepped_at=now + 2.0)
    assert not node.apply(stepped).error
    return stepped


async def counters(api: Api) -> Counts:
    """All samples that must not fall."""
    text = (await api.get("/metrics")).body.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.endswith(("_total", "_bucket", "_count", "_sum"))
    }


async def test_no_counter_falls_when_what_it_counted_is_not_kept_any_more(api: Api) -> None:
    node = api.node
    job_id = running(node)
    commits(node, job_id, 10, 20)
    recovers(node, job_id)
    before = await counters(api)
    assert (before[INCIDENTS], before[COMMITTED], before[RECOVERIES]) == (1, 2, 1)

    commits(node, job_id, 40)
    node.apply(c.RetireCheckpoints(job_id=job_id, steps=(10, 20), reason="not kept"))
    retired = await counters(api)
    assert retired[COMMITTED] == 3
    _assert_none_falls(before, retired)

    node.apply(c.CancelJob(job_id=job_id, reason="enough"))
    node.apply(c.RemoveJob(job_id=job_id))
    removed = await counters(api)
    assert (removed[INCIDENTS], removed[COMMITTED], removed[RECOVERIES]) == (1, 3, 1)
    _assert_none_falls(retired, removed)


def _assert_none_falls(before: Counts, after: Counts) -> None:
    assert [name for name, value in before.items() if after.get(name, -1.0) < value] == []


async def test_what_is_repeated_counts_once(api: Api) -> None:
    node = api.node
    job_id = running(node)
    commits(node, job_id, 10, 10)
    node.apply(recovers(node, job_id))
    seen = await counters(api)
    assert (seen[INCIDENTS], seen[COMMITTED], seen[RECOVERIES]) == (1, 1, 1)


async def test_the_failure_that_ends_a_run_is_an_incident_and_no_recovery(api: Api) -> None:
    node = api.node
    job_id = running(node)
    cause = Cause(kind=FailureKind.ERROR, rank=1, error="ValueError: x")
    failed = c.FinishRun(
        job_id=job_id, generation=1, status=JobStatus.FAILED, reason="gave up", cause=cause
    )
    assert not node.apply(failed).error
    seen = await counters(api)
    assert (seen[INCIDENTS], seen.get(RECOVERIES)) == (1, None)


async def test_what_a_start_reads_from_the_log_again_does_not_count_again(api: Api) -> None:
    node = api.node
    job_id = running(node)
    node.knows_all = False
    commits(node, job_id, 10)
    node.knows_all = True
    commits(node, job_id, 20)
    assert (await counters(api))[COMMITTED] == 1


def test_a_snapshot_counts_nothing() -> None:
    leader, follower = MemoryNode(), MemoryNode(name="b")
    leader.register("a")
    recovers(leader, running(leader))
    follower.replica.restore(leader.state().index, encode_state(leader.state()))
    assert _value(follower.tally, "distroml_incidents_total") == 0
    follower.register("b")
    assert _value(follower.tally, "distroml_incidents_total") == 0


def _value(tally: Tally, name: str) -> float:
    (value,) = [s.value for family in tally.collect() for s in family.samples if s.name == name]
    return float(value)
