"""One HTTP request to one node, and what is known afterwards.

The client of the product retries and fails over by itself, which is right for users. Here each try counts on its own:
whom it asked, when, and whether it surely had an effect, surely had none, or may have had one.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from chaos.records import Outcome
from distroml.client_transport import note_sent

INDEX_HEADER = "X-DistroML-Index"
CONNECT_TIMEOUT_S = 1.0
MAX_ERROR_CHARACTERS = 200

_UNKNOWN_STATUS = frozenset({500, 502, 504})
"""Besides these a refusal says that nothing was done (503 too: see ``Services.propose``)."""


class Answer(Struct, frozen=True, kw_only=True):
    """What came of one request."""

    outcome: Outcome
    status: int | None = None
    index: int | None = None
    """Log index of the state that it shows."""
    body: Any = None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK


class Api:
    """Asks nodes, one request at a time per call. Use with ``async with``."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), trace_configs=[note_sent()]
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, url: str, path: str, *, timeout_s: float = 5.0, **params: Any) -> Answer:
        """A read; parameters that are None are left out."""
        return await self.ask("GET", url, path, timeout_s=timeout_s, params=params)

    async def ask(
        self,
        method: str,
        url: str,
        path: str,
        *,
        key: str | None = None,
        body: Any = None,
        params: dict[str, Any] | None = None,
        timeout_s: float = 5.0,
    ) -> Answer:
        """One try; never raises for what a node or the network does.

        Args:
            key: Idempotency-Key of a write.
            body: encoded as JSON.
        """
        assert self._session is not None, "use it with `async with`"
        headers = {} if key is None else {"Idempotency-Key": key}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(body)
        query = {name: str(value) for name, value in (params or {}).items() if value is not None}
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        sent: set[str] = set()
        try:
            async with self._session.request(
                method,
                url + path,
                params=query,
                data=data,
                headers=headers,
                timeout=timeout,
                trace_request_ctx=sent,
            ) as response:
                raw = await response.read()
                return _answer(response.status, response.headers.get(INDEX_HEADER), raw)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            outcome = Outcome.UNKNOWN if sent else Outcome.FAILED
            return Answer(outcome=outcome, error=_told(error))
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return Answer(outcome=Outcome.UNKNOWN, error=_told(error))


def _answer(status: int, index: str | None, raw: bytes) -> Answer:
    try:
        body = msgspec.json.decode(raw) if raw else None
    except msgspec.DecodeError:
        return Answer(outcome=Outcome.UNKNOWN, status=status, error="the answer is not JSON")
    document = body if isinstance(body, dict) else {}
    slow_problem = str(document.get("type", "")).startswith("/problems/")
    outcome, error = Outcome.OK, ""
    if status >= 400 or slow_problem:
        outcome = Outcome.UNKNOWN if status in _UNKNOWN_STATUS else Outcome.FAILED
        error = str(document.get("detail") or document.get("title") or f"HTTP {status}")
    at = int(index) if index is not None and index.isdecimal() else None
    return Answer(
        outcome=outcome, status=status, index=at, body=body, error=error[:MAX_ERROR_CHARACTERS]
    )


def _told(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:MAX_ERROR_CHARACTERS]
