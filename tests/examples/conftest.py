"""The worker tests' stand-in for an agent, for the examples."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STUB = Path(__file__).parents[1] / "runtime" / "worker" / "agent_stub.py"


@pytest.fixture(scope="module")
def agent() -> Iterator[Any]:
    module_spec = importlib.util.spec_from_file_location("example_agent_stub", STUB)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    module_spec.loader.exec_module(module)
    # not tmp_path: a Unix socket's path is limited to about 100 bytes
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        stub = module.AgentStub(Path(directory))
        yield stub
        stub.close()
