"""Recoveries and step times, in views and for Prometheus."""

from __future__ import annotations

import time

from msgspec.structs import replace

from distroml import commands as c
from distroml.model import Cause, FailureKind
from distroml.reports import StepTiming
from tests.http.node import Api

TIMING = StepTiming(
    step_s=0.5, data_s=0.0625, compute_s=0.25, communication_s=0.125, idle_s=0.0625, slowest_s=1.0
)


async def test_a_recovery_is_told_phase_by_phase(api: Api) -> None:
    node = api.node
    job_id = node.submit(max_restarts=5)
    node.run(job_id)
    now = time.time()
    failed = c.FailGeneration(
        job_id=job_id,
        generation=1,
        cause=Cause(kind=FailureKind.HANG, rank=1, node="a"),
        collateral=(0,),
        observed_at=now - 1.0,
        highest_step=30,
        reason="generation 1: worker 1 on node a hangs",
        backoff_s=0.0,
    )
    node.apply(failed)
    node.form(job_id, resume_step=30)
    running = c.MarkRunning(
        job_id=job_id, generation=2, total_steps=100, resume_step=30, source="rank 0", met_at=now
    )
    node.apply(running)
    assert "distroml_recovery_duration_seconds_count" not in await exposition(api), "not over yet"
    node.apply(c.MarkStepped(job_id=job_id, generation=2, stepped_at=now + 2.0))
    (incident,) = (await api.get(f"/api/jobs/{job_id}/incidents")).json["incidents"]
    assert list(incident["phases_ms"]) == [
        "detect", "decide", "rendezvous", "first_step", "total"
    ]  # fmt: skip
    assert (incident["source"], incident["steps_lost"]) == ("rank 0", 0)
    shown = await exposition(api)
    assert 'distroml_recovery_duration_seconds_count{phase="total"} 1.0' in shown
    assert 'distroml_recovery_duration_seconds_bucket{le="5.0",phase="total"} 1.0' in shown
    assert 'distroml_recovery_duration_seconds_bucket{le="1.0",phase="total"} 0.0' in shown


async def test_where_the_time_of_each_rank_goes(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    node.run(job_id)
    seen = node.reports["a"]
    workers = tuple(
        replace(fact, timing=TIMING, worker=7) if fact.rank == 1 else fact
        for fact in seen.report.workers
    )
    node.reports["a"] = replace(seen, report=replace(seen.report, workers=workers))
    zero, one = (await api.get(f"/api/jobs/{job_id}")).json["workers"]
    assert zero["timing"] is None
    assert (one["worker"], one["timing"]["compute_s"]) == (7, 0.25)
    listed = (await api.get("/api/cluster/workers")).json["workers"]
    assert [worker["timing"] for worker in listed] == [None, one["timing"]]
    shown = await exposition(api)
    labels = f'job="{job_id}",name="demo",part="communication",rank="1"'
    assert f"distroml_worker_step_seconds{{{labels}}} 0.125" in shown
    assert 'rank="0"' not in shown


async def test_while_a_planned_change_lasts_those_who_train_are_shown(api: Api) -> None:
    node = api.node
    job_id = node.submit(resources={"workers": 3, "min_workers": 2})
    node.run(job_id)
    node.report(job_id, step=40)
    reports = dict(node.reports)
    node.form(job_id, workers=3, planned=True, joining=(2,))
    node.reports = reports
    shown = (await api.get(f"/api/jobs/{job_id}")).json
    assert (shown["status"], shown["generation"], shown["step"]) == ("RUNNING", 2, 40)
    assert [worker["phase"] for worker in shown["workers"]] == ["TRAINING", "TRAINING"]
    assert shown["current_generation"]["joining"] == [2]
    assert shown["current_generation"]["planned"] is True


async def exposition(api: Api) -> str:
    return (await api.get("/metrics")).body.decode()
