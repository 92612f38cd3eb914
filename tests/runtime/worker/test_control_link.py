"""The worker's line to its agent, with the test at the other end of a real Unix socket."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distroml.reports import WorkerPhase
from distroml.runtime.control import (
    Arrive,
    FrameReader,
    FromWorker,
    Hello,
    MetricRecord,
    Progress,
    Released,
    RendezvousKeys,
    ShardAbandoned,
    Stop,
    encode_frame,
)
from distroml.runtime.worker.control_link import MAX_PENDING_METRICS, ControlLink

WAIT_S = 20.0


class Agent:
    """Reads what the link writes, when asked to."""

    def __init__(self, directory: str) -> None:
        self.path = str(Path(directory) / "agent.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.keys: list[dict[str, bytes]] = []
        self.stop = threading.Event()
        self.gone = threading.Event()
        self.link = ControlLink(self.path, self.keys.append, self.stop.set, self._end)
        self.socket, _ = self.listener.accept()
        self.socket.settimeout(WAIT_S)
        self._frames: FrameReader[Any] = FrameReader(FromWorker)
        self._messages: list[Any] = []

    def _end(self, reason: str) -> NoReturn:
        """In place of the end of the process."""
        self.gone.set()
        while True:
            threading.Event().wait()

    def next(self) -> Any:
        while not self._messages:
            self._messages += self._frames.feed(self.socket.recv(65_536))
        return self._messages.pop(0)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        yield Agent(directory)


def record(step: int) -> MetricRecord:
    return MetricRecord(step, 0, 0.0, {"loss": float(step)})


def test_lifecycle_frames_come_at_once_and_in_order(agent: Agent) -> None:
    hello = Hello(run_id="run", generation=1, rank=0, pid=7)
    agent.link.send(hello)
    agent.link.phase(WorkerPhase.RESTORING, 3, 0)
    assert agent.next() == hello
    assert agent.next() == Progress(phase=WorkerPhase.RESTORING, step=3, epoch=0)


def test_metrics_are_batched_and_stay_in_front_of_what_follows(agent: Agent) -> None:
    note = ShardAbandoned(step=5, reason="test")
    with agent.link._wake:  # as if all came within one interval
        for step in range(1, 6):
            agent.link.progress(WorkerPhase.TRAINING, step, 0, 10, record(step))
        agent.link.send(note)
    progress = agent.next()
    assert [m.step for m in progress.metrics] == [1, 2, 3, 4, 5]
    assert (progress.step, progress.total_steps) == (5, 10)
    assert agent.next() == note


def test_progress_is_sent_without_a_lifecycle_frame(agent: Agent) -> None:
    agent.link.progress(WorkerPhase.TRAINING, 1, 0, 10, record(1))
    assert agent.next().metrics == (record(1),)
    agent.link.progress(WorkerPhase.TRAINING, 2, 0, 10)
    assert agent.next().step == 2


def test_the_oldest_metrics_are_dropped_and_counted(agent: Agent) -> None:
    extra = 10
    with agent.link._wake:
        for step in range(MAX_PENDING_METRICS + extra):
            agent.link.progress(WorkerPhase.TRAINING, step, 0, None, record(step))
    assert agent.link.dropped_metrics == extra
    seen: list[int] = []
    while len(seen) < MAX_PENDING_METRICS:
        seen += [m.step for m in agent.next().metrics]
    assert seen == list(range(extra, MAX_PENDING_METRICS + extra))


def test_flush_waits_for_the_reader(agent: Agent) -> None:
    megabyte = ShardAbandoned(step=1, reason="x" * 1_000_000)
    agent.link.send(megabyte)
    assert not agent.link.flush(timeout_s=0.05)
    assert agent.next() == megabyte
    assert agent.link.flush(timeout_s=WAIT_S)


def test_frames_of_the_agent_reach_the_callbacks(agent: Agent) -> None:
    agent.socket.sendall(encode_frame(RendezvousKeys(keys={"g1/0/1": b"x"})))
    agent.socket.sendall(encode_frame(Stop()))
    assert agent.stop.wait(WAIT_S), "the stop never arrived"
    assert agent.keys == [{"g1/0/1": b"x"}]


def test_a_release_ends_the_wait_at_a_barrier(agent: Agent) -> None:
    agent.link.meetings.arrive("step/7", 7)
    assert agent.next() == Arrive(name="step/7", value=7)
    assert agent.link.meetings.agreed("step/7") is None
    agent.socket.sendall(encode_frame(Released(name="step/7", value=9)))
    assert agent.link.meetings.wait("step/7", WAIT_S) == 9


def test_the_end_of_the_agent_ends_the_worker(agent: Agent) -> None:
    agent.socket.close()
    assert agent.gone.wait(WAIT_S), "the worker lived on"


def test_an_absent_agent_is_an_error() -> None:
    with pytest.raises(OSError, match="No such file"):
        ControlLink("/nowhere/agent.sock", lambda keys: None, lambda: None)
