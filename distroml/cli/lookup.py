"""From what a person typed (a job id, a prefix of one, or a name) to one job id."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from distroml.client import AsyncClient, Json
from distroml.errors import InvalidRequest, NotFound

PAGE = 1000
MAX_JOBS = 10_000
"""Jobs that are searched for a prefix or name."""
MAX_SHOWN = 5


def choose(reference: str, jobs: Iterable[Json]) -> str:
    """The id of the one job that ``reference`` means: a whole id first, then a unique prefix or name.

    Raises:
        InvalidRequest: several jobs fit.
        NotFound: none does.
    """
    fitting: dict[str, Json] = {}
    for job in jobs:
        if job["job_id"] == reference:
            return reference
        if job["job_id"].startswith(reference) or job.get("name") == reference:
            fitting[job["job_id"]] = job
    if len(fitting) == 1:
        return next(iter(fitting))
    if not fitting:
        raise NotFound(f"No job has the id, id prefix or name {reference!r}; see 'distroml jobs'.")
    shown = ", ".join(
        f"{job_id} ({job.get('name')}, {job.get('status')})"
        for job_id, job in list(fitting.items())[:MAX_SHOWN]
    )
    more = len(fitting) - MAX_SHOWN
    raise InvalidRequest(
        f"{reference!r} is ambiguous; it fits {len(fitting)} jobs: {shown}"
        + (f" and {more} more" if more > 0 else "")
        + ". Give more of the id."
    )


async def find_job(client: AsyncClient, reference: str) -> Json:
    """The job that ``reference`` means."""
    if not reference:
        raise InvalidRequest("The job id is empty; see 'distroml jobs'.")
    try:
        return await client.job(reference)
    except (NotFound, InvalidRequest):
        pass
    return await client.job(choose(reference, [job async for job in _all_jobs(client)]))


async def _all_jobs(client: AsyncClient) -> AsyncIterator[Json]:
    cursor: str | None = None
    for _ in range(MAX_JOBS // PAGE):
        page = await client.jobs(limit=PAGE, cursor=cursor)
        for job in page["jobs"]:
            yield job
        cursor = page.get("next_cursor")
        if cursor is None:
            return
