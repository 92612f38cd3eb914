"""The agent's end of the warm forkserver: start it, ask it for workers, hear of their ends.

The forkserver (``runtime.worker.forkserver``) has torch imported, so a worker is one ``fork`` away and the agent
never imports torch. If the forkserver dies, all its workers die with it (the kernel sees to that); the agent is
told and a new one is started after a pause. If the agent dies, forkserver and workers live on for a while: the next
agent finds them at the forkserver's socket and goes on with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from distroml.runtime.control import (
    AGENT_GRACE_S,
    Close,
    Exited,
    FromForkserver,
    Ready,
    Running,
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
STOP_POLL_S = 0.02

ADOPT_TIMEOUT_S = AGENT_GRACE_S
"""How long an earlier agent's forkserver, which may be busy, is waited for; later its workers have given up."""
ADOPT_PAUSE_S = 0.05
"""Between two attempts where it closed the connection before it told what it has."""

_log = logging.getLogger(__name__)

WorkerId = tuple[str, int]
"""(run_id, worker): names a worker process on its node for ever."""


class SpawnEvents(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner of a ``Spawner`` wants to hear; called in the event loop."""

    ready: Callable[[], None]
    running: Callable[[Running], None]
    """A worker that an earlier agent spawned; all of them are told before ``ready``."""
    spawned: Callable[[WorkerId, int], None]
    failed: Callable[[WorkerId, str], None]
    exited: Callable[[int, int], None]
    lost: Callable[[], None]
    """The forkserver ended; none of its workers is left."""


class Spawner:
    """Keeps one forkserver process running.

    Args:
        listen: Unix socket at which the forkserver waits for the next agent if this one dies.
    """

    def __init__(self, log_path: Path, events: SpawnEvents, listen: Path) -> None:
        self._log_path = log_path
        self._events = events
        self._listen = listen
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._pid: int | None = None
        self._looked = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        """Runs from ``start`` to ``stop``."""
        self.ready = False

    @property
    def pid(self) -> int | None:
        """Process id of the forkserver while one runs."""
        return self._process.pid if self._process else self._pid

    def start(self) -> None:
        """Begin; ``events.ready`` tells when workers can be asked for."""
        self.task = asyncio.create_task(self._keep_running(), name="forkserver")

    async def adopted(self) -> None:
        """Wait until all workers of an earlier agent were told, or it is known that there are none."""
        await self._looked.wait()

    def replace(self, why: str) -> None:
        """End a forkserver that does not do its work; another one follows."""
        if self.pid is not None:
            _log.error("the forkserver is replaced: %s", why)
            _kill(self.pid)

    async def stop(self) -> None:
        """End the forkserver and with it all workers; no later agent is to look for it."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self._listen.unlink(missing_ok=True)

    def spawn(self, plan: WorkerPlan) -> None:
        """Ask for one worker; ``spawned`` or ``failed`` answers, or ``lost`` if all is over."""
        if self._writer is None or not self.ready:
            raise RuntimeError("the forkserver is not ready")
        self._writer.write(encode_frame(Spawn(plan=plan, env={})))

    async def _keep_running(self) -> None:
        pause_s = RESTART_FIRST_S
        try:
            await self._adopt()
        finally:
            self._looked.set()
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

    async def _adopt(self) -> None:
        """Go on with the forkserver of an earlier agent, where there is one, until it ends."""
        met, told = False, False
        ends_s = time.monotonic() + ADOPT_TIMEOUT_S
        try:
            while not told and (left_s := ends_s - time.monotonic()) > 0:
                if met:
                    await asyncio.sleep(ADOPT_PAUSE_S)
                reader, self._writer = await asyncio.open_unix_connection(self._listen)
                met = True
                try:
                    told = await self._follow(reader, left_s)
                finally:
                    await self._end()
        except (OSError, TimeoutError, BadFrame) as error:
            if met:
                _log.warning("the workers of an earlier agent are lost: %s", error or "no answer")
        if met:
            self._events.lost()

    async def _run_once(self) -> bool:
        """One forkserver from its start to its end; returns whether it ever became ready.

        Raises:
            OSError: it could not be started.
            BadFrame: it sent something else than messages.
            TimeoutError: it did not become ready in time.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                reader, self._writer = await asyncio.open_connection(sock=ours)
                self._process = await self._launch(theirs)
            return await self._follow(reader, READY_TIMEOUT_S)
        finally:
            if self._writer is None:
                ours.close()
            await self._end()

    async def _follow(self, reader: asyncio.StreamReader, ready_timeout_s: float) -> bool:
        """Hand on what a forkserver tells until it ends; returns whether it ever became ready."""
        was_ready = False
        async with asyncio.timeout(ready_timeout_s) as patience:
            async for message in read_messages(reader, FromForkserver):
                if isinstance(message, Ready):
                    was_ready = True
                    patience.reschedule(None)
                self._handle(message)
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
                "--listen",
                str(self._listen),
                pass_fds=(channel.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )

    def _handle(self, message: FromForkserver) -> None:
        match message:
            case Ready(pid=pid):
                self._pid = pid
                self.ready = True
                self._looked.set()
                self._events.ready()
            case Running():
                self._events.running(message)
            case Spawned(run_id=run_id, worker=worker, pid=pid):
                self._events.spawned((run_id, worker), pid)
            case SpawnFailed(run_id=run_id, worker=worker, reason=reason):
                self._events.failed((run_id, worker), reason)
            case Exited(pid=pid, status=status):
                self._events.exited(pid, status)

    async def _end(self) -> None:
        """Have the forkserver kill its workers and exit, and see the process out."""
        self.ready = False
        pid, process = self.pid, self._process
        self._process = self._pid = None
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(encode_frame(Close()))
            self._writer.close()
            self._writer = None
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                if process is not None:
                    await process.wait()
                elif pid is not None:
                    while _lives(pid):  # noqa: ASYNC110 - no child of this process: nothing tells of its end
                        await asyncio.sleep(STOP_POLL_S)
        except TimeoutError:
            _kill(pid)
            if process is not None:
                await process.wait()


def _lives(pid: int) -> bool:
    """Whether a process that is no child of this one is there."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _kill(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
