"""The cluster: its nodes, and a summary of the whole."""

from __future__ import annotations

import asyncio

from distroml.cli.context import Ctx, console, print_json, print_table, size
from distroml.client import AsyncClient, Json
from distroml.model import NodeStatus


def nodes(*, ctx: Ctx) -> int:
    """List the nodes and what each offers."""
    page = ctx.run(AsyncClient.nodes)
    if ctx.json:
        print_json(page)
        return 0
    print_nodes(page)
    return 0


def cluster(*, ctx: Ctx) -> int:
    """Show the leader, the nodes and how much is in use.

    With --json: the answers of the API under "leader", "nodes" and "resources".
    """

    async def work(client: AsyncClient) -> dict[str, Json]:
        answers = await asyncio.gather(client.leader(), client.nodes(), client.resources())
        return dict(zip(("leader", "nodes", "resources"), answers, strict=True))

    answer = ctx.run(work)
    if ctx.json:
        print_json(answer)
        return 0
    leader, listed = answer["leader"], answer["nodes"]["nodes"]
    slots, by_status = answer["resources"]["slots"], answer["resources"]["jobs"]
    alive = sum(node["status"] == NodeStatus.ALIVE for node in listed)
    counts = ", ".join(f"{count} {status}" for status, count in by_status.items() if count)
    out = console()
    out.print(f"leader  {leader['leader'] or 'none (an election runs)'}, term {leader['term']}")
    out.print(f"nodes   {alive} of {len(listed)} alive")
    out.print(f"slots   {slots['used']} of {slots['total']} in use")
    out.print(f"jobs    {counts or 'none'}")
    out.print()
    print_nodes(answer["nodes"])
    return 0


def leader(node: str | None = None, /, *, ctx: Ctx) -> int:
    """Show the leader, or hand leadership to another node.

    Args:
        node: voter that shall lead from now on; training goes on meanwhile.
    """
    if node is None:
        answer = ctx.run(AsyncClient.leader)
    else:
        answer = ctx.run(lambda client: client.transfer_leadership(node))
    if ctx.json:
        print_json(answer)
        return 0
    console().print(
        f"{answer['leader'] or 'none (an election runs)'}, term {answer['term']}"
        + (f", {answer['url']}" if answer["url"] else "")
    )
    return 0


def drain(node: str, /, *, undo: bool = False, ctx: Ctx) -> int:
    """Move a node's workers elsewhere after a whole step; it gets no new ones, also after a restart, until --undo.

    Args:
        node: name of the node.
        undo: let it have workers again.
    """
    page = ctx.run(lambda client: client.drain(node, undo=undo))
    if ctx.json:
        print_json(page)
    else:
        print_nodes(page)
    return 0


def print_nodes(page: Json) -> None:
    """The table of nodes."""
    print_table(
        ("NAME", "STATUS", "ROLE", "SLOTS", "INCARNATION", "CPU", "MEMORY", "HTTP", "REASON"),
        (
            (
                row["name"],
                row["status"],
                "leader" if row["leader"] else row["role"],
                f"{row['slots_used']}/{row['slots']}",
                row["incarnation"],
                _percent(row["cpu_percent"]),
                size(row["memory_bytes"]),
                row["http"],
                row["reason"],
            )
            for row in page["nodes"]
        ),
        empty="No node is registered yet.",
        right=("SLOTS", "INCARNATION", "CPU", "MEMORY"),
    )


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}%"
