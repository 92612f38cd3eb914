"""Runs the command line in this process or in its own, against fake nodes in a loop thread."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from distroml.cli.main import run
from tests.fake_nodes import Answer, FakeNode

COMMAND_TIMEOUT_S = 60.0


class Result:
    """What one call printed and exited with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Calls the command line in this process."""
    monkeypatch.delenv("DISTROML_URL", raising=False)

    def call(*tokens: object) -> Result:
        code = run([str(token) for token in tokens])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def program(*tokens: object, **options: Any) -> subprocess.Popen[str]:
    """Starts the command line as a process of its own, which Ctrl-C reaches also where it does not reach the tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "distroml.cli.main", *(str(token) for token in tokens)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
        **options,
    )


def finish(process: subprocess.Popen[str]) -> Result:
    """Waits for it, bounded."""
    out, err = process.communicate(timeout=COMMAND_TIMEOUT_S)
    return Result(process.returncode, out, err)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], FakeNode]]:
    """Starts a fake node that serves while the test blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    nodes: list[FakeNode] = []

    def start(answer: Answer) -> FakeNode:
        node = FakeNode(answer)
        asyncio.run_coroutine_threadsafe(node.start(), loop).result(COMMAND_TIMEOUT_S)
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        asyncio.run_coroutine_threadsafe(node.stop(), loop).result(COMMAND_TIMEOUT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(COMMAND_TIMEOUT_S)
    loop.close()
