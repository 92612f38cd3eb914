"""A node does not outlive the parts that it is made of."""

from __future__ import annotations

import asyncio

import pytest

from distroml.node.composition import NodeBroken, _raise_for_dead


async def _fails() -> None:
    raise RuntimeError("defect")


async def test_a_node_whose_part_has_died_ends_and_names_it() -> None:
    task = asyncio.create_task(_fails(), name="coordinator")
    await asyncio.wait({task})
    with pytest.raises(NodeBroken, match=r"its coordinator ended: RuntimeError\('defect'\)"):
        _raise_for_dead({task})


async def test_a_part_that_just_returned_is_dead_too() -> None:
    task = asyncio.create_task(asyncio.sleep(0), name="reporter")
    await asyncio.wait({task})
    with pytest.raises(NodeBroken, match="its reporter ended"):
        _raise_for_dead({task})


def test_while_all_live_nothing_happens() -> None:
    _raise_for_dead(set())
