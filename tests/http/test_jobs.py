"""Jobs over HTTP: writes, idempotency, lists, shapes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from msgspec.structs import replace

from distroml.commands import FailGeneration, FinishRun
from distroml.errors import OutcomeUnknown, Unavailable
from distroml.http import views
from distroml.model import Cause, FailureKind, JobStatus, Result
from tests.http.node import Api, MemoryNode, log_line, metric, served, until

SPEC = {
    "name": "mnist-ddp-demo",
    "framework": "pytorch",
    "model": "mlp",
    "dataset": "synthetic",
    "resources": {"workers": 4, "gpus_per_worker": 0},
    "distributed": {"strategy": "data_parallel", "backend": "gloo"},
    "hyperparameters": {"batch_size": 64, "lr": 0.001, "epochs": 2},
    "checkpointing": {"enabled": True, "every_n_steps": 200, "store": "local"},
    "compression": {"enabled": False},
}


async def test_submit_answers_201_with_location_and_the_whole_job(api: Api) -> None:
    reply = await api.call("POST", "/api/jobs", json=SPEC)
    assert reply.status == 201, reply.body
    job = reply.json
    assert reply.headers["Location"] == f"/api/jobs/{job['job_id']}"
    assert reply.headers["X-DistroML-Node"] == "a"
    assert int(reply.headers["X-DistroML-Index"]) == api.node.state().index
    assert (job["status"], job["name"], job["generation"], job["step"]) == (
        "QUEUED",
        "mnist-ddp-demo",
        0,
        0,
    )
    assert job["result"] is None
    assert job["workers"] == []
    assert job["spec"]["hyperparameters"]["batch_size"] == 64
    assert job["created_at"].endswith("Z")
    assert (await api.get(reply.headers["Location"])).json == job


async def test_same_key_and_request_make_one_job(api: Api) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = await api.call("POST", "/api/jobs", json=SPEC, headers=headers)
    # the same specification, written differently
    again = await api.call(
        "POST", "/api/jobs", json=dict(reversed(SPEC.items())) | {"seed": 0}, headers=headers
    )
    assert (first.status, again.status) == (201, 201)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json["job_id"] == first.json["job_id"]
    assert len(api.node.state().jobs) == 1


async def test_key_with_another_request_is_refused(api: Api) -> None:
    headers = {"Idempotency-Key": "k-1"}
    await api.call("POST", "/api/jobs", json=SPEC, headers=headers)
    other = await api.call("POST", "/api/jobs", json=SPEC | {"seed": 9}, headers=headers)
    assert (other.status, other.json["type"]) == (422, "/problems/idempotency-key-reused")
    assert len(api.node.state().jobs) == 1


async def test_retry_after_unknown_outcome_is_exactly_once(api: Api) -> None:
    headers = {"Idempotency-Key": "k-2"}
    api.node.fault = OutcomeUnknown("not confirmed")
    unknown = await api.call("POST", "/api/jobs", json=SPEC, headers=headers)
    assert (unknown.status, unknown.headers["Retry-After"]) == (504, "1")
    assert unknown.json["type"] == "/problems/outcome-unknown"
    assert (await api.call("POST", "/api/jobs", json=SPEC, headers=headers)).status == 201
    assert len(api.node.state().jobs) == 1


async def test_without_a_leader_writes_are_503_and_reads_go_on(api: Api) -> None:
    api.node.fault = Unavailable("no leader")
    refused = await api.call("POST", "/api/jobs", json=SPEC)
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    assert (await api.get("/api/jobs")).json == {"jobs": [], "next_cursor": None}


async def test_delete_cancels_then_removes(api: Api) -> None:
    job_id = api.node.submit()
    cancelled = await api.call("DELETE", f"/api/jobs/{job_id}")
    assert (cancelled.status, cancelled.json["status"]) == (202, "CANCELLED")
    removed = await api.call("DELETE", f"/api/jobs/{job_id}")
    assert (removed.status, removed.body) == (204, b"")
    gone = await api.call("DELETE", f"/api/jobs/{job_id}")
    assert (gone.status, gone.json["type"]) == (404, "/problems/not-found")


async def test_retried_delete_does_not_also_remove(api: Api) -> None:
    job_id = api.node.submit()
    headers = {"Idempotency-Key": "cancel-once"}
    first = await api.call("DELETE", f"/api/jobs/{job_id}", headers=headers)
    retry = await api.call("DELETE", f"/api/jobs/{job_id}", headers=headers)
    assert (first.status, retry.status) == (202, 202)
    assert retry.headers["Idempotent-Replayed"] == "true"
    assert job_id in api.node.state().jobs


async def test_retried_remove_is_204_again(api: Api) -> None:
    job_id = api.node.submit()
    await api.call("DELETE", f"/api/jobs/{job_id}")
    headers = {"Idempotency-Key": "remove-once"}
    replies = [await api.call("DELETE", f"/api/jobs/{job_id}", headers=headers) for _ in range(2)]
    assert [reply.status for reply in replies] == [204, 204]


@pytest.mark.parametrize("only", ["", "?only=cancel"])
async def test_cancel_that_comes_too_late_removes_nothing(api: Api, only: str) -> None:
    """The job completes between the route's look and the log's verdict; nor does a retry that finds it finished."""
    node = api.node
    job_id = node.submit()
    node.run(job_id)
    node.hold = asyncio.Event()
    path, headers = f"/api/jobs/{job_id}{only}", {"Idempotency-Key": "cancel-once"}
    deleting = asyncio.create_task(api.call("DELETE", path, headers=headers))
    await until(lambda: api.server._requests.inside, "the request reached the handler")
    finish(node, job_id)
    node.hold.set()
    for reply in (await deleting, await api.call("DELETE", path, headers=headers)):
        if only:
            assert (reply.status, reply.json["type"]) == (409, "/problems/conflict")
        else:
            assert (reply.status, reply.json["status"]) == (202, "COMPLETED")
        assert job_id in node.state().jobs


async def test_delete_does_only_what_it_was_meant_to(api: Api) -> None:
    job_id = api.node.submit()
    path = f"/api/jobs/{job_id}"
    early = await api.call("DELETE", f"{path}?only=remove")
    assert (early.status, early.json["type"]) == (409, "/problems/conflict")
    assert api.node.job(job_id).status is JobStatus.QUEUED
    cancelled = [await api.call("DELETE", f"{path}?only=cancel") for _ in range(2)]
    assert [(one.status, one.json["status"]) for one in cancelled] == [(202, "CANCELLED")] * 2
    assert (await api.call("DELETE", f"{path}?only=remove")).status == 204
    assert (await api.call("DELETE", f"{path}?only=cancel")).status == 404
    other = await api.call("DELETE", f"{path}?only=forget")
    assert (other.status, other.json["field"]) == (400, "only")


async def test_what_a_delete_is_meant_to_do_is_part_of_the_request(api: Api) -> None:
    job_id = api.node.submit()
    headers = {"Idempotency-Key": "k-1"}
    await api.call("DELETE", f"/api/jobs/{job_id}?only=cancel", headers=headers)
    other = await api.call("DELETE", f"/api/jobs/{job_id}?only=remove", headers=headers)
    assert (other.status, other.json["type"]) == (422, "/problems/idempotency-key-reused")


async def test_the_dashboard_only_cancels(api: Api) -> None:
    page = (await api.get("/")).body.decode()
    assert page.count('"DELETE"') == page.count("?only=cancel") == 1


def finish(node: MemoryNode, job_id: str) -> None:
    result = Result(state_digest="d" * 64, step=100, epoch=2, metrics={"accuracy": 0.97})
    outcome = node.apply(
        FinishRun(
            job_id=job_id,
            generation=node.job(job_id).generation_number,
            status=JobStatus.COMPLETED,
            reason="all steps done",
            result=result,
        )
    )
    assert not outcome.error


async def test_stop(api: Api) -> None:
    job_id = api.node.submit()
    api.node.run(job_id)
    stopping = await api.call("POST", f"/api/jobs/{job_id}/stop", json={})
    assert (stopping.status, stopping.json["status"]) == (202, "STOPPING")
    assert stopping.json["stop_requested"] is True
    finish(api.node, job_id)
    late = await api.call("POST", f"/api/jobs/{job_id}/stop")
    assert (late.status, late.json["type"]) == (409, "/problems/conflict")
    missing = await api.call("POST", "/api/jobs/job-none/stop")
    assert missing.status == 404


async def test_job_shape_while_running_and_after(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    node.run(job_id, workers=2, total_steps=100)
    node.report(job_id, step=40, epoch=1)
    node.history.add(job_id, metric(40, loss=0.5, throughput=900.0))
    job = (await api.get(f"/api/jobs/{job_id}")).json
    assert (job["status"], job["generation"], job["step"], job["total_steps"], job["epoch"]) == (
        "RUNNING",
        1,
        40,
        100,
        1,
    )
    assert job["workers"] == [
        {
            "rank": rank,
            "node": "a",
            "pid": 1000 + rank,
            "phase": "TRAINING",
            "step": 40,
            "worker": 0,
            "timing": None,
        }
        for rank in (0, 1)
    ]
    assert job["metrics"] == {"loss": 0.5, "throughput": 900.0}
    assert job["eta_s"] >= 0
    finish(node, job_id)
    done = (await api.get(f"/api/jobs/{job_id}")).json
    assert (done["status"], done["step"], done["workers"]) == ("COMPLETED", 100, [])
    assert done["result"]["state_digest"] == "d" * 64
    assert done["finished_at"] is not None


async def test_members_without_a_report_are_pending(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    node.form(job_id, workers=2)
    node.reports.clear()
    job = (await api.get(f"/api/jobs/{job_id}")).json
    assert [worker["phase"] for worker in job["workers"]] == ["PENDING", "PENDING"]


async def test_incident_shape(api: Api) -> None:
    node = api.node
    job_id = node.submit(max_restarts=5)
    node.run(job_id)
    cause = Cause(kind=FailureKind.EXIT, rank=1, node="a", pid=7, signal="SIGKILL")
    node.apply(
        FailGeneration(
            job_id=job_id,
            generation=1,
            cause=cause,
            collateral=(0,),
            observed_at=time.time() - 0.1,
            highest_step=30,
            reason="generation 1: worker 1 on node-a exited by SIGKILL",
            backoff_s=0.1,
        )
    )
    node.form(job_id, resume_step=20, checkpoint_step=20)
    listed = (await api.get(f"/api/jobs/{job_id}/incidents")).json
    (incident,) = listed["incidents"]
    assert incident["cause"]["signal"] == "SIGKILL"
    assert incident["collateral"] == [0]
    assert incident["steps_lost"] == 10
    assert set(incident["phases_ms"]) == {"detect", "decide"}
    assert (await api.get(f"/api/jobs/{job_id}/checkpoints")).json["checkpoints"] == []


async def test_ten_thousand_jobs_page_by_page_and_at_once(api: Api) -> None:
    node = api.node
    jobs = {}
    node.submit("job-0")
    template = node.job("job-0")
    for number in range(10_000):
        job_id = f"job-{number}"
        status = JobStatus.FAILED if number % 10 == 0 else JobStatus.QUEUED
        jobs[job_id] = replace(
            template, job_id=job_id, submit_index=number, change_index=1, status=status
        )
    node.replica.state = replace(node.state(), jobs=jobs, index=10_000)

    at_once = (await api.get("/api/jobs?limit=10000")).json
    assert len(at_once["jobs"]) == 10_000
    assert at_once["next_cursor"] is None
    order = [job["job_id"] for job in at_once["jobs"]]
    assert order[0] == "job-9999"
    assert order[-1] == "job-0"

    seen: list[str] = []
    cursor = None
    while True:
        params = {"limit": "3000"} | ({"cursor": cursor} if cursor else {})
        page = (await api.get("/api/jobs", params=params)).json
        seen += [job["job_id"] for job in page["jobs"]]
        if len(seen) == 3000:
            node.submit("job-new")  # newer ones do not disturb the pages that follow
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == order
    failed = (await api.get("/api/jobs?status=FAILED&limit=10000")).json
    assert len(failed["jobs"]) == 1000
    both = (await api.get("/api/jobs?status=FAILED,QUEUED&limit=1")).json
    assert both["jobs"][0]["job_id"] == "job-new"


async def test_list_by_name(api: Api) -> None:
    api.node.submit("job-1", name="one")
    api.node.submit("job-2", name="two")
    found = (await api.get("/api/jobs?name=two")).json
    assert [job["job_id"] for job in found["jobs"]] == ["job-2"]


async def test_default_page_is_one_hundred(api: Api) -> None:
    for number in range(101):
        api.node.submit(f"job-{number}")
    page = (await api.get("/api/jobs")).json
    assert len(page["jobs"]) == 100
    assert page["next_cursor"]


async def test_metrics_and_logs(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    node.run(job_id)
    node.history.add(job_id, *(metric(step, loss=1 / step, acc=0.5) for step in range(1, 101)))
    node.history.add(job_id, log_line("hello", rank=0), log_line("world", rank=1))
    path = f"/api/jobs/{job_id}/metrics"
    everything = (await api.get(path)).json
    assert everything["names"] == ["acc", "loss"]
    assert [one["name"] for one in everything["series"]] == ["acc", "loss"]
    part = (await api.get(f"{path}?name=loss&from_step=11&to_step=50&max_points=20")).json
    (series,) = part["series"]
    assert series["total"] == 40
    assert len(series["steps"]) == len(series["values"]) <= 20
    assert series["steps"][0] == 11
    logs = (await api.get(f"/api/jobs/{job_id}/logs?tail=1")).json
    assert [(line["rank"], line["line"]) for line in logs["lines"]] == [(1, "world")]
    of_rank = (await api.get(f"/api/jobs/{job_id}/logs?rank=0")).json
    assert [line["line"] for line in of_rank["lines"]] == ["hello"]
    assert (await api.get(f"/api/jobs/{job_id}/logs?tail=0")).json["lines"] == []


async def test_infinite_metrics_are_null(api: Api) -> None:
    job_id = api.node.submit()
    api.node.run(job_id)
    api.node.history.add(job_id, metric(1, loss=float("nan")))
    assert (await api.get(f"/api/jobs/{job_id}")).json["metrics"] == {"loss": None}


async def test_jobs_submitted_at_one_node_are_seen_with_its_name() -> None:
    node = MemoryNode(name="b")
    async with served(node) as api:
        assert (await api.get("/api/jobs")).headers["X-DistroML-Node"] == "b"


def test_timestamp() -> None:
    assert views.timestamp(0.25) == "1970-01-01T00:00:00.250Z"


async def test_a_list_says_of_which_state_it_is(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a long list is made the log goes on; what was applied meanwhile is not in it."""
    node, loop, make = api.node, asyncio.get_running_loop(), views.job_view
    node.submit()
    index = node.state().index

    def job_view(*arguments: Any) -> views.JobView:
        loop.call_soon(node.submit, "meanwhile")
        return make(*arguments)

    monkeypatch.setattr(views, "job_view", job_view)
    reply = await api.get("/api/jobs")
    assert [job["job_id"] for job in reply.json["jobs"]] == ["job-1"]
    assert node.state().index > index
    assert reply.headers["X-DistroML-Index"] == str(index)
