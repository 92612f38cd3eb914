"""One call to a cluster: an HTTP request or a stream that moves from node to node until one answers.

``client`` gives the calls their names; ``failover`` decides which node is next; here is the I/O between them, with
bounded times and sizes. aiohttp is imported with the first call: it costs more than the rest of the command line.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from distroml.errors import UNDECODABLE, ConfigError, DistroMLError, Unavailable, all_kinds
from distroml.failover import Attempt, Failover, parse_urls

if TYPE_CHECKING:
    import aiohttp

Json = dict[str, Any]
Params = Mapping[str, str | int | None]

DEFAULT_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 3.0
IDLE_TIMEOUT_S = 6.0
"""A node that sends nothing for this long is passed over; the call goes on elsewhere."""
STREAM_HEARTBEAT_S = 5.0
"""Ping interval of a stream; a node that does not answer within half of it counts as dead."""
RESUME_PAUSE_S = 0.05
"""Least time between two connections of a stream, so that a node which drops it at once is not stormed."""
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
MAX_EVENT_BYTES = 4 * 1024 * 1024
END_EVENT = "end"
PROBLEM_PREFIX = "/problems/"
DOWNLOAD_IDLE_S = 600.0
"""A node verifies a whole export before it sends the first byte."""

_TRY_ELSEWHERE = frozenset({502, 503, 504})


class Transport:
    """Connections to the nodes of one cluster.

    Args:
        urls: base URLs of the nodes.
        timeout_s: bound of each call, all retries included.

    Raises (all calls):
        Unavailable: no node answered in time; names all URLs tried. OutcomeUnknown where a write may have happened.
        DistroMLError: the subclass for the problem document that a node answered with.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        self.urls = parse_urls(",".join(urls))
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s must be positive, not {timeout_s}.", field="timeout_s")
        self.timeout_s = timeout_s
        self._preferred = 0
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: bytes | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> Json:
        """One request, answered by some node.

        Args:
            params: query parameters; those that are None are left out.
            key: Idempotency-Key, the same for all retries; required for a write.
            timeout_s: in place of the client's own bound, for what takes long.
        """
        headers = {} if key is None else {"Idempotency-Key": key}
        if body is not None:
            headers["Content-Type"] = "application/json"
        query = _query(params)
        failover = self._failover(timeout_s=timeout_s)
        while (attempt := failover.next(_now())) is not None:
            await asyncio.sleep(attempt.wait_s)
            sent: set[str] = set()
            try:
                status, retry_after_s, answer = await self._ask(
                    attempt,
                    method,
                    path,
                    params=query,
                    data=body,
                    headers=headers,
                    trace_request_ctx=sent,
                )
            except (_aiohttp().ConnectionTimeoutError, _aiohttp().ClientConnectorError) as error:
                failover.failed(_why(error), reached=bool(sent), maybe_done=bool(sent))
                continue
            except (_aiohttp().ClientError, OSError) as error:
                failover.failed(_why(error), reached=True, maybe_done=True)
                continue
            if status in _TRY_ELSEWHERE:
                why = f"HTTP {status}: {answer.get('detail') or answer.get('title') or 'not now'}"
                unknown = status != 503
                failover.failed(why, reached=True, maybe_done=unknown, retry_after_s=retry_after_s)
                continue
            self._preferred = failover.index
            if status >= 400:
                raise error_from_problem(status, answer)
            if str(answer.get("type", "")).startswith(PROBLEM_PREFIX):
                # The node had to send its status before it knew how this ends.
                raise error_from_problem(int(answer.get("status", 500)), answer)
            return answer
        raise failover.error(f"{method} {path}", key)

    async def download(
        self, path: str, target: Path, *, params: Params | None = None, timeout_s: float
    ) -> int:
        """Fetch a file, from another node anew where one breaks off; its size in bytes.

        ``target`` appears whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        failover = self._failover(timeout_s=timeout_s)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            while (attempt := failover.next(_now())) is not None:
                await asyncio.sleep(attempt.wait_s)
                try:
                    size = await self._fetch(attempt, path, part, _query(params))
                except (
                    _aiohttp().ConnectionTimeoutError,
                    _aiohttp().ClientConnectorError,
                ) as error:
                    failover.failed(_why(error), reached=False)
                    continue
                except _aiohttp().ClientError as error:
                    failover.failed(_why(error), reached=True)
                    continue
                except Unavailable as error:
                    failover.failed(error.detail, reached=True)
                    continue
                self._preferred = failover.index
                part.replace(target)
                return size
            raise failover.error(f"GET {path}")
        finally:
            part.unlink(missing_ok=True)

    async def _fetch(self, attempt: Attempt, path: str, part: Path, query: dict[str, str]) -> int:
        """The file from one node, whole. Raises what its problem document says."""
        aiohttp = _aiohttp()
        timeout = aiohttp.ClientTimeout(
            total=attempt.timeout_s, sock_connect=CONNECT_TIMEOUT_S, sock_read=DOWNLOAD_IDLE_S
        )
        async with self._open().get(
            attempt.url + path, params=query, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status >= 400:
                raw = await response.content.read(MAX_EVENT_BYTES)
                raise error_from_problem(
                    response.status, _document(raw, response.status, attempt.url + path)
                )
            with part.open("wb") as file:
                async for chunk in response.content.iter_any():
                    file.write(chunk)
                return file.tell()

    async def _ask(
        self, attempt: Attempt, method: str, path: str, **request: Any
    ) -> tuple[int, float, Json]:
        """One request to one node: status, Retry-After in seconds, document."""
        aiohttp = _aiohttp()
        timeout = aiohttp.ClientTimeout(
            total=attempt.timeout_s, sock_connect=CONNECT_TIMEOUT_S, sock_read=IDLE_TIMEOUT_S
        )
        async with self._open().request(
            method, attempt.url + path, timeout=timeout, allow_redirects=False, **request
        ) as response:
            raw = bytearray()
            async for chunk in response.content.iter_any():
                raw += chunk
                if len(raw) > MAX_RESPONSE_BYTES:
                    raise DistroMLError(
                        f"{attempt.url}{path} answered with more than {MAX_RESPONSE_BYTES} bytes; "
                        "ask for fewer lines, points or jobs."
                    )
            retry_after = response.headers.get("Retry-After", "")
            retry_after_s = float(retry_after) if retry_after.isdecimal() else 0.0
            answer = _document(raw, response.status, attempt.url + path)
            return response.status, retry_after_s, answer

    async def stream(
        self, job_path: str, cursor: str | None, types: Sequence[str]
    ) -> AsyncGenerator[Json, None]:
        """The events of a job after ``cursor``, through the end event, from one node or several in turn."""
        aiohttp = _aiohttp()
        failover = self._failover(persist=True)
        while (attempt := failover.next(_now())) is not None:
            await asyncio.sleep(attempt.wait_s)
            why = "the stream closed before its end event"
            try:
                async with self._connect(attempt, job_path, cursor, types) as socket:
                    async for message in socket:
                        if message.type is not aiohttp.WSMsgType.TEXT:
                            why = f"the stream broke: {message.data}"
                            break
                        event = msgspec.json.decode(message.data)
                        cursor = event.get("cursor", cursor)
                        failover.renew(_now() + self.timeout_s)
                        self._preferred = failover.index
                        yield event
                        if event.get("type") == END_EVENT:
                            return
            except aiohttp.WSServerHandshakeError as error:
                if error.status not in _TRY_ELSEWHERE:
                    raise await self._explain_refusal(job_path, error.status) from None
                why = f"HTTP {error.status}"
            except (aiohttp.ClientError, OSError) as error:
                why = _why(error)
            failover.failed(why, reached=True)
            await asyncio.sleep(RESUME_PAUSE_S)
        raise failover.error(f"stream of {job_path}")

    def _connect(
        self, attempt: Attempt, job_path: str, cursor: str | None, types: Sequence[str]
    ) -> Any:
        query = {} if cursor is None else {"cursor": cursor}
        if types:
            query["types"] = ",".join(types)
        return self._open().ws_connect(
            f"{attempt.url}{job_path}/stream",
            params=query,
            heartbeat=STREAM_HEARTBEAT_S,
            max_msg_size=MAX_EVENT_BYTES,
        )

    async def _explain_refusal(self, job_path: str, status: int) -> DistroMLError:
        """A refused WebSocket carries no document: ask for the job to learn what is wrong."""
        try:
            await self.call("GET", job_path)
        except DistroMLError as error:
            return error
        detail = f"The stream was refused with HTTP {status}: check its cursor and types."
        return error_from_problem(status, {"detail": detail})

    def _failover(self, *, persist: bool = False, timeout_s: float | None = None) -> Failover:
        return Failover(
            self.urls,
            start=self._preferred,
            deadline=_now() + (self.timeout_s if timeout_s is None else timeout_s),
            random=random.random,
            persist=persist,
        )

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            aiohttp = _aiohttp()
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "application/json"},
                trace_configs=[note_sent()],
            )
        return self._session


def note_sent() -> aiohttp.TraceConfig:
    """Has each request add its method to its ``trace_request_ctx``, a set, once it was sent to anybody.

    aiohttp sends what is idempotent anew where a kept connection turns out to be closed. So a connection that is refused does
    not mean that nothing was done: the node may have died of the first one.
    """

    async def sent(_: Any, context: Any, request: Any) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.add(request.method)

    config: aiohttp.TraceConfig = _aiohttp().TraceConfig()
    config.on_request_headers_sent.append(sent)
    return config


def _query(params: Params | None) -> dict[str, str]:
    return {name: str(value) for name, value in (params or {}).items() if value is not None}


def error_from_problem(status: int, document: Json) -> DistroMLError:
    """The exception for a problem document: by the last part of its ``type``, else by the status."""
    slug = str(document.get("type", "")).rstrip("/").replace(":", "/").rpartition("/")[2]
    kind = _BY_SLUG.get(slug) or _BY_STATUS.get(status, DistroMLError)
    detail = document.get("detail") or document.get("title") or f"HTTP {status}"
    field = document.get("field")
    extra = {name: value for name, value in document.items() if name not in _PROBLEM_MEMBERS}
    return kind(str(detail), field=None if field is None else str(field), **extra)


_PROBLEM_MEMBERS = frozenset({"type", "title", "status", "detail", "field", "instance", "self"})
_BY_SLUG = {kind.slug: kind for kind in all_kinds()}
_BY_STATUS: dict[int, type[DistroMLError]] = {
    kind.status: kind for kind in reversed(list(all_kinds())) if kind is not ConfigError
}


def _document(raw: bytes | bytearray, status: int, url: str) -> Json:
    """The JSON object that a node answered with; empty for an empty body."""
    if not raw:
        return {}
    try:
        answer = msgspec.json.decode(raw)
    except UNDECODABLE:
        answer = None
    if isinstance(answer, dict):
        return answer
    if status in _TRY_ELSEWHERE:
        return {}
    raise DistroMLError(
        f"{url} answered HTTP {status} with something that is not a JSON object: "
        "is this the address of a DistroML node?"
    )


def _aiohttp() -> ModuleType:
    return importlib.import_module("aiohttp")


def _now() -> float:
    return time.monotonic()


def _why(error: BaseException) -> str:
    """A few words on a failed connection."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    number = getattr(getattr(error, "os_error", error), "errno", None)
    return (os.strerror(number) if number else str(error)) or type(error).__name__
