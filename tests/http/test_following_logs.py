"""``distroml logs -f`` against nodes: what it shows of a job that says nothing, and when its node goes."""

from __future__ import annotations

import asyncio
import json

import pytest

from distroml.cli.logs import follow_logs
from distroml.client import AsyncClient
from distroml.http import messages
from tests.http.node import Api, MemoryNode, log_line, served, until
from tests.http.test_jobs import finish


@pytest.fixture(autouse=True)
def quick_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "END_SETTLE_S", 0.05)


def running(node: MemoryNode) -> str:
    job_id = node.submit()
    node.run(job_id)
    node.history.add(job_id, log_line("old"))
    return job_id


class Screen:
    """What was printed so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    @property
    def lines(self) -> list[str]:
        self._text += self._capsys.readouterr().out
        return self._text.splitlines()


async def test_a_job_that_says_nothing_shows_what_it_said_before(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    node, screen = api.node, Screen(capsys)
    job_id = running(node)
    async with AsyncClient(api.base) as client:
        following = asyncio.create_task(follow_logs(client, job_id, None, 200, as_json=False))
        await until(lambda: screen.lines == ["[0] old"], "the tail is shown")
        node.history.add(job_id, log_line("new"))
        await until(lambda: screen.lines == ["[0] old", "[0] new"], "the new line is shown")
        finish(node, job_id)
        assert await following == 0


async def test_a_program_gets_lines_and_the_end(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = running(api.node)
    finish(api.node, job_id)
    async with AsyncClient(api.base) as client:
        await follow_logs(client, job_id, None, 200, as_json=True)
    shown = [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["log", "end"]


async def test_lines_written_between_two_nodes_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    node, screen = MemoryNode(), Screen(capsys)
    node.register("a")
    job_id = running(node)
    async with (
        served(node) as first,
        served(node) as second,
        AsyncClient([first.base, second.base]) as client,
    ):
        following = asyncio.create_task(follow_logs(client, job_id, None, 200, as_json=False))
        await until(lambda: screen.lines == ["[0] old"], "the tail is shown")
        node.knows_all = False  # nobody takes the reader over yet
        await first.server.stop()
        await until(lambda: not node.history.wakes[job_id], "the stream is closed")
        node.history.add(job_id, log_line("between"))
        node.knows_all = True
        await until(lambda: screen.lines == ["[0] old", "[0] between"], "no line is lost")
        finish(node, job_id)
        assert await following == 0
