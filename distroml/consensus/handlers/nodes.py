"""Nodes come into the cluster, are lost, return and leave."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from distroml import commands as c
from distroml.consensus.handlers.change import Change, Context, Handlers, Refused, new_event
from distroml.consensus.state import MAX_NODES, ClusterState
from distroml.model import Node, NodeStatus


def _register_node(state: ClusterState, context: Context, command: c.RegisterNode) -> Change:
    known = state.nodes.get(command.name)
    if known is not None and known.incarnation > command.incarnation:
        raise Refused("stale-proposer", f"{command.name} has a newer incarnation")
    nodes, proposers = state.nodes, state.proposers
    if known is None and len(nodes) >= MAX_NODES:
        gone = _longest_gone(state)
        nodes = {name: node for name, node in nodes.items() if name != gone}
        proposers = {name: record for name, record in proposers.items() if name != gone}
    # Who drained it waits for it to be empty; a crash in between must not fill it again.
    drained = known is not None and known.drained
    reason = f"incarnation {command.incarnation} registered"
    node = Node(
        name=command.name,
        incarnation=command.incarnation,
        http=command.http,
        slots=command.slots,
        status=NodeStatus.DRAINING if drained else NodeStatus.ALIVE,
        reason=f"{reason}, drained by request before" if drained else reason,
        drained=drained,
        registered_at=context.at,
        changed_at=context.at,
        workers_since=command.workers_since,
    )
    event = new_event(context, "node", node=node.name, status=node.status.value, reason=node.reason)
    changed = replace(state, nodes={**nodes, node.name: node}, proposers=proposers)
    return Change(changed, (event,))


def _longest_gone(state: ClusterState) -> str:
    """The node to forget: it is not alive, has no rank, and has been so for longest."""
    members = {
        member.node
        for job in state.active_jobs()
        if job.generation is not None
        for member in job.generation.members
    }
    gone = [
        node
        for node in state.nodes.values()
        if node.status is not NodeStatus.ALIVE and node.name not in members
    ]
    if not gone:
        raise Refused(
            "too-many-requests",
            f"the cluster has {MAX_NODES} nodes, and none that is gone can be forgotten.",
        )
    return min(gone, key=lambda node: (node.changed_at, node.name)).name


def _set_node_status(state: ClusterState, context: Context, command: c.SetNodeStatus) -> Change:
    node = state.nodes.get(command.name)
    if node is None:
        raise Refused("not-found", f"There is no node '{command.name}'.")
    if node.incarnation != command.incarnation:
        raise Refused("stale-proposer", f"{command.name} is at incarnation {node.incarnation}")
    changed = _changed(node, context, command)
    if (node.status, node.drained) == (changed.status, changed.drained):
        return Change(state)
    if node.status is NodeStatus.LEFT and changed.status is not NodeStatus.LEFT:
        # It said goodbye; what others thought of it before does not bring it back, only its next life does.
        raise Refused("wrong-status", f"node '{command.name}' has left")
    event = new_event(
        context, "node", node=node.name, status=changed.status.value, reason=command.reason
    )
    return Change(replace(state, nodes={**state.nodes, node.name: changed}), (event,))


def _changed(node: Node, context: Context, command: c.SetNodeStatus) -> Node:
    drained = node.drained if command.drained is None else command.drained
    if command.drained is not None and node.status in (NodeStatus.LOST, NodeStatus.LEFT):
        return replace(node, drained=drained)
    status = command.status
    if status is NodeStatus.ALIVE and drained:
        status = NodeStatus.DRAINING
    return replace(
        node, status=status, reason=command.reason, changed_at=context.at, drained=drained
    )


HANDLERS: Final[Handlers] = {
    c.RegisterNode: _register_node,
    c.SetNodeStatus: _set_node_status,
}
