"""The cluster: workers, resources, nodes and the leader, as the answering node knows them."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from distroml.commands import SetNodeStatus
from distroml.errors import (
    UNDECODABLE,
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    NotFound,
    Unavailable,
    UnsupportedMedia,
)
from distroml.http import cluster_views as views
from distroml.http import limits
from distroml.http.limits import Query, Read
from distroml.http.table import Answer, Call, Route, json_response
from distroml.model import NodeStatus

TRANSFER_TIMEOUT_S = 5.0
"""In which another leader must be seen; shorter than clients wait for an answer."""
_Wish = TypeVar("_Wish", bound=Struct)


async def get_workers(call: Call, query: Read) -> web.StreamResponse:
    """All worker processes."""
    return json_response(views.worker_list(call.services.state(), call.services.observed()))


async def get_resources(call: Call, query: Read) -> web.StreamResponse:
    """Slots in total and by node."""
    return json_response(views.resources_view(call.services.state(), call.services.observed()))


async def get_nodes(call: Call, query: Read) -> web.StreamResponse:
    """All nodes."""
    services = call.services
    raft = services.raft()
    shown = views.node_views(services.state(), services.observed(), raft, services.name)
    return json_response(shown)


async def get_leader(call: Call, query: Read) -> web.StreamResponse:
    """Who leads."""
    services = call.services
    return json_response(views.leader_view(services.state(), services.raft(), services.name))


async def get_digest(call: Call, query: Read) -> web.StreamResponse:
    """A digest of the replicated state, to compare nodes: at the same index all of them have the same one."""
    index, sha256 = await call.services.state_digest()
    return json_response(views.DigestView(self=call.services.name, index=index, sha256=sha256))


async def _wish(call: Call, kind: type[_Wish], *, shape: str, field: str) -> _Wish:
    """The body as ``kind``; an empty one is all defaults."""
    body = await limits.read_body(call.request, call.settings)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except UNDECODABLE as error:
        raise InvalidRequest(f"The body is not {shape}: {error}.", field=field) from None


class LeaderRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Who shall lead."""

    node: str | None = None
    """Null: any other voter; the leader takes the one that knows most."""


async def post_leader(call: Call, query: Query) -> web.StreamResponse:
    """Hand leadership over; asking for the node that leads already changes nothing."""
    wish = await _wish(call, LeaderRequest, shape='{"node": "name"}', field="node")
    await call.services.transfer_leadership(wish.node, TRANSFER_TIMEOUT_S)
    return await get_leader(call, Read())


class DrainRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the node is to have ranks."""

    drain: bool = True
    """False: it gets work again."""


async def post_drain(call: Call, query: Query) -> web.StreamResponse:
    """Have a node's ranks moved elsewhere after a whole step, or let it have some again, also one that is gone."""
    shape = '{"drain": true} or {"drain": false}'
    wish = await _wish(call, DrainRequest, shape=shape, field="drain")
    services, name = call.services, call.request.match_info["name"]
    node = services.state().nodes.get(name)
    if node is None:
        known = ", ".join(sorted(services.state().nodes)) or "none"
        raise NotFound(f"There is no node '{name[:100]}'; there are: {known}.")
    if wish.drain and node.status in (NodeStatus.LOST, NodeStatus.LEFT):
        raise Conflict(f"Node '{name}' is {node.status} ({node.reason}); it has no ranks.")
    command = SetNodeStatus(
        name=name,
        incarnation=node.incarnation,
        status=NodeStatus.DRAINING if wish.drain else NodeStatus.ALIVE,
        reason="drained by request" if wish.drain else "drained no longer, by request",
        drained=wish.drain,
    )
    outcome = await services.propose(command, call.settings.write_timeout_s)
    if outcome.error:
        raise Conflict(f"Node '{name}' changed meanwhile: {outcome.detail}")
    return await get_nodes(call, Read())


_READS = tuple(
    Route(
        method="GET",
        path=f"/api/cluster/{noun}",
        name=f"getCluster{noun.capitalize()}",
        summary=summary,
        tag="cluster",
        handler=handler,
        query=Read,
        answers=(Answer(200, summary, body),),
    )
    for noun, summary, handler, body in (
        ("workers", "All worker processes that agents report", get_workers, views.WorkerList),
        ("resources", "Slots in total and by node", get_resources, views.ResourcesView),
        ("nodes", "All nodes, their status and last heartbeat", get_nodes, views.NodeList),
        ("leader", "The leader, its term and address", get_leader, views.LeaderView),
        ("digest", "Digest of the answering node's replicated state", get_digest, views.DigestView),
    )
)

ROUTES = (
    *_READS,
    Route(
        method="POST",
        path="/api/cluster/leader",
        name="transferLeadership",
        summary="Hand leadership to another voter, at any node",
        tag="cluster",
        handler=post_leader,
        body=LeaderRequest,
        answers=(Answer(200, "The leader, its term and address", views.LeaderView),),
        errors=(NotFound, Conflict, Unavailable, BodyTooLarge, UnsupportedMedia),
    ),
    Route(
        method="POST",
        path="/api/cluster/nodes/{name}/drain",
        name="drainNode",
        summary="Move a node's ranks elsewhere after a whole step, or let it have some again",
        tag="cluster",
        handler=post_drain,
        body=DrainRequest,
        answers=(Answer(200, "All nodes, their status and last heartbeat", views.NodeList),),
        errors=(NotFound, Conflict, Unavailable, BodyTooLarge, UnsupportedMedia),
    ),
)
