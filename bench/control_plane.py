"""One real leader and simulated agents with their workers, ready to be measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench.players import Player, playing
from distroml.local_cluster import free_ports

SLOTS = 8
"""Workers of each agent, at most."""
AGENTS_PER_PROCESS = 63
START_TIMEOUT_S = 120.0


class ControlPlane(Struct, frozen=True):
    """The started parts, and what the coordinator placed."""

    leader: Player
    crowd: list[Player]
    """Each plays some of the agents."""
    placed: dict[str, Any]

    async def all_agents(self, order: str, timeout_s: float = 30.0, **arguments: Any) -> list[Any]:
        """The same order to every process of agents."""
        asked = (player.ask(order, timeout_s, **arguments) for player in self.crowd)
        return list(await asyncio.gather(*asked))


@asynccontextmanager
async def control_plane(directory: Path, workers: int) -> AsyncIterator[ControlPlane]:
    """A job of ``workers`` ranks trains, as far as the leader can tell, and each agent reports every 200 ms."""
    names = [f"agent-{number:03}" for number in range(-(-workers // SLOTS))]
    peer_port, http_port = free_ports(2)
    flags = ["--name", "a", "--peers", f"a=127.0.0.1:{peer_port}", "--slots", "0"]
    flags += ["--http", f"127.0.0.1:{http_port}", "--log-level", "warning"]
    flags += ["--data-dir", str(directory / "a"), "--store-dir", str(directory / "store")]
    async with AsyncExitStack() as stack:
        leader = await stack.enter_async_context(
            playing("leader_process", flags, directory / "leader.log")
        )
        await leader.ask("ready", START_TIMEOUT_S)
        crowd: list[Player] = []
        for begin in range(0, len(names), AGENTS_PER_PROCESS):
            log_path = directory / f"agents-{begin}.log"
            player = await stack.enter_async_context(playing("agents_process", [], log_path))
            part = names[begin : begin + AGENTS_PER_PROCESS]
            await player.ask(
                "connect", START_TIMEOUT_S, leader=f"127.0.0.1:{peer_port}", names=part, slots=SLOTS
            )
            crowd.append(player)
        await leader.ask("register", START_TIMEOUT_S, agents=names, slots=SLOTS)
        placed = await leader.ask("submit", START_TIMEOUT_S, workers=workers)
        plane = ControlPlane(leader, crowd, placed)
        generation = {key: value for key, value in placed.items() if key != "state"}
        await plane.all_agents("train", **generation)
        await leader.ask("until_running", START_TIMEOUT_S)
        yield plane
