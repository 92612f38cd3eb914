"""Health, readiness, metrics, problems, limits, and the description of the API."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import msgspec
import pytest

from distroml import errors
from distroml.consensus.state import decode_state, digest_state, encode_state
from distroml.http import problems
from distroml.http.app import ROUTES, HttpServer
from distroml.http.limits import HttpSettings
from tests.http.node import WAIT_S, Api, MemoryNode, Observed, Raft, metric, served, until
from tests.http.test_jobs import SPEC


async def test_health_is_200_also_when_not_ready(api: Api) -> None:
    api.node.readiness = (False, "no leader is known")
    api.node.raft_view = Raft(leader=None, role="candidate")
    health = await api.get("/health")
    assert (health.status, health.json["status"]) == (200, "degraded")
    assert health.json["details"] == {"uptime_s": 1.5}
    ready = await api.get("/ready")
    assert (ready.status, ready.headers["Retry-After"]) == (503, "1")
    assert "no leader is known" in ready.json["detail"]
    api.node.readiness = (True, "")
    assert (await api.get("/ready")).status == 200


async def test_before_it_has_caught_up_a_node_answers_503_on_the_api_only(api: Api) -> None:
    api.node.knows_all = False
    refused = await api.get("/api/jobs")
    assert (refused.status, refused.json["type"]) == (503, "/problems/unavailable")
    assert (await api.call("POST", "/api/jobs", json=SPEC)).status == 503
    assert (await api.get("/health")).status == 200


async def test_digest_is_equal_where_the_state_is(api: Api) -> None:
    first = (await api.get("/api/cluster/digest")).json
    assert first == {"self": "a", "index": api.node.state().index, "sha256": first["sha256"]}
    assert (await api.get("/api/cluster/digest")).json == first
    assert first["sha256"] == digest_state(decode_state(encode_state(api.node.state())))
    api.node.submit()
    second = (await api.get("/api/cluster/digest")).json
    assert second["index"] == first["index"] + 1
    assert second["sha256"] != first["sha256"]


async def test_cluster_views(api: Api) -> None:
    node = api.node
    node.register("b", slots=0)
    job_id = node.submit()
    node.run(job_id, workers=3)
    node.reports["b"] = Observed(
        node.reports["a"].report.__class__(node="b", incarnation=0, sequence=1, at=0, slots=0)
    )
    nodes = {one["name"]: one for one in (await api.get("/api/cluster/nodes")).json["nodes"]}
    assert nodes["a"]["leader"] is True
    assert nodes["a"]["slots_used"] == 3
    assert nodes["b"]["heartbeat_age_s"] is None, "a report of an earlier incarnation counts not"
    workers = (await api.get("/api/cluster/workers")).json["workers"]
    assert [(w["rank"], w["node"], w["current"]) for w in workers] == [
        (0, "a", True),
        (1, "a", True),
        (2, "a", True),
    ]
    resources = (await api.get("/api/cluster/resources")).json
    assert resources["slots"] == {"total": 4, "used": 3, "free": 1}
    assert resources["jobs"]["RUNNING"] == 1
    leader = (await api.get("/api/cluster/leader")).json
    assert leader["leader"] == "a"
    assert leader["term"] == 3
    assert leader["url"] == "http://a:1"
    assert leader["self"] == "a"


async def test_prometheus(api: Api) -> None:
    node = api.node
    job_id = node.submit()
    node.run(job_id)
    node.report(job_id, step=12)
    node.history.add(job_id, metric(12, loss=0.25))
    await api.get("/api/jobs")
    await api.get("/no/such/path")
    text = (await api.get("/metrics")).body.decode()
    for expected in (
        'distroml_jobs{status="RUNNING"} 1.0',
        "distroml_raft_term 3.0",
        "distroml_raft_is_leader 1.0",
        'distroml_node_up{node="a"} 1.0',
        'distroml_slots{node="a",state="free"} 2.0',
        f'distroml_job_step{{job="{job_id}",name="demo"}} 12.0',
        f'distroml_job_loss{{job="{job_id}",name="demo"}} 0.25',
        "distroml_incidents_total 0.0",
        "distroml_checkpoints_committed_total 0.0",
        'distroml_http_requests_total{code="200",method="GET",route="listJobs"} 1.0',
        'distroml_http_requests_total{code="404",method="GET",route="none"} 1.0',
        "distroml_http_request_duration_seconds_bucket",
        'distroml_peer_frames_sent_total{peer="b"} 7.0',
        'distroml_peer_queue_bytes{peer="b"} 12.0',
    ):
        assert expected in text, f"missing: {expected}"


def test_exposition_is_valid() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    async def go() -> None:
        node = MemoryNode()
        node.register("a")
        node.run(node.submit())
        server = HttpServer(node)
        families = text_string_to_metric_families(server._telemetry.exposition().decode())
        names = [family.name for family in families]
        assert len(names) == len(set(names))

    asyncio.run(go())


# --- problems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", sorted(problems.ERRORS))
async def test_problem_shape_of_every_error(api: Api, slug: str) -> None:
    kind = problems.ERRORS[slug]
    api.node.fault = kind("what and where", field="a.b", limit=3)
    reply = await api.call("POST", "/api/jobs", json=SPEC)
    assert reply.status == kind.status
    problem = reply.json
    assert problem == {
        "type": f"/problems/{slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": "what and where",
        "instance": "/api/jobs",
        "request_id": reply.headers["X-Request-Id"],
        "field": "a.b",
        "limit": 3,
    }
    if kind is not errors.ConfigError:
        explained = await api.get(problem["type"])
        assert explained.json["slug"] == slug
        assert explained.json["meaning"]


async def test_a_defect_is_a_500_without_details(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.node.fault = ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR):
        reply = await api.call("POST", "/api/jobs", json=SPEC)
    assert (reply.status, reply.json["type"]) == (500, "/problems/internal-error")
    assert b"secret detail" not in reply.body
    assert reply.json["request_id"] in caplog.text
    assert "secret detail" in caplog.text
    assert (await api.get("/api/jobs")).status == 200


async def test_authentication_seam() -> None:
    async def nobody(request: Any) -> None:
        raise errors.Unauthorized("Send a token.")

    node = MemoryNode()
    server = HttpServer(node, authenticate=nobody)
    host, port = await server.start("127.0.0.1", 0)
    try:
        import aiohttp

        async with aiohttp.ClientSession() as http:
            reply = await http.get(f"http://{host}:{port}/api/jobs")
            assert reply.status == 401
            assert (await reply.json(content_type=None))["type"] == "/problems/unauthorized"
    finally:
        await server.stop()


async def test_too_many_requests_are_429_and_probes_still_answered() -> None:
    node = MemoryNode(HttpSettings(requests_max=2))
    node.register("a")
    node.hold = asyncio.Event()
    async with served(node) as api, asyncio.timeout(WAIT_S):
        held = [asyncio.create_task(api.call("POST", "/api/jobs", json=SPEC)) for _ in range(2)]
        await until(lambda: api.server._requests.inside == 2, "both requests are held")
        refused = await api.get("/api/jobs")
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert (await api.get("/health")).status == 200
        assert (await api.get("/metrics")).status == 200
        node.hold.set()
        assert [(await one).status for one in held] == [201, 201]
        assert (await api.get("/api/jobs")).status == 200


# --- the description ---------------------------------------------------------------------------------------------


async def test_openapi_describes_exactly_what_is_served(api: Api) -> None:
    described = (await api.get("/openapi.json")).json
    assert described["openapi"].startswith("3.1")
    listed = {
        (method.upper(), path)
        for path, operations in described["paths"].items()
        for method in operations
    }
    assert listed == {(route.method, route.path) for route in ROUTES}
    served_paths = {
        (route.method, route.resource.canonical)
        for route in api.server.app.router.routes()
        if route.method not in ("HEAD", "OPTIONS") and route.resource
    }
    assert listed == served_paths
    ids = [op["operationId"] for ops in described["paths"].values() for op in ops.values()]
    assert len(ids) == len(set(ids))


async def test_openapi_references_resolve(api: Api) -> None:
    text = (await api.get("/openapi.json")).body.decode()
    known = msgspec.json.decode(text)["components"]["schemas"]
    for name in set(re.findall(r'"#/components/schemas/([^"]+)"', text)):
        assert name in known
    for name in ("JobSpec", "JobView", "Problem", "StreamMessage", "IncidentView"):
        assert name in known
    assert "\\\\Z" not in text, "a pattern that only Python understands"
    parameters = msgspec.json.decode(text)["paths"]["/api/jobs"]["get"]["parameters"]
    limit = next(one for one in parameters if one["name"] == "limit")
    assert limit["schema"]["maximum"] == 10_000
    assert limit["schema"]["default"] == 100


async def test_answers_fit_their_own_schemas(api: Api) -> None:
    """Each JSON answer decodes as the Struct that the document says it has."""
    node = api.node
    job_id = node.submit()
    node.run(job_id)
    node.history.add(job_id, metric(1))
    checked = 0
    for route in ROUTES:
        answer = route.answers[0]
        if route.method != "GET" or answer.body is None or "{step}" in route.path:
            continue  # those of one checkpoint need its files: test_checkpoints
        path = route.path.format(job_id=job_id, slug="conflict")
        reply = await api.get(path)
        assert reply.status == answer.status, path
        msgspec.json.decode(reply.body, type=answer.body)
        checked += 1
    assert checked == 14


async def test_dashboard_is_one_page_that_loads_nothing_else(api: Api) -> None:
    reply = await api.get("/")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    page = reply.body.decode()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page), "it loads something"
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", page)
    assert " style=" not in page, "the policy forbids inline style attributes"
    assert not re.findall(r"\son\w+=", page), "the policy forbids inline handlers"
