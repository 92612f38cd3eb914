from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.http.node import Api, MemoryNode, served


@pytest.fixture
def node() -> MemoryNode:
    node = MemoryNode()
    node.register("a")
    return node


@pytest.fixture
async def api(node: MemoryNode) -> AsyncIterator[Api]:
    async with served(node) as api:
        yield api
