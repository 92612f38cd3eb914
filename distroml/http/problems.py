"""Every error as an RFC 9457 problem document: our own, aiohttp's, and defects.

``type`` is ``/problems/<slug>``, which each node serves with an explanation. No traceback ever leaves the node:
an unexpected exception is logged under the ``request_id`` that its answer carries.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from distroml import errors
from distroml.errors import DistroMLError, InvalidRequest

PROBLEM_TYPE = "application/problem+json"
REQUEST_ID = web.RequestKey("request_id", str)
RESPONSE_BEGUN = web.RequestKey("response_begun", bool)
"""Set with the headers of a response: no other can follow on its connection."""
RETRY_AFTER_S = 1

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)


class Explanation(Struct, frozen=True):
    """What ``GET /problems/<slug>`` says about one problem type."""

    slug: str
    title: str
    status: int
    meaning: str


class Problem(Struct, frozen=True, omit_defaults=True):
    """Problem document; further members depend on the type."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    field: str | None = None
    """Dotted path of the offending input."""


# What aiohttp and the guards refuse by status alone.
_BY_STATUS: dict[int, Explanation] = {
    e.status: e
    for e in (
        Explanation("forbidden", "Forbidden", 403, "The request may come from a foreign web page."),
        Explanation("request-timeout", "Request timeout", 408, "The body did not arrive in time."),
        Explanation("misdirected", "Misdirected request", 421, "The Host is not one of this node."),
        Explanation("unsupported", "Unsupported", 417, "An expectation that cannot be met."),
    )
}


ERRORS: dict[str, type[DistroMLError]] = {kind.slug: kind for kind in errors.all_kinds()}
_HTTP_SLUGS: dict[int, type[DistroMLError]] = {
    kind.status: kind
    for kind in (
        errors.InvalidRequest,
        errors.BodyTooLarge,
        errors.UnsupportedMedia,
        errors.NotFound,
        errors.MethodNotAllowed,
        errors.Unauthorized,
        errors.TooManyRequests,
        errors.Unavailable,
    )
}


def explanations() -> dict[str, Explanation]:
    """Every problem type that a node may answer with, by slug."""
    ours = {
        slug: Explanation(slug, kind.title, kind.status, inspect.getdoc(kind) or "")
        for slug, kind in ERRORS.items()
        if kind is not errors.ConfigError
    }
    return ours | {e.slug: e for e in _BY_STATUS.values()}


def from_outcome(slug: str, detail: str) -> DistroMLError:
    """The error that a refused command stands for; slugs only the log uses are conflicts."""
    return ERRORS.get(slug, errors.Conflict)(detail)


def new_request_id() -> str:
    """16 hex digits that join an answer to the node's log."""
    return uuid.uuid4().hex[:16]


def request_id_of(request: web.BaseRequest) -> str:
    """The id given to this request, made on first use."""
    if REQUEST_ID not in request:
        request[REQUEST_ID] = new_request_id()
    return request[REQUEST_ID]


def respond(request: web.BaseRequest, error: DistroMLError) -> web.Response:
    """The problem document of one of our errors."""
    response = _document(
        request, error.slug, error.title, error.status, error.detail, error.field, error.extra
    )
    if error.status in (429, 503, 504):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def respond_http(request: web.BaseRequest, error: web.HTTPException) -> web.StreamResponse:
    """The problem document of an exception of aiohttp; redirects pass as they are."""
    if error.status < 400:
        return error
    slug, title = _slug_of(error.status)
    detail = _detail_of(request, error)
    response = _document(request, slug, title, error.status, detail)
    for name in ("Allow", "Retry-After"):
        if name in error.headers:
            response.headers[name] = error.headers[name]
    return response


def respond_defect(request: web.BaseRequest, error: BaseException) -> web.Response:
    """A 500 that says nothing but where to look; the traceback goes to the log."""
    _log_defect(request, error)
    kind = DistroMLError
    return _document(
        request,
        kind.slug,
        kind.title,
        kind.status,
        f"A defect of this node; its log has the details under request {request_id_of(request)}.",
    )


def _log_defect(request: web.BaseRequest, error: BaseException) -> None:
    request_id = request_id_of(request)
    _log.error("request %s %s %s failed", request_id, request.method, request.path, exc_info=error)


@web.middleware
async def problem_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into a problem document, or breaks off the response that it had begun."""
    try:
        return await handler(request)
    except ConnectionResetError:
        raise  # the client is gone: nobody to tell
    except Exception as error:
        if RESPONSE_BEGUN not in request:
            return _respond_any(request, error)
        _log_defect(request, error)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("a response could not be completed") from error


def _respond_any(request: web.Request, error: Exception) -> web.StreamResponse:
    match error:
        case DistroMLError():
            if error.status >= 500:
                _log.warning("request %s: %s: %s", request_id_of(request), error.slug, error.detail)
            return respond(request, error)
        case web.HTTPException():
            return respond_http(request, error)
        case RecursionError():
            return respond(request, InvalidRequest("The request is nested too deeply."))
        case _:
            return respond_defect(request, error)


def _document(
    request: web.BaseRequest,
    slug: str,
    title: str,
    status: int,
    detail: str,
    field: str | None = None,
    extra: dict[str, Any] | None = None,
) -> web.Response:
    problem = Problem(
        type=f"/problems/{slug}",
        title=title,
        status=status,
        detail=detail,
        instance=request.rel_url.raw_path[:1024],
        request_id=request_id_of(request),
        field=field,
    )
    members = {**(extra or {}), **msgspec.to_builtins(problem)}
    return web.Response(status=status, body=msgspec.json.encode(members), content_type=PROBLEM_TYPE)


def _slug_of(status: int) -> tuple[str, str]:
    known = _HTTP_SLUGS.get(status) or _BY_STATUS.get(status)
    if known is None:
        known = InvalidRequest if status < 500 else DistroMLError
    return known.slug, known.title


def _detail_of(request: web.BaseRequest, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return f"{request.method[:20]} is not possible on {request.path[:200]}; use: {allowed}."
    if isinstance(error, web.HTTPNotFound):
        return f"There is nothing at {request.path[:200]}; /openapi.json lists all paths."
    return error.text or error.reason
