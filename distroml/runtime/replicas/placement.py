"""On which nodes the copies of a file belong, and which are to be made where some were lost. Pure.

Rendezvous hashing (Thaler and Ravishankar, 1998): each node has a weight for each file, and the heaviest have it. A node
that comes or goes moves only the copies that are its own. Whoever wrote a file keeps it, whatever its weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from msgspec import Struct

DEFAULT_COPIES = 2
"""Of each file, where a job does not say (``checkpointing.replicas``)."""


class Repair(Struct, frozen=True):
    """A copy to be made."""

    target: str
    sources: tuple[str, ...]
    """Who has the file, those first that stay."""


def order(path: str, nodes: Iterable[str]) -> list[str]:
    """``nodes`` in the order in which they are to have ``path``."""
    return sorted(nodes, key=lambda node: (_weight(path, node), node), reverse=True)


def wanted(replicas: int | None, nodes: int) -> int:
    """How many copies there should be, of ``nodes`` that can hold one."""
    return max(1, min(DEFAULT_COPIES if replicas is None else replicas, nodes))


def lacking(
    held_by: Collection[str], staying: Collection[str], copies: int, central: Collection[str]
) -> int:
    """How many copies of a file are to be made, as far as nodes can have them; as ``repairs``."""
    have = [node for node in held_by if node in staying]
    out_of_reach = _one_of(staying, central) and not _one_of(have, central)
    return max(copies - len(have), 1 if out_of_reach else 0)


def repairs(
    path: str,
    held_by: Collection[str],
    staying: Collection[str],
    copies: int,
    central: Collection[str],
) -> list[Repair]:
    """The copies of ``path`` to be made now.

    Args:
        held_by: reachable nodes that have it.
        staying: nodes that may hold copies from now on; what only others have is to be copied from them.
        copies: how many there should be, on staying nodes.
        central: nodes that all others can reach. Of two others neither reaches the other, so one of these has each file.
    """
    if not held_by:
        return []
    sources = tuple(sorted(held_by, key=lambda node: (node not in staying, node)))
    for_all = _one_of(held_by, central)
    able = [node for node in staying if node not in held_by and (for_all or node in central)]
    targets = order(path, able)
    if not _one_of([node for node in held_by if node in staying], central):
        targets.sort(key=lambda node: node not in central)
    lack = lacking(held_by, staying, copies, central)
    return [Repair(node, sources) for node in targets[:lack]]


def _one_of(nodes: Iterable[str], central: Collection[str]) -> bool:
    return any(node in central for node in nodes)


def _weight(path: str, node: str) -> bytes:
    return hashlib.sha256(f"{node}\0{path}".encode()).digest()
