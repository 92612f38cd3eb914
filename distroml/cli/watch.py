"""``distroml watch``: a job's progress until it is finished.

On a terminal a live picture is drawn; elsewhere a line is printed for each state and now and then for a step.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

from distroml.cli.context import Ctx, JobReference, console, print_json_line, printable
from distroml.cli.lookup import find_job
from distroml.cli.progress import JobProgress, render
from distroml.client import AsyncClient, Json
from distroml.model import JobStatus

NOW = "now"
TYPES = ("metric", "state", "checkpoint", "resource")
PICTURES_PER_S = 8
PLAIN_LINE_S = 2.0
"""Least time between two plain lines about steps."""

Show = Callable[[JobProgress, Json], None]


def watch(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """Watch a job until it is finished; exits 0 if it is COMPLETED, else 1."""

    async def work(client: AsyncClient) -> int:
        return await watch_job(client, await find_job(client, job_id), as_json=ctx.json)

    return ctx.run(work)


async def watch_job(client: AsyncClient, job: Json, *, as_json: bool) -> int:
    """Show ``job`` until it is finished; returns the exit code."""
    progress = JobProgress(job)
    try:
        if as_json:
            await follow(client, progress, lambda _, event: print_json_line(event))
        elif sys.stdout.isatty():
            await _draw(client, progress)
        else:
            await follow(client, progress, PlainLines().show)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write(f"The job goes on; see 'distroml watch {job['job_id']}'.\n")
        raise
    if not as_json:
        sys.stdout.write(f"{ending(progress.job)}\n")
    return exit_code(progress.job)


async def follow(client: AsyncClient, progress: JobProgress, show: Show) -> None:
    """Feed ``progress`` from the stream of its job and call ``show`` with each event, until the end event."""
    job_id = progress.job["job_id"]
    async for event in client.stream(job_id, NOW, types=TYPES):
        progress.apply(event)
        show(progress, event)
    progress.refresh(await client.job(job_id))


class PlainLines:
    """Shows progress where there is no terminal: each change of state, and a step now and then.

    Args:
        stamp: begins each line; default: the time of day.
    """

    def __init__(self, stamp: Callable[[], str] = lambda: time.strftime("%H:%M:%S")) -> None:
        self._stamp = stamp
        self._seen: tuple[str, str] | None = None
        self._next_line_at = 0.0

    def show(self, progress: JobProgress, _event: Json | None = None) -> None:
        """Print what is new."""
        newest = progress.changes[-1] if progress.changes else None
        now = time.monotonic()
        if newest is not None and newest != self._seen:
            self._seen = newest
            status, reason = newest
            self.say(f"{status}: {reason}" if reason else status)
        elif now >= self._next_line_at:
            self._next_line_at = now + PLAIN_LINE_S
            self.say(progress.line())

    def say(self, text: str) -> None:
        """Print one line."""
        sys.stdout.write(f"{self._stamp()} {printable(text)}\n")
        sys.stdout.flush()


async def _draw(client: AsyncClient, progress: JobProgress) -> None:
    from rich.live import Live

    with Live(
        get_renderable=lambda: render(progress),
        console=console(),
        refresh_per_second=PICTURES_PER_S,
    ):
        await follow(client, progress, lambda _progress, _event: None)


def ending(job: Json) -> str:
    """One line on how a job ended; the reason was among the changes of state."""
    metrics = (job.get("result") or {}).get("metrics", {})
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    return printable(f"{job['status']}: {shown}" if shown else job["status"])


def exit_code(job: Json) -> int:
    """What a call that followed ``job`` to its end exits with."""
    return 0 if job["status"] == JobStatus.COMPLETED else 1
