"""Incidents of a job: what failed, why, and what the recovery cost."""

from __future__ import annotations

from collections.abc import Iterable

from distroml.cli.context import Ctx, JobReference, print_json, print_table
from distroml.cli.lookup import find_job
from distroml.client import AsyncClient, Json

PHASES = ("detect", "form", "start", "total")
COLUMNS = ("#", "GENERATION", "REASON", "STEPS LOST", *(f"{phase.upper()} ms" for phase in PHASES))


def incidents(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """List a job's failures and recoveries."""

    async def work(client: AsyncClient) -> Json:
        return await client.incidents((await find_job(client, job_id))["job_id"])

    page = ctx.run(work)
    if ctx.json:
        print_json(page)
    else:
        print_incidents(page["incidents"])
    return 0


def print_incidents(rows: Iterable[Json]) -> None:
    """The table of incidents; a recovery that is not over shows ``-``."""
    print_table(
        COLUMNS,
        (
            (
                row.get("number"),
                f"{row.get('generation')} → {row.get('next_generation') or '-'}",
                row.get("reason"),
                row.get("steps_lost"),
                *((row.get("phases_ms") or {}).get(phase) for phase in PHASES),
            )
            for row in rows
        ),
        empty="Nothing failed.",
        right=("#", *COLUMNS[3:]),
    )
