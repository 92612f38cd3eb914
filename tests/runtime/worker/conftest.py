"""One forkserver for all worker tests of a module: starting it imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.worker.agent_stub import AgentStub


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentStub]:
    # not tmp_path: a Unix socket's path is limited to about 100 bytes
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        stub = AgentStub(Path(directory))
        yield stub
        stub.close()
