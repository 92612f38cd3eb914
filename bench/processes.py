"""Processes that are measured from outside: what they cost, when they answer, and that they end.

Each runs in a process group of its own and is waited for; a bound on its time is always given.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from msgspec import Struct

POLL_S = 0.002
STOP_TIMEOUT_S = 10.0
OUTPUT_TAIL_CHARACTERS = 2000
PR_SET_PDEATHSIG = 1


class Cost(Struct, frozen=True):
    """What a process took."""

    cpu_s: float
    wall_s: float


class Broken(RuntimeError):
    """Something that was measured failed or took too long; says what and shows the end of its output."""


@asynccontextmanager
async def within(timeout_s: float, what: str) -> AsyncIterator[None]:
    """Bound the block's time.

    Raises:
        Broken: it took longer; names ``what`` was awaited.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise Broken(f"waited {timeout_s:g} s for {what}") from None


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait until a condition holds.

    Raises:
        Broken: it did not within ``timeout_s``; names ``what`` was awaited.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return
        await asyncio.sleep(POLL_S)
    raise Broken(f"waited {timeout_s:g} s for {what}")


def run_to_end(argv: Sequence[str], timeout_s: float = 60.0) -> Cost:
    """Run ``python argv...`` to its end: processor time of it and of what it waited for, and wall time.

    Raises:
        Broken: it ended with another code than 0, or not within ``timeout_s``.
    """
    before, began = _children_cpu_s(), time.monotonic()
    with subprocess.Popen(
        [sys.executable, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Broken(f"python {' '.join(argv)} did not end within {timeout_s:g} s") from None
    cost = Cost(cpu_s=_children_cpu_s() - before, wall_s=time.monotonic() - began)
    if process.returncode != 0:
        raise Broken(f"python {' '.join(argv)} ended with {process.returncode}: {tail(output)}")
    return cost


def _children_cpu_s() -> float:
    """Of all children reaped so far; finer than os.times(), which counts ticks."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def running(
    argv: Sequence[str], log_path: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """``python argv...`` while the context lasts; SIGTERM, then SIGKILL ends it."""
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env={**os.environ, **(environ or {})},
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, SIGKILL after ``STOP_TIMEOUT_S``, reap."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_cost(
    argv: Sequence[str], port: int, path: str, log_path: Path, timeout_s: float = 30.0
) -> Cost:
    """Start a server and ask until it answers 200: its processor time up to then, and wall time.

    Raises:
        Broken: it ended, or did not answer within ``timeout_s``.
    """
    began = time.monotonic()
    with running(argv, log_path) as process:
        while not _answers(port, path):
            if process.poll() is not None or time.monotonic() - began > timeout_s:
                output = log_path.read_text(errors="replace")
                raise Broken(f"python {' '.join(argv)} did not answer {path}: {tail(output)}")
            time.sleep(POLL_S)
        wall_s = time.monotonic() - began
        return Cost(cpu_s=cpu_s(process.pid), wall_s=wall_s)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, all its threads included (proc(5): stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it; it is stopped first, so that it neither starts nor reaps any meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        for child in _children(pid):
            kill_tree(child)
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (prctl(2)): nothing measured outlives the benchmark."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def tail(output: str) -> str:
    """The end of what a process wrote, for an error message."""
    return output[-OUTPUT_TAIL_CHARACTERS:].strip() or "(no output)"
