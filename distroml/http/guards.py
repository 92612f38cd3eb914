"""Who may ask: a check against web pages of other origins, and the seam where authentication goes.

A server on loopback is reachable from every page in the user's browser. A page at a foreign name that was rebound
to this address (DNS rebinding) shows that name in ``Host``; a page of another origin shows itself in ``Origin``.
Programs that are not browsers send neither falsely and notice nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

from aiohttp import web

from distroml.errors import InvalidRequest
from distroml.http.limits import HttpSettings
from distroml.model import Node

Authenticate = Callable[[web.Request], Awaitable[None]]
"""Raises ``errors.Unauthorized`` (or lets pass). The default lets everybody pass."""

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def check_origin(request: web.Request, settings: HttpSettings, nodes: Iterable[Node]) -> None:
    """Refuse what a foreign web page may have caused.

    Args:
        nodes: of the cluster; the hosts of their URLs are known names.

    Raises:
        web.HTTPMisdirectedRequest: ``Host`` is a name that is not this node's.
        web.HTTPForbidden: a write or WebSocket from another origin.
    """
    host = request.headers.get("Host", "")
    name, _ = _split(host)
    if host and not _is_ours(name, settings, nodes):
        raise web.HTTPMisdirectedRequest(
            text=f"Host '{host[:200]}' is not a name of this node; use its address, or start the node with "
            "this name in --allowed-hosts."
        )
    upgrade = request.headers.get("Upgrade", "").lower() == "websocket"
    if request.method in _READS and not upgrade:
        return
    origin = request.headers.get("Origin")
    if origin is not None and not _same(origin, host):
        raise web.HTTPForbidden(
            text=f"Origin '{origin[:200]}' is not this node; only its own pages may do this."
        )
    if origin is None and request.headers.get("Sec-Fetch-Site", "none") not in (
        "none",
        "same-origin",
    ):
        raise web.HTTPForbidden(text="Another site's page caused this request; it may not do this.")


def _is_ours(name: str, settings: HttpSettings, nodes: Iterable[Node]) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        allowed = settings.allowed_hosts
        if "*" in allowed or name in allowed or name == socket.gethostname().lower():
            return True
        return any(name == urlsplit(node.http).hostname for node in nodes)
    return True


def _same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
        default = _DEFAULT_PORTS.get(parts.scheme)
        theirs = ((parts.hostname or "").lower(), parts.port or default)
    except ValueError:
        return False
    name, port = _split(host)
    return default is not None and theirs == (name, port or default)


def _split(host: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise InvalidRequest(
            f"The Host header {host[:200]!r} is not a host.", field="Host"
        ) from None
