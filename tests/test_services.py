"""What a node says of itself before the cluster has taken it in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from distroml.consensus.state import ClusterState
from distroml.model import Node
from distroml.services import NodeServices, Parts


def services(proposer: Any, state: ClusterState) -> NodeServices:
    parts = SimpleNamespace(
        proposer=proposer,
        replica=SimpleNamespace(state=state, recent_events=lambda: ()),
        history=SimpleNamespace(listen=lambda listener: None),
        replicator=SimpleNamespace(caught_up=None),
        files=None,
        config=SimpleNamespace(name="a", allowed_hosts=()),
        incarnation=1,
    )
    return NodeServices(cast(Parts, parts))


def test_a_former_life_with_the_same_number_does_not_say_that_the_log_was_applied() -> None:
    """A node that lost its directory counts from 1 again, and applies what the log says of its first life."""
    proposer = SimpleNamespace(registered=False)
    former = Node(name="a", incarnation=1, http="", slots=1)
    node = services(proposer, ClusterState(nodes={"a": former}))
    assert not node.caught_up()
    proposer.registered = True
    assert node.caught_up()
