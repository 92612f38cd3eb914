"""Clusters of real ``distroml-node`` processes; a test that fails shows each node's log tail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from distroml.local_cluster import LocalCluster

StartCluster = Callable[..., AbstractAsyncContextManager[LocalCluster]]

_running: list[LocalCluster] = []


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """``async with start_cluster(nodes=3, slots=2) as cluster`` in a fresh directory."""
    count = 0

    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[LocalCluster]:
        nonlocal count
        count += 1
        cluster = LocalCluster(tmp_path / f"cluster-{count}", **options)
        _running.append(cluster)
        async with cluster:
            yield cluster

    yield start
    _running.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call" and report.failed:
        for cluster in _running:
            report.sections.append(("node logs", cluster.log_tails()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)
