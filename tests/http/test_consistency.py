"""``?consistency=``: which reads wait for the leader's word, and what they answer without one."""

from __future__ import annotations

import pytest

from distroml.http.app import ROUTES
from tests.http.node import Api, Raft

READS = sorted(
    route.path for route in ROUTES if route.method == "GET" and route.path.startswith("/api/")
)


@pytest.mark.parametrize(
    "path",
    # Those of one checkpoint need its files: test_checkpoints.
    [path for path in READS if not path.endswith(("stream", "events")) and "{step}" not in path],
)
async def test_every_read_of_the_api_can_be_linearizable(api: Api, path: str) -> None:
    path = path.replace("{job_id}", api.node.submit())
    assert (await api.get(path)).status == 200
    assert api.node.barriers == 0
    assert (await api.get(f"{path}?consistency=local")).status == 200
    assert api.node.barriers == 0
    assert (await api.get(f"{path}?consistency=linearizable")).status == 200
    assert api.node.barriers == 1


async def test_a_linearizable_read_without_a_leader_is_refused_and_a_local_one_is_not(
    api: Api,
) -> None:
    api.node.raft_view = Raft(leader=None, role="candidate")
    refused = await api.get("/api/jobs?consistency=linearizable")
    assert (refused.status, refused.json["type"]) == (503, "/problems/unavailable")
    assert (await api.get("/api/jobs")).status == 200


async def test_an_unknown_consistency_is_named(api: Api) -> None:
    refused = await api.get("/api/jobs?consistency=eventual")
    assert (refused.status, refused.json["field"]) == (400, "consistency")


@pytest.mark.parametrize("what", ["", "/metrics", "/incidents"])
async def test_a_job_that_another_node_took_a_moment_ago_is_found(api: Api, what: str) -> None:
    api.node.behind = api.node.submit
    assert (await api.get(f"/api/jobs/job-1{what}")).status == 200
    assert (await api.get(f"/api/jobs/job-1{what}")).status == 200
    assert api.node.barriers == 1


async def test_without_a_leader_an_unknown_job_is_just_that(api: Api) -> None:
    api.node.raft_view = Raft(leader=None, role="candidate")
    refused = await api.get("/api/jobs/job-1")
    assert (refused.status, refused.json["type"]) == (404, "/problems/not-found")
