"""Bounds on what one request may cost, and strict reading of bodies, queries and headers.

Everything a client sends passes here before a handler sees it; what does not fit is refused with the name of
the offending place and nothing has happened yet.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from distroml.errors import (
    UNDECODABLE,
    BodyTooLarge,
    InvalidRequest,
    InvalidSpec,
    TooManyRequests,
    UnsupportedMedia,
)
from distroml.misspelt import unknown_field

JSON_TYPE = "application/json"
MAX_LINE_BYTES = 32 * 1024
"""Request line, with room for the longest cursor of a stream (``cursor.MAX_CURSOR_CHARACTERS``)."""
MAX_HEADER_BYTES = 32 * 1024
"""Each header field, with room for the same in ``Last-Event-ID``; the parser refuses longer ones."""
MAX_HEADERS = 100
MAX_QUERY_PAIRS = 64
KEY_HEADER = "Idempotency-Key"
INDEX_HEADER = "X-DistroML-Index"
"""Log index applied when the answer was made; a handler that awaits after it took the state sets it itself."""
JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z"

_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")
_JOB_ID = re.compile(JOB_ID_PATTERN)
_STEP = re.compile(r"[0-9]{1,12}\Z")

T = TypeVar("T", bound=Struct)


class HttpSettings(Struct, frozen=True, kw_only=True):
    """Limits of one node's HTTP server; each has a default that suits a small host."""

    body_max_bytes: int = 1024 * 1024
    body_timeout_s: float = 10.0
    """A body must have arrived within this."""
    write_timeout_s: float = 10.0
    """How long a write waits for the log before the answer is 503 or 504."""
    requests_max: int = 256
    """Requests in work at once, streams and probes apart."""
    streams_max: int = 256
    """Open WebSocket and SSE streams."""
    connections_max: int = 2048
    keepalive_timeout_s: float = 75.0
    stream_heartbeat_s: float = 20.0
    stream_send_timeout_s: float = 10.0
    """A reader that does not take what was sent within this is dropped."""
    stream_resource_s: float = 1.0
    """Least time between two ``resource`` messages of one stream."""
    shutdown_timeout_s: float = 3.0
    allowed_hosts: tuple[str, ...] = ()
    """Host names (in lower case) by which this node may be called besides ``localhost``, IP addresses, its own host's name
    and those in the URLs of the cluster's nodes; ``*`` for any."""


class Query(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The query parameters of a route, one field each; base of those and itself: none allowed."""


class Read(Query, frozen=True, kw_only=True):
    """Query of every GET under ``/api``."""

    consistency: Annotated[
        Literal["local", "linearizable"],
        Meta(
            description="local: what the answering node has applied (X-DistroML-Index tells how far); "
            "linearizable: at least everything that any node had acknowledged before this request"
        ),
    ] = "local"


class Gate:
    """Counts what is going on and refuses what would be too much; never queues."""

    def __init__(self, what: str, most: int) -> None:
        self._what = what
        self._most = most
        self.inside = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Raises TooManyRequests at once when full."""
        if self.inside >= self._most:
            raise TooManyRequests(
                f"This node serves {self._most} {self._what} at once and all are taken; "
                "try again shortly or at another node."
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def job_id_of(request: web.Request) -> str:
    """The ``{job_id}`` of the path.

    Raises:
        InvalidRequest: it could not be the id of any job.
    """
    job_id = request.match_info["job_id"]
    if not _JOB_ID.match(job_id):
        raise InvalidRequest(
            "The job id in the path must be 1 to 63 letters, digits, '-' or '_'.", field="job_id"
        )
    return job_id


def step_of(request: web.Request) -> int:
    """The ``{step}`` of the path.

    Raises:
        InvalidRequest: it is not a number of steps.
    """
    text = request.match_info["step"]
    if not _STEP.match(text):
        raise InvalidRequest(
            f"The step in the path must be a whole number, not {text[:40]!r}.", field="step"
        )
    return int(text)


def parse_query(request: web.Request, kind: type[T]) -> T:
    """The query string as a ``Query`` Struct: fields of tuple type may be repeated.

    Raises:
        InvalidRequest: unknown, repeated, mistyped or out of range; ``field`` names it.
    """
    types = _field_types(kind)
    if len(request.query) > MAX_QUERY_PAIRS:
        raise InvalidRequest(f"More than {MAX_QUERY_PAIRS} query parameters.")
    values: dict[str, Any] = {}
    for name in dict.fromkeys(request.query):
        given = request.query.getall(name)
        if name not in types:
            known = ", ".join(types) or "none"
            raise InvalidRequest(
                f"Unknown query parameter {name[:100]!r}; this path takes: {known}.",
                field=name[:100],
            )
        if _is_tuple(types[name]):
            values[name] = given
        elif len(given) > 1:
            raise InvalidRequest(f"Query parameter '{name}' is given twice.", field=name)
        else:
            values[name] = given[0]
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        name = re.split(r"[.\[`]", where)[0]
        value = ", ".join(request.query.getall(name, []))[:100]
        raise InvalidRequest(
            f"Query parameter '{name}': {_lower_first(text)}; {value!r} was given.",
            field=name or None,
        ) from None


@cache
def _field_types(kind: type[Struct]) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _is_tuple(kind: Any) -> bool:
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return get_origin(bare) is tuple


def idempotency_key(request: web.Request) -> str | None:
    """The ``Idempotency-Key`` header, None where there is none.

    Raises:
        InvalidRequest: given twice, empty, too long or not visible ASCII.
    """
    given = request.headers.getall(KEY_HEADER, [])
    if not given:
        return None
    if len(given) > 1 or not _KEY.match(given[0]):
        raise InvalidRequest(
            f"{KEY_HEADER} must be given once, as 1 to 255 visible ASCII characters without spaces.",
            field=KEY_HEADER,
        )
    return given[0]


async def read_body(request: web.Request, settings: HttpSettings) -> bytes:
    """The whole JSON body, still encoded.

    A missing Content-Type counts as JSON; any other media type, charset or content coding is refused.

    Raises:
        UnsupportedMedia, BodyTooLarge, InvalidRequest: see there.
    """
    _check_media(request)
    announced = request.content_length
    if announced is not None and announced > settings.body_max_bytes:
        raise _too_large(settings)
    has_arrived = request.content.is_eof()  # then there is nothing to wait for, and no timer to pay
    try:
        async with asyncio.timeout(None if has_arrived else settings.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(settings) from None
    except TimeoutError:
        raise web.HTTPRequestTimeout(
            text=f"The body did not arrive within {settings.body_timeout_s:g} s."
        ) from None
    except (web.RequestPayloadError, ValueError) as error:
        raise InvalidRequest(f"The body cannot be read: {error}.") from None


async def read_nothing(request: web.Request, settings: HttpSettings) -> None:
    """Accept no body or an empty JSON object.

    Raises:
        InvalidRequest, InvalidSpec: there is something in it; names the first field.
    """
    if not request.can_read_body:
        return
    body = await read_body(request, settings)
    if not body.strip():
        return
    try:
        msgspec.json.decode(body, type=Query)
    except msgspec.ValidationError as error:
        raise InvalidSpec(
            f"This request takes no fields: {error}.", field=unknown_field(str(error))
        ) from None
    except UNDECODABLE as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from None


def _check_media(request: web.Request) -> None:
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding != "identity":
        raise UnsupportedMedia(
            f"Content-Encoding '{coding[:40]}' is not read; send the body as it is.",
            field="Content-Encoding",
        )
    if "Content-Type" not in request.headers:
        return
    charset = (request.charset or "utf-8").lower()
    if request.content_type != JSON_TYPE or charset not in ("utf-8", "utf8", "us-ascii"):
        given = request.headers["Content-Type"][:100]
        raise UnsupportedMedia(
            f"Content-Type '{given}' is not read; send '{JSON_TYPE}' in UTF-8.",
            field="Content-Type",
        )


def _too_large(settings: HttpSettings) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body is larger than {settings.body_max_bytes} bytes, the limit of this endpoint.",
        limit_bytes=settings.body_max_bytes,
    )


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
