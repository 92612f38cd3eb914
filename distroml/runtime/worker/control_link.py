"""The worker's line to its agent: one Unix socket, a reading thread and a writing thread.

The step loop never waits for the agent. Lifecycle frames (hello, phases, shards, the last word) are queued and
never dropped; metrics are gathered for up to 100 ms and, where the agent does not read, the oldest are dropped
and counted. End of file means that the agent is gone: the process ends at once, since nobody is left to watch it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from distroml.reports import WorkerPhase
from distroml.runtime.control import (
    FrameReader,
    FromWorker,
    MetricRecord,
    Progress,
    Released,
    RendezvousKeys,
    Stop,
    ToWorker,
    encode_frame,
)
from distroml.runtime.worker.meetings import Meetings

CONNECT_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 10.0
PROGRESS_INTERVAL_S = 0.1
MAX_PENDING_METRICS = 4096
MAX_METRICS_PER_FRAME = 1024
MAX_LIFECYCLE_FRAMES = 4096
"""An agent that leaves this many unread is taken for dead."""
READ_BYTES = 65_536
AGENT_GONE_EXIT = 1


class ControlLink:
    """Sends this worker's facts to the agent and hands the agent's frames to callbacks.

    Args:
        path: the agent's Unix socket.
        on_keys: called in the reading thread with rendezvous keys of other ranks.
        on_stop: called in the reading thread when the agent asks for a stop.
        on_agent_gone: called with the reason in whichever thread sees it; never returns.

    Raises:
        OSError: the agent cannot be reached within ``CONNECT_TIMEOUT_S``.
    """

    def __init__(
        self,
        path: str,
        on_keys: Callable[[dict[str, bytes]], None],
        on_stop: Callable[[], None],
        on_agent_gone: Callable[[str], NoReturn] | None = None,
    ) -> None:
        self._on_keys, self._on_stop = on_keys, on_stop
        self._on_agent_gone = on_agent_gone or end_process
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        self._socket.connect(path)
        self._socket.settimeout(None)
        self.meetings = Meetings(self.send)
        """Barriers with the other ranks, by way of the agents."""
        self._wake = threading.Condition()
        self._lifecycle: deque[FromWorker] = deque()
        self._metrics: deque[MetricRecord] = deque(maxlen=MAX_PENDING_METRICS)
        self._position: tuple[WorkerPhase, int, int, int | None] | None = None
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

    def progress(
        self,
        phase: WorkerPhase,
        step: int,
        epoch: int,
        total_steps: int | None,
        record: MetricRecord | None = None,
    ) -> None:
        """Tell where the worker is; sent at the next 100 ms mark. Costs a lock and an append."""
        with self._wake:
            idle = self._position is None
            self._position = (phase, step, epoch, total_steps)
            if record is not None:
                self.dropped_metrics += len(self._metrics) == MAX_PENDING_METRICS
                self._metrics.append(record)
            if idle:
                self._wake.notify()

    def phase(
        self, phase: WorkerPhase, step: int, epoch: int, total_steps: int | None = None
    ) -> None:
        """Tell a change of phase now."""
        self.send(Progress(phase=phase, step=step, epoch=epoch, total_steps=total_steps))

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
        phase, step, epoch, total_steps = self._position
        self._position = None
        records = list(self._metrics)
        self._metrics.clear()
        for begin in range(0, max(1, len(records)), MAX_METRICS_PER_FRAME):
            part = tuple(records[begin : begin + MAX_METRICS_PER_FRAME])
            self._lifecycle.append(
                Progress(phase=phase, step=step, epoch=epoch, total_steps=total_steps, metrics=part)
            )

    def _write(self) -> None:
        due = 0.0
        while True:
            with self._wake:
                while not self._lifecycle:
                    wait_s = None if self._position is None else due - time.monotonic()
                    if wait_s is not None and wait_s <= 0:
                        self._gather_progress()
                        due = time.monotonic() + PROGRESS_INTERVAL_S
                    else:
                        self._wake.wait(wait_s)
                messages = list(self._lifecycle)
                self._lifecycle.clear()
                self._writing = True
            try:
                self._socket.sendall(b"".join(encode_frame(message) for message in messages))
            except OSError as error:
                self._on_agent_gone(f"the agent cannot be written to ({error})")
            with self._wake:
                self._writing = False
                self._wake.notify_all()

    def _read(self) -> None:
        frames: FrameReader[RendezvousKeys | Stop | Released] = FrameReader(ToWorker)
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as error:
                self._on_agent_gone(f"the agent cannot be read from ({error})")
            if not data:
                self._on_agent_gone("the agent closed the control socket")
            for message in frames.feed(data):
                if isinstance(message, RendezvousKeys):
                    self._on_keys(message.keys)
                elif isinstance(message, Released):
                    self.meetings.release(message)
                else:
                    self._on_stop()


def end_process(reason: str) -> NoReturn:
    """A worker does not outlive its agent: no clean-up may delay that."""
    with contextlib.suppress(Exception):
        print(f"worker ends: {reason}", file=sys.stderr, flush=True)
    os._exit(AGENT_GONE_EXIT)
