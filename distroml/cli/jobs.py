"""Jobs: submit, list, show, cancel, stop, remove."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated

from cyclopts import Parameter

from distroml.cli.context import (
    Ctx,
    JobReference,
    console,
    local_time,
    print_json,
    print_json_line,
    print_table,
)
from distroml.cli.lookup import find_job
from distroml.client import AsyncClient, Json
from distroml.errors import InvalidRequest
from distroml.model import JobStatus

MAX_LISTED = 10_000


def submit(
    spec: Annotated[str, Parameter(name="SPEC", help="file (.json, .yaml, .toml) or - for stdin")],
    /,
    *,
    follow: Annotated[bool, Parameter(show_default=False)] = False,
    overrides: Annotated[list[str] | None, Parameter(name="--set")] = None,
    ctx: Ctx,
) -> int:
    """Submit a job.

    Args:
        follow: watch it until it is finished; Ctrl-C leaves it running.
        overrides: field=value, such as hyperparameters.lr=0.01; may be repeated.
    """
    from distroml.cli.specfile import read_spec

    document = read_spec(spec, overrides or ())

    async def work(client: AsyncClient) -> int:
        job = await client.submit(document)
        if not follow:
            _show_submitted(job, ctx.json)
            return 0
        from distroml.cli.watch import watch_job

        print_json_line(job) if ctx.json else _show_submitted(job, as_json=False)
        return await watch_job(client, job, as_json=ctx.json)

    return ctx.run(work)


def jobs(*, status: str | None = None, limit: int = 50, ctx: Ctx) -> int:
    """List jobs, the newest first.

    Args:
        status: only jobs in this state, such as RUNNING.
        limit: at most so many, 1 to 10000.
    """
    if not 1 <= limit <= MAX_LISTED:
        raise InvalidRequest(f"--limit must be 1 to {MAX_LISTED}, not {limit}.", field="--limit")
    if status is not None and status.upper() not in JobStatus.__members__:
        known = ", ".join(JobStatus.__members__)
        raise InvalidRequest(f"--status must be one of: {known}; not {status!r}.", field="--status")
    wanted = None if status is None else status.upper()
    page = ctx.run(lambda client: client.jobs(status=wanted, limit=limit))
    if ctx.json:
        print_json(page)
        return 0
    print_table(
        ("ID", "NAME", "STATUS", "STEP", "GENERATION", "RESTARTS", "CREATED", "REASON"),
        (
            (
                job["job_id"],
                job["name"],
                job["status"],
                steps(job),
                job["generation"],
                job["restarts"],
                local_time(job.get("created_at")),
                job.get("reason"),
            )
            for job in page["jobs"]
        ),
        empty="No jobs.",
        right=("STEP", "GENERATION", "RESTARTS"),
    )
    if page.get("next_cursor"):
        sys.stderr.write(f"There are more than {limit} jobs; see --limit.\n")
    return 0


def job(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """Show a job, its workers and its result."""
    found = ctx.run(lambda client: find_job(client, job_id))
    if ctx.json:
        print_json(found)
        return 0
    out = console()
    for name in ("job_id", "run_id", "name", "status", "reason", "generation", "restarts"):
        out.print(f"{name:<12} {found.get(name, '-')}")
    out.print(f"{'step':<12} {steps(found)}")
    out.print(f"{'epoch':<12} {found.get('epoch', '-')}")
    out.print(f"{'created':<12} {local_time(found.get('created_at'))}")
    for name, value in (found.get("result") or {}).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={number:.6g}" for key, number in value.items())
        out.print(f"{'result':<12} {name}: {value}")
    workers = found.get("workers") or ()
    if workers:
        out.print()
        print_table(
            ("RANK", "NODE", "PID", "PHASE", "STEP"),
            (
                tuple(worker.get(name) for name in ("rank", "node", "pid", "phase", "step"))
                for worker in workers
            ),
            empty="",
            right=("RANK", "PID", "STEP"),
        )
    return 0


def cancel(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """End an active job now."""
    return _write(ctx, job_id, AsyncClient.cancel, "is cancelled")


def stop(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """End an active job after a final checkpoint."""
    return _write(ctx, job_id, AsyncClient.stop, "stops after a final checkpoint")


def rm(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """Forget a finished job."""
    return _write(ctx, job_id, AsyncClient.remove, "is removed")


def steps(job: Json) -> str:
    """Steps done of all, such as ``120/400``."""
    total = job.get("total_steps")
    return f"{job.get('step', 0)}/{total}" if total else str(job.get("step", 0))


def _write(
    ctx: Ctx, reference: str, action: Callable[[AsyncClient, str], Awaitable[Json]], done: str
) -> int:
    async def work(client: AsyncClient) -> tuple[Json, Json]:
        found = await find_job(client, reference)
        return found, await action(client, found["job_id"])

    found, answer = ctx.run(work)
    if ctx.json:
        print_json(answer)
    else:
        sys.stdout.write(f"Job {found['job_id']} ({found['name']}) {done}.\n")
    return 0


def _show_submitted(job: Json, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        sys.stdout.write(f"Submitted job {job['job_id']} ({job['name']}): {job['status']}\n")
        sys.stdout.flush()
