"""The route table as data: one record says how to serve a path and how to describe it.

``app`` registers every ``Route``; ``openapi`` describes the same list. A path that is not in the table does not
exist, and none is served that the document leaves out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from distroml.errors import DistroMLError, NotFound
from distroml.http import limits
from distroml.http.limits import Gate, HttpSettings, Query
from distroml.http.services import Services
from distroml.http.telemetry import Telemetry
from distroml.model import Job


class Call(Struct, frozen=True):
    """One request in the hands of a handler."""

    request: web.Request
    services: Services
    streams: Gate
    telemetry: Telemetry
    openapi: bytes
    closing: asyncio.Event
    """Set once the node shuts down."""

    @property
    def settings(self) -> HttpSettings:
        return self.services.settings

    @property
    def job_id(self) -> str:
        """The job id of the path, checked for form only."""
        return limits.job_id_of(self.request)

    @property
    def now(self) -> float:
        """Unix seconds."""
        return time.time()


class Answer(Struct, frozen=True):
    """One documented response: a status and the Struct of its body."""

    status: int
    meaning: str
    body: Any = None
    content_type: str = limits.JSON_TYPE
    headers: tuple[str, ...] = ()


class Route(Struct, frozen=True, kw_only=True):
    """A method on a path, its handler and its description."""

    method: str
    path: str
    name: str
    """operationId; also the label in ``/metrics``."""
    summary: str
    handler: Callable[[Call, Any], Awaitable[web.StreamResponse]]
    """Called with the query Struct as its second argument."""
    answers: tuple[Answer, ...]
    tag: str
    query: type[Query] = Query
    body: Any = None
    """Struct of the JSON request body."""
    write: bool = False
    """Takes an Idempotency-Key and needs the log."""
    errors: tuple[type[DistroMLError], ...] = ()
    """Besides InvalidRequest, TooManyRequests and defects, which any route may answer."""
    gated: bool = True
    """Counts against ``requests_max``; probes and streams do not."""
    head: bool = True
    """A GET also answers HEAD."""


def json_response(body: Any, *, status: int = 200, **headers: str) -> web.Response:
    """A JSON response of anything msgspec encodes; NaN and infinities become null."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(body),
        content_type=limits.JSON_TYPE,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def job_of(call: Call) -> Job:
    """The job that the path names.

    Raises:
        NotFound: there is none of that id.
    """
    job = call.services.state().jobs.get(call.job_id)
    if job is None:
        raise NotFound(f"There is no job '{call.job_id}'.", field="job_id")
    return job


def latest_metrics(call: Call, job: Job) -> Mapping[str, float]:
    """Newest values of a job's metrics; empty before it started."""
    return call.services.history.latest_metrics(job.job_id) if job.started_at else {}
