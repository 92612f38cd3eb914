"""The agent's end of the warm forkserver: start it, ask it for workers, hear of their ends.

The forkserver (``runtime.worker.forkserver``) has torch imported, so a worker is one ``fork`` away and the agent
never imports torch. If the forkserver dies, all its workers die with it (the kernel sees to that); the agent is
told and a new one is started after a pause.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from distroml.runtime.control import (
    Exited,
    FromForkserver,
    Ready,
    Spawn,
    Spawned,
    SpawnFailed,
    WorkerPlan,
    encode_frame,
)
from distroml.runtime.framing import BadFrame, read_messages

RESTART_FIRST_S = 0.2
RESTART_MOST_S = 10.0
READY_TIMEOUT_S = 120.0
"""A forkserver that imports for longer hangs (a dead network file system under site-packages, say)."""
MAX_LOG_BYTES = 1024 * 1024
"""What earlier forkservers wrote is dropped when a new one finds more than this."""
STOP_TIMEOUT_S = 0.5
"""A forkserver busy importing does not see that it should end; killing it loses nothing."""

_log = logging.getLogger(__name__)

WorkerId = tuple[str, int]
"""(run_id, worker): names a worker process on its node for ever."""


class SpawnEvents(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner of a ``Spawner`` wants to hear; called in the event loop."""

    ready: Callable[[], None]
    spawned: Callable[[WorkerId, int], None]
    failed: Callable[[WorkerId, str], None]
    exited: Callable[[int, int], None]
    lost: Callable[[], None]
    """The forkserver ended; none of its workers is left."""


class Spawner:
    """Keeps one forkserver process running."""

    def __init__(self, log_path: Path, events: SpawnEvents) -> None:
        self._log_path = log_path
        self._events = events
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task[None] | None = None
        """Runs from ``start`` to ``stop``."""
        self.ready = False

    @property
    def pid(self) -> int | None:
        """Process id of the forkserver while one runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Begin; ``events.ready`` tells when workers can be asked for."""
        self.task = asyncio.create_task(self._keep_running(), name="forkserver")

    def replace(self, why: str) -> None:
        """End a forkserver that does not do its work; another one follows."""
        if self._process is not None and self._process.returncode is None:
            _log.error("the forkserver is replaced: %s", why)
            self._process.kill()

    async def stop(self) -> None:
        """End the forkserver and with it all workers."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def spawn(self, plan: WorkerPlan) -> None:
        """Ask for one worker; ``spawned`` or ``failed`` answers, or ``lost`` if all is over."""
        if self._writer is None or not self.ready:
            raise RuntimeError("the forkserver is not ready")
        self._writer.write(encode_frame(Spawn(plan=plan, env={})))

    async def _keep_running(self) -> None:
        pause_s = RESTART_FIRST_S
        while True:
            was_ready = False
            try:
                was_ready = await self._run_once()
            except (OSError, TimeoutError, BadFrame) as error:
                _log.error("the forkserver fails: %s", error or "it did not become ready in time")
            self._events.lost()
            pause_s = RESTART_FIRST_S if was_ready else min(pause_s * 2, RESTART_MOST_S)
            _log.error(
                "the forkserver ended; starting another in %.1f s (%s)", pause_s, self._log_path
            )
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> bool:
        """One forkserver from its start to its end; returns whether it ever became ready.

        Raises:
            OSError: it could not be started.
            BadFrame: it sent something else than messages.
            TimeoutError: it did not become ready in time.
        """
        ours, theirs = socket.socketpair()
        was_ready = False
        try:
            with theirs:
                reader, self._writer = await asyncio.open_connection(sock=ours)
                self._process = await self._launch(theirs)
            messages = read_messages(reader, FromForkserver)
            async with asyncio.timeout(READY_TIMEOUT_S) as patience:
                async for message in messages:
                    if isinstance(message, Ready):
                        was_ready = True
                        patience.reschedule(None)
                    self._handle(message)
        finally:
            if self._writer is None:
                ours.close()
            await self._end()
        return was_ready

    async def _launch(self, channel: socket.socket) -> asyncio.subprocess.Process:
        with self._log_path.open("ab") as log:
            if log.tell() > MAX_LOG_BYTES:
                log.truncate(0)
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "distroml.runtime.worker.forkserver",
                "--fd",
                str(channel.fileno()),
                pass_fds=(channel.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )

    def _handle(self, message: FromForkserver) -> None:
        match message:
            case Ready():
                self.ready = True
                self._events.ready()
            case Spawned(run_id=run_id, worker=worker, pid=pid):
                self._events.spawned((run_id, worker), pid)
            case SpawnFailed(run_id=run_id, worker=worker, reason=reason):
                self._events.failed((run_id, worker), reason)
            case Exited(pid=pid, status=status):
                self._events.exited(pid, status)

    async def _end(self) -> None:
        """Close the channel (the forkserver kills its workers on EOF) and see the process out."""
        self.ready = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
