"""The worker's line to its agent: one Unix socket, a reading thread and a writing thread.

The step loop never waits for the agent. Lifecycle frames (hello, phases, shards, the last word) are queued and
never dropped; metrics are gathered for up to 100 ms and, where the agent does not read, the oldest are dropped
and counted. A pulse goes out while nothing else does, with how long the step loop has been waiting for other ranks:
that tells a worker that hangs from those that wait for it. End of file means that the agent is gone: the process ends at once, since nobody is left to watch it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from distroml.reports import Marks, StepTiming, WorkerPhase
from distroml.runtime.control import (
    PULSE_S,
    FrameReader,
    FromWorker,
    MetricRecord,
    Progress,
    ToWorker,
    encode_frame,
)

CONNECT_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 10.0
PROGRESS_INTERVAL_S = 0.1
MAX_PENDING_METRICS = 4096
MAX_METRICS_PER_FRAME = 1024
MAX_LIFECYCLE_FRAMES = 4096
"""An agent that leaves this many unread is taken for dead."""
READ_BYTES = 65_536
AGENT_GONE_EXIT = 1


class Position(NamedTuple):
    """Where a worker is."""

    generation: int
    phase: WorkerPhase
    step: int
    epoch: int
    total_steps: int | None = None
    timing: StepTiming | None = None


class ControlLink:
    """Sends this worker's facts to the agent and hands the agent's messages to a callback.

    Args:
        path: the agent's Unix socket.
        on_message: called in the reading thread with each message of the agent.
        waiting_s: for how long the step loop has been in its present collective; 0 outside of one.
        on_agent_gone: called with the reason in whichever thread sees it; never returns.

    Raises:
        OSError: the agent cannot be reached within ``CONNECT_TIMEOUT_S``.
    """

    def __init__(
        self,
        path: str,
        on_message: Callable[[ToWorker], None],
        waiting_s: Callable[[], float] = lambda: 0.0,
        on_agent_gone: Callable[[str], NoReturn] | None = None,
    ) -> None:
        self._on_message, self._waiting_s = on_message, waiting_s
        self._on_agent_gone = on_agent_gone or end_process
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        self._socket.connect(path)
        self._socket.settimeout(None)
        self._wake = threading.Condition(threading.RLock())
        self._lifecycle: deque[FromWorker] = deque()
        self._metrics: deque[MetricRecord] = deque(maxlen=MAX_PENDING_METRICS)
        self._position: Position | None = None
        """News of the step loop that are not yet queued."""
        self._last: Position | None = None
        """What a pulse repeats."""
        self._writing = False
        self.dropped_metrics = 0
        for work, name in ((self._write, "control-write"), (self._read, "control-read")):
            threading.Thread(target=work, name=name, daemon=True).start()

    # --- the step loop's side ----------------------------------------------------------------------------------

    def send(self, message: FromWorker) -> None:
        """Queue a lifecycle frame behind everything told so far."""
        with self._wake:
            if len(self._lifecycle) >= MAX_LIFECYCLE_FRAMES:
                self._on_agent_gone(f"the agent left {MAX_LIFECYCLE_FRAMES} frames unread")
            self._gather_progress()
            self._lifecycle.append(message)
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
            self._last = position
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

    def _write(self) -> None:
        due_s = 0.0
        pulse_s = time.monotonic() + PULSE_S
        while True:
            with self._wake:
                while not self._lifecycle:
                    now_s = time.monotonic()
                    if self._position is not None and now_s >= due_s:
                        self._gather_progress()
                        due_s = now_s + PROGRESS_INTERVAL_S
                    elif now_s >= pulse_s:
                        self._pulse()
                        pulse_s = now_s + PULSE_S
                    else:
                        until_s = pulse_s if self._position is None else min(due_s, pulse_s)
                        self._wake.wait(until_s - now_s)
                messages = list(self._lifecycle)
                self._lifecycle.clear()
                self._writing = True
            pulse_s = time.monotonic() + PULSE_S
            try:
                self._socket.sendall(b"".join(encode_frame(message) for message in messages))
            except OSError as error:
                self._on_agent_gone(f"the agent cannot be written to ({error})")
            with self._wake:
                self._writing = False
                self._wake.notify_all()

    def _read(self) -> None:
        frames: FrameReader[ToWorker] = FrameReader(ToWorker)
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as error:
                self._on_agent_gone(f"the agent cannot be read from ({error})")
            if not data:
                self._on_agent_gone("the agent closed the control socket")
            for message in frames.feed(data):
                self._on_message(message)


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
    )


def end_process(reason: str) -> NoReturn:
    """A worker does not outlive its agent: no clean-up may delay that."""
    with contextlib.suppress(Exception):
        print(f"worker ends: {reason}", file=sys.stderr, flush=True)
    os._exit(AGENT_GONE_EXIT)
