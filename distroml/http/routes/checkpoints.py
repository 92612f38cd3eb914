"""Checkpoints: list, look at, ask for, verify, export, remove; and import those of a cluster that is lost.

What is listed is in the log. Files are read by the node that is asked, through the store that the checkpoint names.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import Meta, Struct
from msgspec.structs import replace

from distroml.commands import ImportCheckpoints, RemoveCheckpoint, RequestCheckpoint
from distroml.errors import (
    UNDECODABLE,
    BodyTooLarge,
    Conflict,
    CorruptCheckpoint,
    InvalidRequest,
    InvalidSpec,
    NotFound,
    StoreError,
    Unavailable,
    UnsupportedMedia,
)
from distroml.http import checkpoint_views as views
from distroml.http import limits
from distroml.http import views as job_views
from distroml.http.limits import Query, Read
from distroml.http.patience import patient_answer
from distroml.http.problems import from_outcome
from distroml.http.routes.jobs import WRITE_ERRORS, accepted, replayed, write_of
from distroml.http.table import Answer, Call, Route, job_of, json_response
from distroml.model import Checkpoint, Job
from distroml.runtime.checkpoint.examination import Found
from distroml.spec import Checkpointing, JobSpec
from distroml.store_urls import parse_store

IMPORT_BATCH_BYTES = 16 * 1024
"""Checkpoints of one log entry, encoded."""
EXPORT_TYPE = "application/octet-stream"
EXPORT_CHUNK_BYTES = 1024 * 1024


class ExportQuery(Read, frozen=True, kw_only=True):
    """Parameters of an export."""

    format: Annotated[Literal["safetensors"], Meta(description="safetensors")] = "safetensors"
    all: Annotated[
        bool, Meta(description="the optimizer's tensors too, under the prefix optimizer.")
    ] = False


class ImportRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which store to look through."""

    store: Annotated[
        str,
        Meta(min_length=1, max_length=1024, description="as in a spec's checkpointing.store"),
    ]
    job: (
        Annotated[str, Meta(max_length=63, description="only this job's; null: all that there are")]
        | None
    ) = None
    verify: Annotated[
        bool, Meta(description="read every byte first, and leave out what does not match")
    ] = False


# --- reads -------------------------------------------------------------------------------------------------------


async def get_checkpoints(call: Call, query: Read) -> web.StreamResponse:
    """Checkpoints whose commit is in the log and that are kept, oldest first."""
    job = job_of(call)
    return json_response(
        views.CheckpointList(
            job_id=job.job_id,
            checkpoints=[views.checkpoint_view(one) for one in job.checkpoints],
            save_request=job.save_request,
            saved_request=job.saved_request,
        )
    )


async def get_checkpoint(call: Call, query: Read) -> web.StreamResponse:
    """One checkpoint with its files and tensors, read from the store and verified against the log."""
    job = job_of(call)
    one = _checkpoint_of(call, job)
    async with _read_of(call, one):
        manifest = await call.services.files.describe(one)
    return json_response(views.checkpoint_detail(job, one, manifest))


async def export(call: Call, query: ExportQuery) -> web.StreamResponse:
    """One verified safetensors file that any tool can open: the model's weights under their own names."""
    job = job_of(call)
    one = _checkpoint_of(call, job)
    async with (
        _read_of(call, one),
        call.services.files.export(one, everything=query.all) as path,
    ):
        with path.open("rb") as file:
            response = web.StreamResponse(
                headers={
                    "Content-Type": EXPORT_TYPE,
                    "Content-Disposition": f'attachment; filename="{_file_name(job, one)}"',
                }
            )
            response.content_length = path.stat().st_size
            await response.prepare(call.request)
            while chunk := await asyncio.to_thread(file.read, EXPORT_CHUNK_BYTES):
                await _sent(call, response.write(chunk))
            await response.write_eof()
    return response


def _file_name(job: Job, one: Checkpoint) -> str:
    return f"{job.job_id}-step-{one.step}.safetensors"


async def _sent(call: Call, sent: Awaitable[None]) -> None:
    """A reader that stands still does not keep a whole export on this node's disk."""
    try:
        async with asyncio.timeout(call.settings.stream_send_timeout_s):
            await sent
    except TimeoutError:
        if call.request.transport is not None:
            call.request.transport.abort()
        raise ConnectionResetError("the reader of an export stood still") from None


async def verify(call: Call, query: Query) -> web.StreamResponse:
    """Read every byte of a checkpoint and compare it with what was committed. Changes nothing."""
    await limits.read_nothing(call.request, call.settings)
    job = job_of(call)
    one = _checkpoint_of(call, job)

    async def work() -> views.VerificationView:
        async with _read_of(call, one):
            checks = await call.services.files.verify(one, job.checkpoints)
        if any(check.problem for check in checks):
            await _refuse_if_retired(call, one)
        return views.VerificationView(
            job_id=job.job_id,
            step=one.step,
            ok=not any(check.problem for check in checks),
            files=[
                views.FileView(path=check.path, size_bytes=check.size_bytes, problem=check.problem)
                for check in checks
            ],
        )

    return await patient_answer(call, work())


@asynccontextmanager
async def _read_of(call: Call, one: Checkpoint) -> AsyncIterator[None]:
    """While the files of a checkpoint are read: what is missing since it was retired is not a failure of the store."""
    try:
        yield
    except StoreError:
        await _refuse_if_retired(call, one)
        raise


async def _refuse_if_retired(call: Call, one: Checkpoint) -> None:
    """Raises NotFound where a checkpoint that was listed when the call began is not kept any more.

    Other nodes may have deleted their copies before this one heard of it.
    """
    with contextlib.suppress(Unavailable):  # then what was found has to do
        await call.services.read_barrier(call.settings.write_timeout_s)
    kept = _checkpoint_of(call, job_of(call))
    if kept.manifest_sha256 != one.manifest_sha256:
        raise NotFound(f"The checkpoint of step {one.step} was replaced while it was read.")


# --- writes ------------------------------------------------------------------------------------------------------


async def request_checkpoint(call: Call, query: Query) -> web.StreamResponse:
    """Have a running job save a checkpoint at the next step boundary; it is committed once ``saved_request`` says so."""
    await limits.read_nothing(call.request, call.settings)
    command = RequestCheckpoint(**write_of(call, "POST", "/checkpoint"))
    outcome = accepted(await call.services.propose(command, call.settings.write_timeout_s))
    job = job_of(call)
    facts = job_views.facts_of(call.services.observed())
    answer = views.SaveRequestView(
        job_id=job.job_id,
        save_request=job.save_request,
        saved_request=job.saved_request,
        step=job_views.step_of(job, facts),
        status=job.status,
    )
    response = json_response(answer, status=202)
    response.headers.update(replayed(outcome))
    return response


async def remove_checkpoint(call: Call, query: Query) -> web.StreamResponse:
    """Forget a checkpoint and delete its files soon; not the newest of a job that goes on, nor one that is needed."""
    await limits.read_nothing(call.request, call.settings)
    step = _step(call)
    command = RemoveCheckpoint(**write_of(call, "DELETE", f"/checkpoints/{step}"), step=step)
    outcome = accepted(await call.services.propose(command, call.settings.write_timeout_s))
    return web.Response(status=204, headers=replayed(outcome))


async def import_checkpoints(call: Call, query: Query) -> web.StreamResponse:
    """Register the checkpoints that a store has, as those of jobs which have ended.

    For when all data directories of a cluster are lost: ``init_from`` can then use them. Repeating it adds what is
    new. A job that this cluster knows as its own is left as it is.
    """
    body = await limits.read_body(call.request, call.settings)
    try:
        wanted = msgspec.json.decode(body, type=ImportRequest)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        raise InvalidRequest(f"{text}.", field=where.rstrip("`") or None) from None
    except UNDECODABLE as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None
    parse_store(wanted.store, "store")
    return await patient_answer(call, _import(call, wanted))


async def _import(call: Call, wanted: ImportRequest) -> views.ImportView:
    survey = await call.services.files.survey(wanted.store, thorough=wanted.verify)
    shown: list[views.ImportedJobView] = []
    of_run = sorted(survey.found, key=lambda one: (one.job_id, one.run_id, one.checkpoint.step))
    for (job_id, run_id), group in groupby(of_run, key=lambda one: (one.job_id, one.run_id)):
        if wanted.job in (None, job_id):
            shown.append(await _import_run(call, wanted.store, job_id, run_id, list(group)))
    unusable = [
        views.UnusableView(directory=one.directory, reason=one.reason)
        for one in survey.unusable
        if wanted.job is None or one.directory.startswith(f"{wanted.job}/")
    ]
    return views.ImportView(store=wanted.store, jobs=shown, unusable=unusable)


async def _import_run(
    call: Call, store: str, job_id: str, run_id: str, found: list[Found]
) -> views.ImportedJobView:
    """One entry per batch; a crash in between is made good by the next import."""
    at, steps = time.time(), [one.checkpoint.step for one in found]
    spec = JobSpec(name="imported", checkpointing=Checkpointing(store=store))
    problem = ""
    for batch in _batches([replace(one.checkpoint, committed_at=at) for one in found]):
        command = ImportCheckpoints(job_id=job_id, run_id=run_id, spec=spec, checkpoints=batch)
        outcome = await call.services.propose(command, call.settings.write_timeout_s)
        if outcome.error:
            problem = from_outcome(outcome.error, outcome.detail).detail
            break
    job = call.services.state().jobs.get(job_id)
    known = {one.step for one in job.checkpoints} if job and job.run_id == run_id else set()
    return views.ImportedJobView(
        job_id=job_id,
        run_id=run_id,
        steps=[step for step in steps if step in known],
        problem=problem,
    )


def _batches(found: list[Checkpoint]) -> Iterator[tuple[Checkpoint, ...]]:
    batch: list[Checkpoint] = []
    size = 0
    for one in found:
        count = len(msgspec.msgpack.encode(one))
        if batch and size + count > IMPORT_BATCH_BYTES:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(one)
        size += count
    if batch:
        yield tuple(batch)


# --- shared ------------------------------------------------------------------------------------------------------


def _step(call: Call) -> int:
    return limits.step_of(call.request)


def _checkpoint_of(call: Call, job: Job) -> Checkpoint:
    step = _step(call)
    for one in job.checkpoints:
        if one.step == step:
            return one
    raise NotFound(
        f"Job '{job.job_id}' has no checkpoint of step {step} (it may have been retired).",
        field="step",
    )


_STORE_ERRORS = (StoreError, CorruptCheckpoint)

ROUTES = (
    Route(
        method="GET",
        path="/api/jobs/{job_id}/checkpoints",
        name="getCheckpoints",
        summary="Committed checkpoints that are kept, oldest first",
        tag="checkpoints",
        handler=get_checkpoints,
        query=Read,
        answers=(Answer(200, "Checkpoints", views.CheckpointList),),
        errors=(NotFound,),
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}/checkpoints/{step}",
        name="getCheckpoint",
        summary="One checkpoint with its files and tensors",
        tag="checkpoints",
        handler=get_checkpoint,
        query=Read,
        answers=(Answer(200, "The checkpoint", views.CheckpointDetail),),
        errors=(NotFound, *_STORE_ERRORS),
    ),
    Route(
        method="DELETE",
        path="/api/jobs/{job_id}/checkpoints/{step}",
        name="removeCheckpoint",
        summary="Remove a checkpoint and its files",
        tag="checkpoints",
        handler=remove_checkpoint,
        write=True,
        answers=(Answer(204, "It is forgotten; its files go soon"),),
        errors=(*WRITE_ERRORS, NotFound, Conflict),
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}/checkpoints/{step}/export",
        name="exportCheckpoint",
        summary="One plain safetensors file, verified",
        tag="checkpoints",
        handler=export,
        query=ExportQuery,
        answers=(Answer(200, "The file", content_type=EXPORT_TYPE),),
        errors=(NotFound, Conflict, *_STORE_ERRORS),
        head=False,
    ),
    Route(
        method="POST",
        path="/api/jobs/{job_id}/checkpoints/{step}/verify",
        name="verifyCheckpoint",
        summary="Compare every byte with what was committed",
        tag="checkpoints",
        handler=verify,
        answers=(Answer(200, "What became of each file", views.VerificationView),),
        errors=(NotFound, *_STORE_ERRORS),
    ),
    Route(
        method="POST",
        path="/api/jobs/{job_id}/checkpoint",
        name="requestCheckpoint",
        summary="Have a running job save a checkpoint now",
        tag="checkpoints",
        handler=request_checkpoint,
        write=True,
        answers=(Answer(202, "The request's number", views.SaveRequestView),),
        errors=(*WRITE_ERRORS, NotFound, Conflict),
    ),
    Route(
        method="POST",
        path="/api/checkpoints/import",
        name="importCheckpoints",
        summary="Register the checkpoints that a store has",
        tag="checkpoints",
        handler=import_checkpoints,
        body=ImportRequest,
        answers=(Answer(200, "What was found", views.ImportView),),
        errors=(*WRITE_ERRORS, InvalidSpec, StoreError, BodyTooLarge, UnsupportedMedia),
    ),
)
