"""``POST /api/cluster/leader``: leadership moves on request, and nothing happens on a bad one."""

from __future__ import annotations

import pytest

from tests.http.node import Api


async def test_leadership_moves_to_the_named_node(api: Api) -> None:
    moved = await api.call("POST", "/api/cluster/leader", json={"node": "b"})
    assert (moved.status, moved.json["leader"]) == (200, "b")
    again = await api.call("POST", "/api/cluster/leader", json={"node": "b"})
    assert (again.status, again.json["leader"]) == (200, "b")


async def test_without_a_name_any_other_node_may_take_over(api: Api) -> None:
    moved = await api.call("POST", "/api/cluster/leader", json={})
    assert (moved.status, moved.json["leader"]) == (200, "b")


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        ({"node": "nobody"}, 404, "not-found"),
        ({"node": 3}, 400, "invalid-request"),
        ({"to": "b"}, 400, "invalid-request"),
        ([], 400, "invalid-request"),
    ],
)
async def test_a_bad_request_moves_nothing(api: Api, body: object, status: int, slug: str) -> None:
    refused = await api.call("POST", "/api/cluster/leader", json=body)
    assert (refused.status, refused.json["type"]) == (status, f"/problems/{slug}")
    assert api.node.raft_view.leader == "a"
