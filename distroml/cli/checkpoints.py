"""Checkpoints of a job."""

from __future__ import annotations

from distroml.cli.context import Ctx, JobReference, local_time, print_json, print_table, size
from distroml.cli.lookup import find_job
from distroml.client import AsyncClient, Json


def checkpoints(job_id: JobReference, /, *, ctx: Ctx) -> int:
    """List a job's checkpoints whose commit is in the log."""

    async def work(client: AsyncClient) -> Json:
        return await client.checkpoints((await find_job(client, job_id))["job_id"])

    page = ctx.run(work)
    if ctx.json:
        print_json(page)
        return 0
    print_table(
        ("STEP", "EPOCH", "GENERATION", "SHARDS", "SIZE", "STATUS", "COMMITTED", "DIRECTORY"),
        (
            (
                *(row.get(name) for name in ("step", "epoch", "generation", "shards")),
                size(row.get("size_bytes")),
                row.get("status"),
                local_time(row.get("committed_at")),
                row.get("directory"),
            )
            for row in page["checkpoints"]
        ),
        empty="No checkpoint is committed yet.",
        right=("STEP", "EPOCH", "GENERATION", "SHARDS", "SIZE"),
    )
    return 0
