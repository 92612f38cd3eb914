"""A node's voice: regular, soon after a change, and never silent because of one bad report."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest
from msgspec.structs import replace

from distroml.consensus.peers import Channel
from distroml.model import FailureKind
from distroml.reports import NodeReport, WorkerFact, WorkerFailure, WorkerPhase
from distroml.runtime import reporter as module
from distroml.runtime.reporter import Reporter, ReporterSources
from tests.consensus.live import until

NEVER_S = 3600.0


class FakeLinks:
    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.refuses: Exception | None = None

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        assert channel is Channel.REPORT
        if self.refuses is not None:
            raise self.refuses
        self.sent.append((peer, body))
        return True


class World:
    """A reporter of node ``a`` with peers ``b`` and ``c``."""

    def __init__(self) -> None:
        self.links = FakeLinks()
        self.facts: tuple[WorkerFact, ...] = ()
        self.took: list[NodeReport] = []
        self.reporter: Reporter | None = None

    def start(self, interval_s: float = NEVER_S) -> Reporter:
        self.reporter = Reporter(
            node="a",
            incarnation=4,
            slots=2,
            peers=lambda: ("b", "c"),
            links=self.links,
            sources=ReporterSources(
                workers=lambda: self.facts, applied_index=lambda: 17, ready=lambda: True
            ),
            took=self.took.append,
            interval_s=interval_s,
        )
        self.reporter.start()
        return self.reporter

    def reports(self, peer: str = "b") -> list[NodeReport]:
        return [
            msgspec.msgpack.decode(body, type=NodeReport)
            for to, body in self.links.sent
            if to == peer
        ]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    if world.reporter is not None:
        await world.reporter.stop()


def fact(**fields: object) -> WorkerFact:
    made = WorkerFact(job_id="j", run_id="r", generation=1, rank=0, phase=WorkerPhase.TRAINING)
    return replace(made, **fields)


async def test_each_peer_and_the_node_itself_get_the_same_complete_report(world: World) -> None:
    world.facts = (fact(step=3),)
    world.start().kick()
    await until(lambda: len(world.links.sent) == 2, "a report to each peer")
    assert world.reports("b") == world.reports("c") == world.took
    (report,) = world.took
    assert (report.node, report.incarnation, report.slots) == ("a", 4, 2)
    assert (report.applied_index, report.ready, report.draining) == (17, True, False)
    assert report.workers == world.facts


async def test_it_reports_by_itself_with_growing_numbers(world: World) -> None:
    world.start(interval_s=0.001)
    await until(lambda: len(world.took) >= 3, "three reports")
    numbers = [report.sequence for report in world.took]
    assert numbers == sorted(set(numbers))


async def test_many_changes_at_once_are_one_report(world: World) -> None:
    reporter = world.start()
    for step in range(50):
        world.facts = (fact(step=step),)
        reporter.kick()
    await until(lambda: bool(world.took), "a report")
    reporter.kick()
    await until(lambda: len(world.took) == 2, "another report")
    assert [report.workers[0].step for report in world.took] == [49, 49]


async def test_a_report_that_cannot_be_sent_is_followed_by_the_next(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = world.start(interval_s=0.001)
    world.links.refuses = ValueError("frame of 5000000 bytes; the limit is 4194304")
    await until(lambda: reporter.failures >= 2, "two reports to fail")
    world.links.refuses = None
    await until(lambda: bool(world.links.sent), "a report")
    assert "could not be sent" in caplog.text
    assert reporter.task is not None
    assert not reporter.task.done()


async def test_a_report_over_the_limit_loses_words_before_keys(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REPORT_BYTES", 2000)
    reporter = world.start()
    failure = WorkerFailure(kind=FailureKind.ERROR, error="boom", traceback="t" * 8000, at=1.0)
    keys = {"g1/0": b"k" * 500}
    world.facts = (fact(failure=failure, last_lines=("l" * 300,) * 20, rendezvous=keys),)
    reporter.send_now()
    (report,) = world.reports()
    assert report.workers[0].failure is not None
    assert (report.workers[0].failure.error, report.workers[0].rendezvous) == ("boom", keys)
    assert world.took[0].workers[0].last_lines, "this node itself has them all"

    world.facts = (fact(rendezvous={"g1/0": b"k" * 5000}),)
    reporter.send_now()
    assert world.reports()[-1].workers[0].rendezvous == {}
