"""Connections to an S3 endpoint, and every request's attempts; the only importer of aiobotocore.

The library is loaded with the first request, or by whoever forks processes that will make some. Retrying, timeouts and
errors are ours (``retrying``, ``s3_errors``), so its own are off. It takes credentials from where AWS tools take them; a
request that they were refused for makes the next one look anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from distroml.errors import ConfigError, StoreError
from distroml.runtime.checkpoint.stores.interface import MissingFile
from distroml.runtime.checkpoint.stores.loop_thread import loop_thread
from distroml.runtime.checkpoint.stores.redaction import redacted
from distroml.runtime.checkpoint.stores.retrying import ATTEMPT_S, attempt_timeout_s, pause_s
from distroml.runtime.checkpoint.stores.s3_errors import Failure, Kind, understand
from distroml.store_urls import StoreSettings, StoreUrl

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
"""Silence of the server after which an attempt is over."""
MAX_CONNECTIONS = 32
RENEW_S = 5.0
"""Credentials that were refused are looked up anew, but not more often than this."""
DEFAULT_REGION = "us-east-1"
"""What servers other than AWS take; AWS tells if the bucket is elsewhere."""

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Request = Callable[[Any], Awaitable[_T]]


class Place(Struct, frozen=True):
    """Where requests go and as whom; two stores of one place share its connections."""

    endpoint: str
    region: str
    path_style: str
    profile: str
    credentials_file: str

    @property
    def told(self) -> str:
        """For people."""
        return redacted(self.endpoint) or "AWS"


def place_of(
    url: StoreUrl, settings: StoreSettings, environ: Mapping[str, str] = os.environ
) -> Place:
    """What the URL says goes before what the node says; what neither says, AWS's own variables and files may."""
    usual = next((environ[name] for name in _ENDPOINT_VARIABLES if environ.get(name)), "")
    return Place(
        endpoint=url.options.get("endpoint") or settings.s3_endpoint or usual,
        region=url.options.get("region") or settings.s3_region,
        path_style=url.options.get("path_style", ""),
        profile=settings.s3_profile,
        credentials_file=settings.s3_credentials_file,
    )


class Refused(Exception):
    """A request failed for good, or for too long."""

    def __init__(self, failure: Failure, attempts: int) -> None:
        super().__init__(failure.detail)
        self.failure, self.attempts = failure, attempts


class Requests:
    """Sends requests for one store.

    Args:
        name: of the store, for errors.
    """

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place = name, place

    async def do(self, operation: str, *, size_bytes: int = 0, **request: Any) -> dict[str, Any]:
        """The answer to an operation of the client, as ``send``."""
        return await self.send(
            lambda client: getattr(client, operation)(**request), size_bytes=size_bytes
        )

    async def send(self, request: Request[_T], *, size_bytes: int = 0) -> _T:
        """The request's answer, after as many attempts as it may take. In the loop.

        Args:
            size_bytes: that it moves.

        Raises:
            Refused: there was none.
        """
        thread = loop_thread()
        began, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(attempt_timeout_s(size_bytes)):
                    client = await thread.client(self.place, self._connect)
                    return await request(client)
            except Exception as error:
                if isinstance(error, StoreError):
                    raise
                failure = understand(error)
            if failure.kind is Kind.CREDENTIALS:
                thread.forget(self.place, RENEW_S)
            wait_s = None
            if failure.kind is Kind.AGAIN:
                elapsed_s = time.monotonic() - began
                wait_s = pause_s(attempt, elapsed_s, failure.asked_wait_s, random.random())
            if wait_s is None:
                raise Refused(failure, attempt)
            _log.info("%s at %s: %s; trying again", self.name, self.place.told, failure.detail)
            await asyncio.sleep(wait_s)

    def error(self, action: str, path: str, refused: Refused) -> StoreError:
        """What the caller of a store is told."""
        if refused.failure.kind is Kind.MISSING:
            return MissingFile(f"The checkpoint store {self.name} has no file {path!r}.", path=path)
        tried = f" Tried {refused.attempts} times." if refused.attempts > 1 else ""
        return StoreError(
            f"The checkpoint store {self.name} at {self.place.told} cannot {action} {path!r}: "
            f"{refused.failure.detail}.{tried}",
            path=path,
        )

    async def _connect(self, stack: AsyncExitStack) -> Any:
        # in another thread: it takes a second, and other stores' requests go on meanwhile
        session, config = await asyncio.to_thread(_session, self.place)
        region = self.place.region or session.get_config_variable("region") or DEFAULT_REGION
        endpoint = self.place.endpoint or None
        client = session.create_client(
            "s3", region_name=region, endpoint_url=endpoint, config=config
        )
        # credentials may come from a program or another host
        async with asyncio.timeout(ATTEMPT_S):
            return await stack.enter_async_context(client)


def library() -> tuple[Any, Any]:
    """The classes that are needed of aiobotocore; loading it takes most of a second.

    Raises:
        StoreError: it is not installed.
    """
    try:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import AioSession
    except ImportError:
        raise StoreError(
            "s3:// needs the package aiobotocore on every node: pip install 'distroml[s3]'."
        ) from None
    return AioConfig, AioSession


def _session(place: Place) -> tuple[Any, Any]:
    AioConfig, AioSession = library()  # noqa: N806
    for name in ("botocore", "aiobotocore"):  # at DEBUG they write down requests with their tokens
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    session = AioSession(profile=place.profile or None)
    if place.credentials_file:
        session.set_config_variable("credentials_file", _checked(place.credentials_file))
    style = {"true": "path", "false": "virtual"}.get(place.path_style)
    # AWS wants the bucket in the host's name; other servers rarely have such names
    style = style or ("path" if place.endpoint else "auto")
    return session, AioConfig(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=MAX_CONNECTIONS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # each upload carries a checksum that is signed; signing the bytes too would be to hash them twice
        s3={"addressing_style": style, "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _checked(path: str) -> str:
    from distroml.credentials import read_private

    try:
        read_private(Path(path), what="S3 credentials file", field="s3_credentials_file")
    except ConfigError as error:
        raise StoreError(error.detail) from None
    return path
