"""A small process that has torch imported and forks workers from itself: ``... .forkserver --fd N --listen PATH``.

Importing torch takes seconds, a fork some tens of milliseconds. The agent starts one forkserver, hands it one end
of a Unix socket pair as descriptor N, and sends ``Spawn``; it gets ``Ready``, ``Spawned``, ``SpawnFailed`` and
``Exited`` back (``runtime.control``). The forkserver stays single-threaded, since only then is a fork safe.

An agent that asks for it (``Close``), and one that died and has no successor within ``AGENT_GRACE_S``, is the end: the
forkserver kills each worker with its process group and exits. A successor connects to PATH and goes on with the workers
that there are. A worker is killed by the kernel when the forkserver dies.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from typing import NoReturn

from distroml.runtime.checkpoint.stores.opening import preload as preload_store
from distroml.runtime.control import (
    AGENT_GRACE_S,
    Close,
    Exited,
    FrameReader,
    FromForkserver,
    Ready,
    Running,
    Spawn,
    Spawned,
    SpawnFailed,
    WorkerPlan,
    encode_frame,
)

READ_BYTES = 65_536
MAX_WORKERS = 1024
MAX_UNSENT_FRAMES = 16_384
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
LOG_MODE = 0o644
CRASHED_EXIT = 70
LOST_PARENT_EXIT = 71


def preload() -> None:
    """Import everything a worker needs, so that its first step does not wait for an import."""
    # Named singly: torch imports these on first use only (optimizers reach for _dynamo).
    import torch
    import torch._dynamo
    import torch.distributed
    import torch.optim
    import torch.utils.data

    import distroml.runtime.worker.entry  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)


class Forkserver:
    """The loop: frames from the agent, children that end.

    Args:
        agent: connected stream socket to the agent.
        listener: where the next agent connects; without it the end of the first one is the end of all.
    """

    def __init__(self, agent: socket.socket, listener: socket.socket | None = None) -> None:
        self._agent: socket.socket | None = agent
        self._listener = listener
        self._frames: FrameReader[Spawn | Close] = FrameReader(Spawn | Close)
        self._unsent: deque[bytes] = deque()
        self._workers: dict[int, Running] = {}
        self._orphaned_s: float | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pid = os.getpid()

    def run(self) -> NoReturn:
        """Serve until the last agent is gone."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        if self._listener is not None:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
        assert self._agent is not None  # it has not been served yet
        self._serve(self._agent)
        while True:
            for key, events in self._selector.select(self._patience_s()):
                if key.fileobj == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, READ_BYTES)
                    self._reap()
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._agent:
                    if events & selectors.EVENT_WRITE:
                        self._flush()
                    if events & selectors.EVENT_READ and key.fileobj is self._agent:
                        self._receive()

    # --- the agent ---------------------------------------------------------------------------------------------

    def _serve(self, agent: socket.socket) -> None:
        """Go on with this agent: tell it what there is, in the order in which it came to be."""
        ended = list(self._unsent)
        self._agent, self._orphaned_s = agent, None
        self._frames = FrameReader(Spawn | Close)
        self._unsent.clear()
        agent.setblocking(False)
        self._selector.register(agent, selectors.EVENT_READ)
        self._unsent.extend(encode_frame(worker) for worker in self._workers.values())
        self._unsent.extend(ended)
        self._send(Ready(pid=self._pid))

    def _accept(self) -> None:
        assert self._listener is not None  # only then it is selected
        try:
            agent, _ = self._listener.accept()
        except OSError:
            return
        if self._agent is not None:
            # Agents hold the lock of their data directory, so this one comes after the other's death, still unread.
            self._drop_agent()
        self._serve(agent)

    def _drop_agent(self) -> None:
        if self._agent is not None:
            self._selector.unregister(self._agent)
            self._agent.close()
            self._agent = None
        self._unsent.clear()  # a successor is told of all workers anew

    def _agent_is_gone(self) -> None:
        """It died. Its workers live on for a while if there are any and another agent could come."""
        self._drop_agent()
        if self._listener is None or not self._workers:
            self._end()
        self._orphaned_s = time.monotonic()

    def _patience_s(self) -> float | None:
        if self._orphaned_s is None:
            return None
        left_s = self._orphaned_s + AGENT_GRACE_S - time.monotonic()
        if left_s <= 0:
            self._end()
        return left_s

    def _receive(self) -> None:
        assert self._agent is not None  # only then it is selected
        try:
            data = self._agent.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._agent_is_gone()
            return
        for message in self._frames.feed(data):
            if isinstance(message, Close):
                self._end()
            self._spawn(message)

    def _send(self, message: FromForkserver) -> None:
        self._unsent.append(encode_frame(message))
        if len(self._unsent) > MAX_UNSENT_FRAMES:
            self._end()
        self._flush()

    def _flush(self) -> None:
        if self._agent is None:
            return
        try:
            while self._unsent:
                frame = self._unsent[0]
                sent = self._agent.send(frame)
                if sent < len(frame):
                    self._unsent[0] = frame[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._agent_is_gone()
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        self._selector.modify(self._agent, wanted)

    def _end(self) -> NoReturn:
        """There is no agent any more: so is everything that it watched."""
        for pid in self._workers:
            _kill_group(pid)
        os._exit(0)

    # --- workers -----------------------------------------------------------------------------------------------

    def _spawn(self, spawn: Spawn) -> None:
        plan = spawn.plan
        run_id, worker = plan.run_id, plan.worker
        if len(self._workers) >= MAX_WORKERS:
            full = f"there are {MAX_WORKERS} workers already"
            self._send(SpawnFailed(run_id=run_id, worker=worker, reason=full))
            return
        try:
            log = os.open(plan.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, LOG_MODE)
        except OSError as error:
            why = f"log {plan.log_path}: {error.strerror}"
            self._send(SpawnFailed(run_id=run_id, worker=worker, reason=why))
            return
        if plan.spec.checkpointing.enabled:
            preload_store(plan.spec.checkpointing.store)
        try:
            pid = os.fork()
        except OSError as error:
            why = f"fork: {error.strerror}"
            self._send(SpawnFailed(run_id=run_id, worker=worker, reason=why))
            return
        finally:
            if os.getpid() == self._pid:
                os.close(log)
        if pid == 0:
            become_worker(spawn, log, self._pid)
        self._workers[pid] = Running(
            job_id=plan.job_id, run_id=run_id, worker=worker, pid=pid, log_path=plan.log_path
        )
        # Both sides do this, so that the group exists before Spawned is sent and before the child runs on.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._send(Spawned(run_id=run_id, worker=worker, pid=pid))

    def _reap(self) -> None:
        while self._workers:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            pid = ended.si_pid
            # What the worker started itself ends with it; before reaping, while the id is still its own.
            _kill_group(pid)
            _, status = os.waitpid(pid, 0)
            worker = self._workers.pop(pid)
            if self._agent is None:  # the next one has to learn who that was
                self._unsent.append(encode_frame(worker))
            self._send(Exited(pid=pid, status=os.waitstatus_to_exitcode(status)))
        if self._agent is None:
            self._end()  # nothing is left that another agent could go on with


def become_worker(spawn: Spawn, log: int, parent: int) -> NoReturn:
    """In the child: cut every tie to the forkserver, then live the worker's life."""
    code = CRASHED_EXIT
    try:
        os.setpgid(0, 0)
        _die_with(parent)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # An abort shuts sockets down that a thread of Gloo may be about to write to; that must not be the end.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        _redirect(log)
        os.environ.update(spawn.env)
        _set_name(spawn.plan)
        faulthandler.enable()
        from distroml.runtime.worker import entry

        code = entry.main(spawn.plan)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: threads of Gloo may be blocked, and there is nothing left to clean up.
        os._exit(code)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, which may already have happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(LOST_PARENT_EXIT)


def _redirect(log: int) -> None:
    """stdin from nowhere, stdout and stderr to the log, everything else that was inherited closed."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(name))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _set_name(plan: WorkerPlan) -> None:
    """What ``ps`` shows: at most 15 bytes. Its rank may change, so the process is named by its serial."""
    name = f"dml-{plan.worker}".encode()[:15]
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _is_gone(agent: socket.socket) -> bool:
    """Whether the agent closed its end while everything was being imported."""
    try:
        return not agent.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _listen(path: Path) -> socket.socket:
    """A Unix socket that only this user can connect to."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(1)
    return listener


def main() -> NoReturn:
    """Command line of the forkserver."""
    parser = argparse.ArgumentParser(description="forks DistroML workers; started by distroml-node")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the agent's socket")
    parser.add_argument("--listen", type=Path, help="Unix socket at which the next agent connects")
    given = parser.parse_args()
    agent = socket.socket(fileno=given.fd)
    # Out of the terminal's session: its signals are the agent's to handle.
    with contextlib.suppress(PermissionError):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload()
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the pages shared with workers
    if _is_gone(agent):
        sys.exit(0)  # a successor has its own by now, and the socket
    Forkserver(agent, _listen(given.listen) if given.listen else None).run()


if __name__ == "__main__":
    main()
