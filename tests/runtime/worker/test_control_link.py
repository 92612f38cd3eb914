"""The worker's line to its agent, with the test at the other end of a real Unix socket."""

from __future__ import annotations

import queue
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from distroml.reports import Marks, WorkerPhase
from distroml.runtime.control import (
    MAX_FRAME_BYTES,
    MAX_METRIC_NAME_CHARS,
    MAX_METRIC_NAMES,
    Abort,
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
    ToWorker,
    encode_frame,
)
from distroml.runtime.worker.control_link import (
    MAX_PENDING_METRICS,
    MAX_REPEATED_METRICS,
    ControlLink,
    Position,
)
from distroml.runtime.worker.train import MAX_KEPT_RECORDS

WAIT_S = 20.0
HELLO = Hello(run_id="run", worker=1, generation=2, rank=0, pid=7)


class Agent:
    """Reads what the link writes, when asked to."""

    def __init__(self, directory: str) -> None:
        self.path = str(Path(directory) / "agent.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.messages: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self.gone = threading.Event()
        self.reason = ""
        self.link = ControlLink(self.path, self.messages.put, lambda: 1.5, self._end)
        self.socket, _ = self.listener.accept()
        self.socket.settimeout(WAIT_S)
        self._frames: FrameReader[Any] = FrameReader(FromWorker)
        self._messages: list[Any] = []

    def _end(self, reason: str) -> NoReturn:
        """In place of the end of the process."""
        self.reason = reason
        self.gone.set()
        _stand_still(reason)

    def next(self) -> Any:
        while not self._messages:
            self._messages += self._frames.feed(self.socket.recv(65_536))
        return self._messages.pop(0)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        yield Agent(directory)


def training(step: int, total_steps: int | None) -> Position:
    return Position(1, WorkerPhase.TRAINING, step, 0, total_steps)


def record(step: int) -> MetricRecord:
    return MetricRecord(step, 0, 0.0, {"loss": float(step)})


def test_lifecycle_frames_come_at_once_and_in_order(agent: Agent) -> None:
    hello = Hello(run_id="run", worker=1, generation=1, rank=0, pid=7)
    agent.link.send(hello)
    agent.link.phase(Position(1, WorkerPhase.RESTORING, 3, 0), Marks(met_at=5.0))
    assert agent.next() == hello
    told = agent.next()
    assert (told.generation, told.phase, told.step) == (1, WorkerPhase.RESTORING, 3)
    assert told.marks == Marks(met_at=5.0)


def test_a_pulse_tells_how_long_the_loop_has_been_waiting(agent: Agent) -> None:
    agent.link.phase(Position(2, WorkerPhase.TRAINING, 3, 0))
    assert agent.next().waiting_s == 0.0
    pulse = agent.next()
    assert (pulse.generation, pulse.step, pulse.waiting_s) == (2, 3, 1.5)


def test_pending_progress_does_not_undo_a_phase(agent: Agent) -> None:
    with agent.link._wake:  # as if both came within one interval
        agent.link.progress(training(9, 10), [record(9)])
        agent.link.phase(Position(1, WorkerPhase.FINISHING, 10, 0, 10))
    told = [agent.next() for _ in range(3)]
    assert [(one.phase, one.step) for one in told] == [
        (WorkerPhase.TRAINING, 9),
        (WorkerPhase.FINISHING, 10),
        (WorkerPhase.FINISHING, 10),
    ]


def test_metrics_are_batched_and_stay_in_front_of_what_follows(agent: Agent) -> None:
    note = ShardAbandoned(generation=1, step=5, reason="test")
    with agent.link._wake:  # as if all came within one interval
        for step in range(1, 6):
            agent.link.progress(training(step, 10), [record(step)])
        agent.link.send(note)
    progress = agent.next()
    assert [m.step for m in progress.metrics] == [1, 2, 3, 4, 5]
    assert (progress.step, progress.total_steps) == (5, 10)
    assert agent.next() == note


def test_progress_is_sent_without_a_lifecycle_frame(agent: Agent) -> None:
    agent.link.progress(training(1, 10), [record(1)])
    assert agent.next().metrics == (record(1),)
    agent.link.progress(training(2, 10))
    assert agent.next().step == 2


def test_the_oldest_metrics_are_dropped_and_counted(agent: Agent) -> None:
    extra = 10
    with agent.link._wake:
        for step in range(MAX_PENDING_METRICS + extra):
            agent.link.progress(training(step, None), [record(step)])
    assert agent.link.dropped_metrics == extra
    seen: list[int] = []
    while len(seen) < MAX_PENDING_METRICS:
        seen += [m.step for m in agent.next().metrics]
    assert seen == list(range(extra, MAX_PENDING_METRICS + extra))


def rich(step: int) -> MetricRecord:
    """As many metrics as a record may have, with names as long as they may be."""
    names = (f"{number:02}".ljust(MAX_METRIC_NAME_CHARS, "x") for number in range(MAX_METRIC_NAMES))
    return MetricRecord(step, 0, 0.0, dict.fromkeys(names, 0.5))


def test_what_a_holder_tells_again_arrives_however_much_it_is(agent: Agent) -> None:
    agent.link.progress(
        training(MAX_KEPT_RECORDS, None), [rich(step) for step in range(MAX_KEPT_RECORDS)]
    )
    seen: list[int] = []
    while len(seen) < MAX_KEPT_RECORDS:
        seen += [m.step for m in agent.next().metrics]
    assert seen == list(range(MAX_KEPT_RECORDS))


def test_a_link_that_cannot_tell_ends_the_process(agent: Agent) -> None:
    agent.link.send(ShardAbandoned(generation=1, step=1, reason=object()))  # type: ignore[arg-type]
    assert agent.gone.wait(WAIT_S), "it went on mute"
    assert "TypeError" in agent.reason


def test_flush_waits_for_the_reader(agent: Agent) -> None:
    megabyte = ShardAbandoned(generation=1, step=1, reason="x" * 1_000_000)
    agent.link.send(megabyte)
    assert not agent.link.flush(timeout_s=0.05)
    assert agent.next() == megabyte
    assert agent.link.flush(timeout_s=WAIT_S)


def test_messages_of_the_agent_reach_the_callback(agent: Agent) -> None:
    sent = [RendezvousKeys(keys={"g1/0/1": b"x"}), Abort(generation=1), Stop()]
    for message in sent:
        agent.socket.sendall(encode_frame(message))
    assert [agent.messages.get(timeout=WAIT_S) for _ in sent] == sent


def test_a_release_ends_the_wait_at_a_barrier(agent: Agent) -> None:
    agent.link.meetings.arrive("step/7", 7)
    assert agent.next() == Arrive(generation=0, name="step/7", value=7)
    assert agent.link.meetings.agreed("step/7") is None
    agent.socket.sendall(encode_frame(Released(generation=0, name="step/7", value=9)))
    assert agent.link.meetings.wait("step/7", WAIT_S) == 9


def test_the_end_of_the_agent_ends_a_worker_that_nobody_comes_back_for(agent: Agent) -> None:
    agent.socket.close()
    assert agent.gone.wait(WAIT_S), "the worker lived on"


def listening(directory: Path) -> socket.socket:
    """Where one agent after the other is found."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(directory / "agent.sock"))
    listener.listen(1)
    return listener


def train(link: ControlLink, steps: Iterable[int]) -> None:
    for step in steps:
        position = Position(2, WorkerPhase.TRAINING, step, 0)
        link.progress(position, [MetricRecord(step, 0, float(step), {"loss": 0.5})])


def steps_until(connection: socket.socket, last: int) -> list[int]:
    """Of all metrics that an agent is told, up to a step."""
    frames: FrameReader[Any] = FrameReader(FromWorker)
    told: list[int] = []
    connection.settimeout(WAIT_S)
    while last not in told:
        for message in frames.feed(connection.recv(65_536)):
            told += [record.step for record in getattr(message, "metrics", ())]
    return told


def test_an_agent_that_comes_back_hears_what_the_one_before_knew(tmp_path: Path) -> None:
    listener = listening(tmp_path)
    gone: list[str] = []

    def end(reason: str) -> NoReturn:
        gone.append(reason)
        _stand_still(reason)

    link = ControlLink(
        listener.getsockname(), lambda message: None, lambda: 0.0, end, hello=lambda: HELLO
    )
    abandoned = ShardAbandoned(generation=2, step=5, reason="disk")

    def read(connection: socket.socket, count: int) -> list[Any]:
        frames: FrameReader[Any] = FrameReader(FromWorker)
        messages: list[Any] = []
        connection.settimeout(WAIT_S)
        while len(messages) < count:
            messages += frames.feed(connection.recv(65_536))
        return messages

    first, _ = listener.accept()
    link.phase(Position(2, WorkerPhase.TRAINING, 3, 0), Marks(met_at=5.0))
    link.send(abandoned)
    read(first, 3)
    first.close()
    second, _ = listener.accept()
    greeting = read(second, 3)
    assert (greeting[0], greeting[2]) == (HELLO, abandoned)
    assert (greeting[1].generation, greeting[1].step) == (2, 3)
    assert greeting[1].marks == Marks(met_at=5.0)
    assert gone == []


def test_an_agent_that_comes_back_hears_the_newest_metrics_again_and_each_once(
    tmp_path: Path,
) -> None:
    listener = listening(tmp_path)
    link = ControlLink(
        listener.getsockname(),
        lambda message: None,
        on_agent_gone=_stand_still,
        hello=lambda: HELLO,
    )

    first, _ = listener.accept()
    link.phase(Position(2, WorkerPhase.TRAINING, 0, 0))
    train(link, [1, 2, 3])
    assert steps_until(first, 3) == [1, 2, 3]
    first.close()
    train(link, [4, 5])
    second, _ = listener.accept()
    assert steps_until(second, 5) == [1, 2, 3, 4, 5]
    second.close()
    third, _ = listener.accept()
    train(link, [6])
    assert steps_until(third, 6) == [1, 2, 3, 4, 5, 6]


def test_however_much_is_to_be_told_after_an_absence_the_last_words_before_it_come_first(
    tmp_path: Path,
) -> None:
    """What an agent was told right before it died is not pushed out by what happens until its successor comes."""
    listener = listening(tmp_path)
    link = ControlLink(
        listener.getsockname(),
        lambda message: None,
        on_agent_gone=_stand_still,
        hello=lambda: HELLO,
    )

    first, _ = listener.accept()
    link.phase(Position(2, WorkerPhase.TRAINING, 0, 0))
    train(link, range(1, 70))
    assert steps_until(first, 69) == list(range(1, 70))
    first.close()
    for begin in range(70, 2000, 40):
        train(link, range(begin, min(begin + 40, 2000)))
        link.send(
            ShardAbandoned(generation=2, step=begin, reason="no room")
        )  # as a checkpoint does
    for _ in ("the next agent", "and one that comes soon after it"):
        connection, _ = listener.accept()
        assert steps_until(connection, 1999) == list(range(1, 2000))
        connection.close()


def test_an_agent_that_comes_back_hears_metrics_again_that_no_single_frame_holds(
    tmp_path: Path,
) -> None:
    listener = listening(tmp_path)
    link = ControlLink(
        listener.getsockname(),
        lambda message: None,
        on_agent_gone=_stand_still,
        hello=lambda: HELLO,
    )
    link.phase(Position(2, WorkerPhase.TRAINING, 0, 0))
    count = MAX_REPEATED_METRICS
    assert count * len(encode_frame(_told(rich(0)))) > MAX_FRAME_BYTES
    link.progress(Position(2, WorkerPhase.TRAINING, count, 0), [rich(s) for s in range(count)])
    for _ in ("the first agent", "the next"):
        connection, _ = listener.accept()
        assert steps_until(connection, count - 1) == list(range(count))
        connection.close()


def _told(record: MetricRecord) -> Progress:
    return Progress(generation=2, phase=WorkerPhase.TRAINING, step=0, epoch=0, metrics=(record,))


def _stand_still(reason: str) -> NoReturn:
    """In place of the end of the process, which is that of the tests."""
    while True:
        threading.Event().wait()


def test_an_absent_agent_is_an_error() -> None:
    with pytest.raises(OSError, match="No such file"):
        ControlLink("/nowhere/agent.sock", lambda message: None)
