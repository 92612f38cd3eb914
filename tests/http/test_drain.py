"""``POST /api/cluster/nodes/{name}/drain``: a node is drained, taken back, and nothing happens on a bad request."""

from __future__ import annotations

import pytest

from distroml import commands as c
from distroml.model import NodeStatus
from tests.http.node import Api

PATH = "/api/cluster/nodes/a/drain"


async def test_a_node_is_drained_and_taken_back(api: Api) -> None:
    for _ in range(2):
        drained = await api.call("POST", PATH, json={})
        assert drained.status == 200
        assert api.node.state().nodes["a"].status is NodeStatus.DRAINING
    (shown,) = [node for node in drained.json["nodes"] if node["name"] == "a"]
    assert (shown["status"], shown["reason"]) == ("DRAINING", "drained by request")
    back = await api.call("POST", PATH, json={"drain": False})
    assert back.status == 200
    assert not api.node.state().nodes["a"].drained


@pytest.mark.parametrize(
    ("path", "body", "status", "slug"),
    [
        ("/api/cluster/nodes/nobody/drain", {}, 404, "not-found"),
        (PATH, {"drain": "yes"}, 400, "invalid-request"),
        (PATH, {"undo": True}, 400, "invalid-request"),
        (PATH, [], 400, "invalid-request"),
    ],
)
async def test_a_bad_request_drains_nothing(
    api: Api, path: str, body: object, status: int, slug: str
) -> None:
    refused = await api.call("POST", path, json=body)
    assert (refused.status, refused.json["type"]) == (status, f"/problems/{slug}")
    assert api.node.state().nodes["a"].status is NodeStatus.ALIVE


@pytest.mark.parametrize("gone", [NodeStatus.LOST, NodeStatus.LEFT])
async def test_a_node_that_is_gone_cannot_be_drained(api: Api, gone: NodeStatus) -> None:
    command = c.SetNodeStatus(name="a", incarnation=1, status=gone, reason="silent for 3.1 s")
    await api.node.propose(command, 1.0)
    refused = await api.call("POST", PATH, json={})
    assert refused.status == 409
    assert "silent for 3.1 s" in refused.json["detail"]


@pytest.mark.parametrize("gone", [NodeStatus.LOST, NodeStatus.LEFT])
async def test_the_drain_of_a_node_that_is_gone_is_taken_back(api: Api, gone: NodeStatus) -> None:
    await api.call("POST", PATH, json={})
    command = c.SetNodeStatus(name="a", incarnation=1, status=gone, reason="silent for 3.1 s")
    await api.node.propose(command, 1.0)
    assert api.node.state().nodes["a"].drained
    for _ in range(2):
        back = await api.call("POST", PATH, json={"drain": False})
        assert back.status == 200
    now = api.node.state().nodes["a"]
    assert (now.status, now.drained) == (gone, False)
