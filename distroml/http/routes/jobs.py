"""Jobs: submit, list, look at, cancel, stop, remove.

Writes are judged by the state machine, not by this node's possibly older view: the route only chooses which
command to propose. A retry under the same ``Idempotency-Key`` gets the first outcome, whatever happened since.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import secrets
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from distroml.commands import CancelJob, Outcome, RemoveJob, StopJob, SubmitJob
from distroml.errors import (
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    InvalidSpec,
    KeyReused,
    NotBuilt,
    NotFound,
    OutcomeUnknown,
    Unavailable,
    UnsupportedMedia,
)
from distroml.http import limits, views
from distroml.http.limits import Query, Read
from distroml.http.problems import from_outcome
from distroml.http.table import Answer, Call, Route, job_of, json_response, latest_metrics
from distroml.model import Job, JobStatus
from distroml.spec import JobSpec, parse_spec

JOBS_PER_TURN = 100
"""Job bodies made before the event loop gets its turn again."""
REPLAYED_HEADER = "Idempotent-Replayed"
WRITE_ERRORS = (Unavailable, OutcomeUnknown, KeyReused)


class ListQuery(Read, frozen=True, kw_only=True):
    """Parameters of the job list."""

    limit: Annotated[int, Meta(ge=1, le=10_000, description="jobs per page")] = 100
    status: Annotated[tuple[str, ...], Meta(description="a status or a comma list of them")] = ()
    name: Annotated[str, Meta(min_length=1, max_length=63)] | None = None
    cursor: Annotated[str, Meta(max_length=128, description="next_cursor of the last page")] | (
        None
    ) = None


class DeleteQuery(Query, frozen=True, kw_only=True):
    """Parameters of a deletion."""

    only: (
        Annotated[
            Literal["cancel", "remove"],
            Meta(
                description="what is meant; a job in no state for it is left as it is (409). Without it the job's "
                "state decides, as the answering node knows it"
            ),
        ]
        | None
    ) = None


# --- writes ------------------------------------------------------------------------------------------------------


async def submit(call: Call, query: Query) -> web.StreamResponse:
    """Queue a job; the same key and specification answer with the job made the first time."""
    key = limits.idempotency_key(call.request)
    body = await limits.read_body(call.request, call.settings)
    if not body.strip():
        raise InvalidRequest("The body is empty; send a job specification as a JSON object.")
    spec = parse_spec(body)
    command = SubmitJob(
        key=key,
        request_sha256=_digest("POST /api/jobs", msgspec.json.encode(spec, order="deterministic")),
        job_id=f"job-{secrets.token_hex(8)}",
        run_id=f"run-{secrets.token_hex(8)}",
        spec=spec,
    )
    outcome = accepted(await call.services.propose(command, call.settings.write_timeout_s))
    job_id = outcome.job_id or command.job_id
    job = call.services.state().jobs.get(job_id)
    if job is None:
        raise NotFound(f"Job '{job_id}' was made by this request and has been removed since.")
    response = _job_response(call, job, status=201, outcome=outcome)
    response.headers["Location"] = f"/api/jobs/{job_id}"
    return response


async def cancel_or_remove(call: Call, query: DeleteQuery) -> web.StreamResponse:
    """Cancel an active job (202) or forget a finished one (204); with ``only`` never the other of the two."""
    await limits.read_nothing(call.request, call.settings)
    command = _deletion(call, query.only)
    outcome = accepted(await call.services.propose(command, call.settings.write_timeout_s))
    left = call.services.state().jobs.get(call.job_id)
    if left is None:
        return web.Response(status=204, headers=replayed(outcome))
    return _job_response(call, left, status=202, outcome=outcome)


def _deletion(call: Call, only: str | None) -> CancelJob | RemoveJob:
    write = write_of(call, "DELETE", f"?only={only}" if only else "")
    job = call.services.state().jobs.get(call.job_id)
    if only == "remove" or (only is None and job is not None and job.terminal):
        return RemoveJob(**write)
    # Who leaves it to the job's state wants a job that ends meanwhile to have ended, not its record to be lost: neither
    # now nor by a retry.
    return CancelJob(**write, reason="cancelled by the user", if_active=only is None)


async def stop(call: Call, query: Query) -> web.StreamResponse:
    """End an active job after a final checkpoint."""
    await limits.read_nothing(call.request, call.settings)
    reason = "stopped by the user, after a final checkpoint"
    command = StopJob(**write_of(call, "POST", "/stop"), reason=reason)
    outcome = accepted(await call.services.propose(command, call.settings.write_timeout_s))
    return _job_response(call, job_of(call), status=202, outcome=outcome)


# --- reads -------------------------------------------------------------------------------------------------------


async def list_jobs(call: Call, query: ListQuery) -> web.StreamResponse:
    """Jobs, newest first."""
    wanted = _statuses(query.status)
    before = _decode_cursor(query.cursor)
    state = call.services.state()
    found = [
        job
        for job in state.jobs.values()
        if (before is None or job.submit_index < before)
        and (not wanted or job.status in wanted)
        and (query.name is None or job.name == query.name)
    ]
    found.sort(key=lambda job: job.submit_index, reverse=True)
    page = found[: query.limit]
    cursor = _encode_cursor(page[-1].submit_index) if len(found) > len(page) else None
    facts, now = views.facts_of(call.services.observed()), call.now
    parts: list[bytes] = []
    for start in range(0, len(page), JOBS_PER_TURN):
        some = page[start : start + JOBS_PER_TURN]
        bodies = [views.job_view(job, facts, latest_metrics(call, job), now) for job in some]
        parts.append(msgspec.json.encode(bodies)[1:-1])
        await asyncio.sleep(0)
    end = b'],"next_cursor":' + msgspec.json.encode(cursor) + b"}"
    body = b'{"jobs":[' + b",".join(parts) + end
    index = {limits.INDEX_HEADER: str(state.index)}
    return web.Response(body=body, content_type=limits.JSON_TYPE, headers=index)


async def get_job(call: Call, query: Read) -> web.StreamResponse:
    """One job."""
    return _job_response(call, job_of(call))


# --- shared ------------------------------------------------------------------------------------------------------


def _job_response(
    call: Call, job: Job, *, status: int = 200, outcome: Outcome | None = None
) -> web.Response:
    facts = views.facts_of(call.services.observed())
    view = views.job_view(job, facts, latest_metrics(call, job), call.now)
    response = json_response(view, status=status)
    response.headers.update(replayed(outcome))
    return response


def accepted(outcome: Outcome) -> Outcome:
    """The outcome of a write. Raises the error that it stands for where it was refused."""
    if outcome.error:
        raise from_outcome(outcome.error, outcome.detail)
    return outcome


def replayed(outcome: Outcome | None) -> dict[str, str]:
    """The header that tells of a request which had its effect before."""
    return {REPLAYED_HEADER: "true"} if outcome is not None and outcome.replayed else {}


def write_of(call: Call, method: str, path: str = "") -> dict[str, Any]:
    """What a command about one job takes from a request without a body.

    Args:
        path: what follows that of the job.
    """
    return {
        "key": limits.idempotency_key(call.request),
        "request_sha256": _digest(f"{method} /api/jobs/{call.job_id}{path}"),
        "job_id": call.job_id,
    }


def _digest(what: str, body: bytes = b"") -> str:
    """What a repeated Idempotency-Key must come with again."""
    return hashlib.sha256(what.encode() + b"\n" + body).hexdigest()


def _statuses(given: tuple[str, ...]) -> frozenset[JobStatus]:
    names = [name for part in given for name in part.split(",")]
    try:
        return frozenset(JobStatus(name) for name in names)
    except ValueError:
        known = ", ".join(JobStatus)
        raise InvalidRequest(
            f"status must be a comma list of: {known}; {','.join(names)[:100]!r} was given.",
            field="status",
        ) from None


def _encode_cursor(submit_index: int) -> str:
    return base64.urlsafe_b64encode(b"j%d" % submit_index).rstrip(b"=").decode()


def _decode_cursor(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if raw[:1] != b"j" or not raw[1:].isdigit() or len(raw) > 20:
            raise ValueError("not a job cursor")
        return int(raw[1:])
    except (ValueError, binascii.Error):
        raise InvalidRequest(
            "The cursor is not a next_cursor that this API gave out.", field="cursor"
        ) from None


_JOB = Answer(200, "The job", views.JobView)

ROUTES = (
    Route(
        method="POST",
        path="/api/jobs",
        name="submitJob",
        summary="Submit a job",
        tag="jobs",
        handler=submit,
        body=JobSpec,
        write=True,
        answers=(Answer(201, "The job as queued", views.JobView, headers=("Location",)),),
        errors=(*WRITE_ERRORS, InvalidSpec, NotBuilt, BodyTooLarge, UnsupportedMedia),
    ),
    Route(
        method="GET",
        path="/api/jobs",
        name="listJobs",
        summary="List jobs, newest first",
        tag="jobs",
        handler=list_jobs,
        query=ListQuery,
        answers=(Answer(200, "A page of jobs", views.JobList),),
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}",
        name="getJob",
        summary="Look at a job",
        tag="jobs",
        handler=get_job,
        query=Read,
        answers=(_JOB,),
        errors=(NotFound,),
    ),
    Route(
        method="DELETE",
        path="/api/jobs/{job_id}",
        name="deleteJob",
        summary="Cancel an active job, or remove a finished one",
        tag="jobs",
        handler=cancel_or_remove,
        query=DeleteQuery,
        write=True,
        answers=(
            Answer(202, "The job, cancelled", views.JobView),
            Answer(204, "The finished job is removed"),
        ),
        errors=(*WRITE_ERRORS, NotFound, Conflict),
    ),
    Route(
        method="POST",
        path="/api/jobs/{job_id}/stop",
        name="stopJob",
        summary="Stop an active job after a final checkpoint",
        tag="jobs",
        handler=stop,
        write=True,
        answers=(Answer(202, "The job, stopping", views.JobView),),
        errors=(*WRITE_ERRORS, NotFound, Conflict),
    ),
)
