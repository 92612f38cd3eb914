"""``distroml logs``: what the workers of a job wrote."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Annotated

from cyclopts import Parameter

from distroml.cli.context import Ctx, JobReference, print_json, print_json_line
from distroml.cli.lookup import find_job
from distroml.cli.watch import NOW, exit_code
from distroml.client import AsyncClient, Json

DEFAULT_TAIL = 200


def logs(
    job_id: JobReference,
    /,
    *,
    follow: Annotated[bool, Parameter(name=("--follow", "-f"), show_default=False)] = False,
    rank: int | None = None,
    tail: int = DEFAULT_TAIL,
    ctx: Ctx,
) -> int:
    """Print the output of a job's workers.

    Args:
        follow: go on until the job is finished; exits 0 if it is COMPLETED, else 1.
        rank: only this rank's.
        tail: start with so many lines.
    """

    async def work(client: AsyncClient) -> int:
        job = await find_job(client, job_id)
        if follow:
            return await follow_logs(client, job["job_id"], rank, tail, as_json=ctx.json)
        page = await client.logs(job["job_id"], rank=rank, tail=tail)
        if ctx.json:
            print_json(page)
        else:
            for line in page["lines"]:
                _show({"type": "log", **line}, rank, as_json=False)
        return 0

    return ctx.run(work)


async def follow_logs(
    client: AsyncClient, job_id: str, rank: int | None, tail: int, *, as_json: bool
) -> int:
    """The last lines, then new ones; the stream begins first, with the state, so that none falls between the two."""
    shown: set[tuple[object, ...]] = set()
    greeted = False
    async with aclosing(client.stream(job_id, NOW, types=("log",))) as events:
        async for event in events:
            if not greeted:
                greeted = True
                for line in (await client.logs(job_id, rank=rank, tail=tail))["lines"]:
                    shown.add(_identity(line))
                    _show({"type": "log", **line}, rank, as_json)
            if event["type"] == "state":
                continue  # says where the stream begins
            wanted = event["type"] != "log" or rank in (None, event["rank"])
            if wanted and _identity(event) not in shown:
                _show(event, rank, as_json)
    return exit_code(await client.job(job_id))


def _identity(line: Json) -> tuple[object, ...]:
    return tuple(line.get(name) for name in ("generation", "rank", "at", "line"))


def _show(event: Json, rank: int | None, as_json: bool) -> None:
    if as_json:
        print_json_line(event)
    elif event["type"] == "log":
        prefix = "" if rank is not None else f"[{event['rank']}] "
        sys.stdout.write(f"{prefix}{event['line']}\n")
        sys.stdout.flush()
