"""A node does not outlive the parts that it is made of, and ends in time when it is asked to."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from distroml.config import NodeConfig, load
from distroml.node import composition, endings, process, registration
from distroml.node.composition import Node
from distroml.node.endings import NodeBroken, raise_for_dead

OPERATIONS = Path(__file__).parents[1] / "docs/operations.md"


async def _fails() -> None:
    raise RuntimeError("defect")


async def test_a_node_whose_part_has_died_ends_and_names_it() -> None:
    task = asyncio.create_task(_fails(), name="coordinator")
    await asyncio.wait({task})
    with pytest.raises(NodeBroken, match=r"its coordinator ended: RuntimeError\('defect'\)"):
        raise_for_dead({task})


async def test_a_part_that_just_returned_is_dead_too() -> None:
    task = asyncio.create_task(asyncio.sleep(0), name="reporter")
    await asyncio.wait({task})
    with pytest.raises(NodeBroken, match="its reporter ended"):
        raise_for_dead({task})


def test_while_all_live_nothing_happens() -> None:
    raise_for_dead(set())


def _config(directory: Path) -> NodeConfig:
    return load(["--data-dir", str(directory), "--name", "a"], {})


async def test_the_limit_of_the_stop_begins_after_ranks_have_saved_their_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    node = Node(_config(tmp_path), 1)

    async def leave() -> None:
        told.append("left")

    monkeypatch.setattr(composition, "leave_within", told.append)
    monkeypatch.setattr(node.registration, "leave", leave)
    await node._farewell()
    assert told == ["left", endings.STOP_LIMIT_S]


async def test_a_node_is_given_the_time_for_all_its_waits_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    class Stoppable:
        def __init__(self, config: NodeConfig, incarnation: int) -> None: ...

        async def run(self, stop: asyncio.Event) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            await stop.wait()

    monkeypatch.setattr(process, "Node", Stoppable)
    monkeypatch.setattr(process, "leave_within", limits.append)
    async with asyncio.timeout(10):
        await process._serve(_config(tmp_path))
    (limit_s,) = limits
    saved_s = registration.MOVE_TIMEOUT_S + registration.SAVE_TIMEOUT_S
    said_goodbye_s = saved_s + 2 * registration.FAREWELL_TIMEOUT_S
    assert said_goodbye_s + endings.STOP_LIMIT_S < limit_s
    assert f"{limit_s:g} s" in OPERATIONS.read_text(), "who sets up an init system reads it there"
