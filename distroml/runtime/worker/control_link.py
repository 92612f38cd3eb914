"""The worker's line to its agent: one Unix socket, a reading thread and a writing thread.

The step loop never waits for the agent. Lifecycle frames (hello, phases, shards, the last word) are queued and
never dropped; metrics are gathered for up to 100 ms and, where the agent does not read, the oldest are dropped
and counted. A pulse goes out while nothing else does, with how long the step loop has been waiting for other ranks:
that tells a worker that hangs from those that wait for it.

End of file means that the agent is gone. Training goes on without it for a while, since an agent that crashed comes
back: it is greeted anew and told again what the one before may have taken to its grave. If none comes, the process
ends, since nobody is left to watch it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import msgspec

from distroml.reports import Marks, StepTiming, WorkerPhase
from distroml.runtime.control import (
    AGENT_GRACE_S,
    PULSE_S,
    Awaited,
    CheckpointHere,
    Failed,
    Finished,
    FrameReader,
    FromWorker,
    Hello,
    MetricRecord,
    Parked,
    Progress,
    Released,
    Rendezvous,
    ShardAbandoned,
    ShardDurable,
    ToWorker,
    encode_frame,
)
from distroml.runtime.worker.meetings import Meetings
from distroml.runtime.worker.supply import Supply

CONNECT_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 10.0
PROGRESS_INTERVAL_S = 0.1
MAX_PENDING_METRICS = 4096
MAX_METRICS_PER_FRAME = 1024
MAX_REPEATED_METRICS = MAX_PENDING_METRICS
"""The newest ones, which an agent that crashed may have taken and not yet written (it takes some 50 ms for that, but one that
comes back is told at once what has gathered)."""
MAX_LIFECYCLE_FRAMES = 4096
"""An agent that leaves this many unread is taken for dead."""
READ_BYTES = 65_536
AGENT_GONE_EXIT = 1
RECONNECT_S = 0.05
ACCEPTED_S = 1.0
"""An agent that keeps a connection for so long does want this worker."""
MAX_REMEMBERED = 64
_REMEMBERED = (Rendezvous, Parked, ShardDurable, ShardAbandoned, Failed, Finished)


class Position(NamedTuple):
    """Where a worker is."""

    generation: int
    phase: WorkerPhase
    step: int
    epoch: int
    total_steps: int | None = None
    timing: StepTiming | None = None
    evaluating: bool = False


class ControlLink:
    """Sends this worker's facts to the agent and hands the agent's messages to a callback.

    Args:
        path: the agent's Unix socket.
        on_message: called in the reading thread with each message of the agent.
        waiting_s: for how long the step loop has been in its present collective; 0 outside of one.
        hello: what the agent is greeted with on each connection; None: the test says it.
        on_agent_gone: called with the reason in whichever thread sees it; never returns. Also where the line is of no use
            for another reason: a worker that is mute or deaf would be taken for one that hangs.

    Raises:
        OSError: the agent cannot be reached within ``CONNECT_TIMEOUT_S``.
    """

    def __init__(
        self,
        path: str,
        on_message: Callable[[ToWorker], None],
        waiting_s: Callable[[], float] = lambda: 0.0,
        on_agent_gone: Callable[[str], NoReturn] | None = None,
        *,
        hello: Callable[[], Hello] | None = None,
        grace_s: float = AGENT_GRACE_S,
    ) -> None:
        self._path = path
        self._on_message, self._waiting_s = on_message, waiting_s
        self._on_agent_gone = on_agent_gone or end_process
        self._hello, self._grace_s = hello, grace_s
        self._socket = self._connect()
        self._connected = True
        self.meetings = Meetings(self.send)
        """Barriers with the other ranks, by way of the agents."""
        self.supply = Supply(self.send)
        """Files of checkpoints, which the agent brings here."""
        self._wake = threading.Condition(threading.RLock())
        self._lifecycle: deque[FromWorker] = deque()
        self._metrics: deque[MetricRecord] = deque(maxlen=MAX_PENDING_METRICS)
        self._sent: deque[MetricRecord] = deque(maxlen=MAX_REPEATED_METRICS)
        """The newest of the present generation that an agent was sent."""
        self._position: Position | None = None
        """News of the step loop that are not yet queued."""
        self._last: Position | None = None
        """What a pulse repeats."""
        self._marks: Marks | None = None
        self._told: deque[FromWorker] = deque(maxlen=MAX_REMEMBERED)
        """What an agent that comes back must hear again, of the present generation."""
        self._writing = False
        self._progress_due_s = 0.0
        self._lost_s = time.monotonic()
        self.dropped_metrics = 0
        if hello is not None:
            self._lifecycle.append(hello())
        for work, name in ((self._write, "control-write"), (self._read, "control-read")):
            threading.Thread(target=self._live, args=(work,), name=name, daemon=True).start()

    # --- the step loop's side ----------------------------------------------------------------------------------

    def send(self, message: FromWorker) -> None:
        """Queue a lifecycle frame behind everything told so far."""
        with self._wake:
            if len(self._lifecycle) >= MAX_LIFECYCLE_FRAMES:
                self._on_agent_gone(f"the agent left {MAX_LIFECYCLE_FRAMES} frames unread")
            self._gather_progress()
            self._lifecycle.append(message)
            if isinstance(message, _REMEMBERED):
                self._told.append(message)
            self._wake.notify()

    def progress(self, position: Position, records: Sequence[MetricRecord] = ()) -> None:
        """Tell where the worker is; sent at the next 100 ms mark. Costs a lock and an append."""
        with self._wake:
            idle = self._position is None
            self._position = position
            for record in records:
                self.dropped_metrics += len(self._metrics) == MAX_PENDING_METRICS
                self._metrics.append(record)
            if idle:
                self._wake.notify()

    def phase(self, position: Position, marks: Marks | None = None) -> None:
        """Tell a change of phase now."""
        with self._wake:
            self._gather_progress()  # or else it would become the last word
            if self._last is None or self._last.generation != position.generation:
                self._told.clear()
                self._sent.clear()
            self._last, self._marks = position, marks
            self.send(_progress(position, marks=marks))

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything queued is in the socket; False if that took too long."""
        with self._wake:
            self._gather_progress()
            self._wake.notify()
            return self._wake.wait_for(
                lambda: not self._lifecycle and not self._writing, timeout=timeout_s
            )

    # --- threads -----------------------------------------------------------------------------------------------

    def _gather_progress(self) -> None:
        """Turn the pending position and metrics into frames; the lock is held."""
        if self._position is None:
            return
        self._last, self._position = self._position, None
        records = list(self._metrics)
        self._metrics.clear()
        for begin in range(0, max(1, len(records)), MAX_METRICS_PER_FRAME):
            part = tuple(records[begin : begin + MAX_METRICS_PER_FRAME])
            self._lifecycle.append(_progress(self._last, metrics=part, waiting_s=self._waiting_s()))

    def _pulse(self) -> None:
        """Repeat where the worker is, since there are no news; the lock is held."""
        if self._last is not None:
            self._lifecycle.append(_progress(self._last, waiting_s=self._waiting_s()))

    def _live(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self._on_agent_gone(f"its line to the agent failed ({type(error).__name__}: {error})")

    def _write(self) -> None:
        while True:
            messages = self._next_messages()
            data = b"".join(_frames(message) for message in messages)
            try:
                self._socket.sendall(data)
                settle = self._note_sent
            except OSError:
                settle = self._keep_for_the_next
            with self._wake:
                settle(messages)
                self._writing = False
                self._wake.notify_all()

    def _next_messages(self) -> list[FromWorker]:
        """Wait for what is to be sent: lifecycle frames at once, progress when it is due, else a pulse."""
        pulse_s = time.monotonic() + PULSE_S
        with self._wake:
            while not self._lifecycle or not self._connected:
                now_s = time.monotonic()
                due_s = self._progress_due_s if self._position is not None else pulse_s
                if not self._connected:
                    self._wake.wait()
                elif self._position is not None and now_s >= due_s:
                    self._gather_progress()
                    self._progress_due_s = now_s + PROGRESS_INTERVAL_S
                elif now_s >= pulse_s:
                    self._pulse()
                    pulse_s = now_s + PULSE_S
                else:
                    self._wake.wait(min(due_s, pulse_s) - now_s)
            messages = list(self._lifecycle)
            self._lifecycle.clear()
            self._writing = True
            return messages

    def _note_sent(self, messages: list[FromWorker]) -> None:
        """The lock is held."""
        present = self._last.generation if self._last is not None else 0
        for message in messages:
            if isinstance(message, Progress) and message.generation == present:
                self._sent.extend(message.metrics)

    def _keep_for_the_next(self, messages: list[FromWorker]) -> None:
        """The agent is gone; what it has not read waits for its successor. The reading thread looks for that; the lock is held."""
        self._connected = False
        self._lifecycle.extendleft(reversed([m for m in messages if not isinstance(m, Hello)]))
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reading thread

    def _read(self) -> None:
        while True:
            reason = self._read_to_the_end()
            with self._wake:
                self._connected = False
            self._reconnect(reason)

    def _read_to_the_end(self) -> str:
        """Take the agent's messages until its connection ends; why it did."""
        frames: FrameReader[ToWorker] = FrameReader(ToWorker)
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as error:
                return f"the agent cannot be read from ({error})"
            if not data:
                return "the agent closed the control socket"
            for message in frames.feed(data):
                if isinstance(message, Released | Awaited):
                    self.meetings.take(message)
                elif isinstance(message, CheckpointHere):
                    self.supply.take(message)
                else:
                    self._on_message(message)

    # --- an agent that comes back ------------------------------------------------------------------------------

    def _connect(self) -> socket.socket:
        agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            agent.settimeout(CONNECT_TIMEOUT_S)
            agent.connect(self._path)
            agent.settimeout(None)
        except OSError:
            agent.close()
            raise
        self._connected_s = time.monotonic()
        return agent

    def _reconnect(self, reason: str) -> None:
        """Find the next agent; one that refuses us is tried again until the grace is over."""
        if time.monotonic() - self._connected_s >= ACCEPTED_S:
            self._lost_s = time.monotonic()
        while self._hello is not None and time.monotonic() - self._lost_s < self._grace_s:
            time.sleep(RECONNECT_S)
            try:
                agent = self._connect()
            except OSError:
                continue
            with self._wake:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                # What is being written is either sent or kept by then, so the greeting stays in front of all.
                self._wake.wait_for(lambda: not self._writing)
                self._socket.close()
                self._socket = agent
                self._lifecycle.extendleft(reversed(self._greeting(self._hello())))
                self._connected = True
                self._wake.notify_all()
            return
        self._on_agent_gone(reason)

    def _greeting(self, hello: Hello) -> list[FromWorker]:
        """Who and where this worker is, and what is to be known of its present generation."""
        greeting: list[FromWorker] = [hello]
        if self._last is not None:
            again = self._metrics_again()
            greeting.append(_progress(self._last, metrics=again, marks=self._marks))
        waiting = set(map(id, self._lifecycle))
        greeting += [message for message in self._told if id(message) not in waiting]
        return greeting + self.meetings.standing() + self.supply.standing()

    def _metrics_again(self) -> tuple[MetricRecord, ...]:
        """The newest metrics that the former agent was sent; those that wait in frames come behind."""
        again = tuple(self._sent)
        self._sent.clear()  # they are sent again
        return again


def _frames(message: FromWorker) -> bytes:
    """One frame, or several where one would be too large for all the metrics.

    Raises:
        ValueError: a part that cannot be cut is too large.
    """
    try:
        return encode_frame(message)
    except ValueError:
        if not isinstance(message, Progress) or len(message.metrics) <= 1:
            raise
    half = len(message.metrics) // 2
    first = msgspec.structs.replace(message, metrics=message.metrics[:half])
    rest = msgspec.structs.replace(message, metrics=message.metrics[half:])
    return _frames(first) + _frames(rest)


def _progress(
    position: Position,
    *,
    marks: Marks | None = None,
    metrics: tuple[MetricRecord, ...] = (),
    waiting_s: float = 0.0,
) -> Progress:
    return Progress(
        generation=position.generation,
        phase=position.phase,
        step=position.step,
        epoch=position.epoch,
        total_steps=position.total_steps,
        timing=position.timing,
        metrics=metrics,
        marks=marks,
        waiting_s=round(waiting_s, 3),
        evaluating=position.evaluating,
    )


def end_process(reason: str) -> NoReturn:
    """A worker does not outlive its agent: no clean-up may delay that."""
    with contextlib.suppress(Exception):
        print(f"worker ends: {reason}", file=sys.stderr, flush=True)
    os._exit(AGENT_GONE_EXIT)
