"""Incidents of a job: what failed, why, and what the recovery cost."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from distroml.cli.context import Ctx, JobReference, print_json, print_table, printable
from distroml.cli.lookup import find_job
from distroml.client import AsyncClient, Json

PHASES = ("detect", "decide", "abort", "rendezvous", "restore", "first_step", "total")
_NUMBERS = ("STEPS LOST", *(f"{phase.upper().replace('_', ' ')} ms" for phase in PHASES))
COLUMNS = ("#", "GENERATION", "REASON", "STATE FROM", *_NUMBERS)


def incidents(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """List a job's failures and recoveries."""

    async def work(client: AsyncClient) -> Json:
        return await client.incidents((await find_job(client, job_id))["job_id"])

    page = ctx.run(work)
    if ctx.json:
        print_json(page)
    else:
        print_incidents(page["incidents"])
        _print_first_error(page["incidents"])
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
                row.get("source") or None,
                row.get("steps_lost"),
                *((row.get("phases_ms") or {}).get(phase) for phase in PHASES),
            )
            for row in rows
        ),
        empty="Nothing failed.",
        right=("#", *_NUMBERS),
    )


def _print_first_error(rows: Sequence[Json]) -> None:
    """What the newest failed worker said itself: its traceback, else its last lines."""
    for row in reversed(rows):
        cause = row.get("cause") or {}
        said = (cause.get("traceback") or "").splitlines() or cause.get("last_lines") or ()
        if said:
            rank, node = cause.get("rank"), cause.get("node")
            sys.stdout.write(f"\nIncident {row['number']}, rank {rank} on {node}:\n")
            sys.stdout.writelines(f"  {printable(line)}\n" for line in said)
            return
