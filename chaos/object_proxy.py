"""A proxy before an S3 server, which fails as networks and servers do.

What becomes of a request is up to a subclass (``harm_of``): ``chaos.object_server`` draws it by the faults of a run, tests say
it of single requests. Without harm a request is forwarded, and its answer is the server's.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
POLL_S = 0.05
UPSTREAM_TIMEOUT_S = 30.0
_READS = ("GET", "HEAD")


@dataclass
class Asked:
    """One request, as the proxy sees it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def is_part(self) -> bool:
        """Whether it uploads a part of a large object."""
        return self.method == "PUT" and "partNumber=" in self.target

    def named(self, text: str) -> bool:
        """Whether its path or query has this text."""
        return text in self.target


@dataclass(kw_only=True)
class Harm:
    """What becomes of a request."""

    answer: tuple[int, str] | None = None
    """Status and code of an S3 error, instead of the server's answer."""
    message: str = ""
    """Of that error."""
    headers: dict[str, str] = field(default_factory=dict)
    reset: str = ""
    """``request``: in the middle of the request's body; ``answer``: after the server has done it."""
    change: Callable[[bytes], bytes] = bytes
    """Of the body of the answer."""
    cut: int | None = None
    """Bytes of the answer's body that arrive before the connection closes."""
    delay_s: float = 0.0


class ObjectProxy:
    """Forwards to ``upstream`` what no harm takes; accepts connections from the start.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, upstream: str, host: str = LOOPBACK, port: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.one_write = threading.Lock()
        """moto looks whether a name is taken and then takes it; so two writers take turns."""
        self._handler = type("Handler", (_Handler,), {"proxy": self})
        self._server: _Server | None = None
        self._address = (host, port)
        self.accept()
        self.url = "http://{}:{}".format(*self._address)

    def harm_of(self, asked: Asked) -> Harm | None:
        """What becomes of a request; None: it is forwarded. In any thread."""
        return None

    def delay(self, delay_s: float) -> None:
        """Hold one request back."""
        time.sleep(delay_s)

    def holds(self, size_bytes: int) -> None:
        """The sender of a request keeps so many bytes more (or fewer) until it has the answer."""

    def accept(self) -> None:
        """Listen, at the same address as before; nothing to do where it does."""
        if self._server is None:
            self._server = _Server(self._address, self._handler)
            host, port = self._server.server_address[:2]
            self._address = str(host), int(port)
            serve = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), daemon=True)
            serve.start()

    def refuse(self) -> None:
        """Refuse connections; those that there are stay. Nothing to do where it does."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    close = refuse


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: ObjectProxy

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        length = int(asked.headers.get("content-length", 0))
        self._held = length
        self.proxy.holds(length)
        try:
            self._serve(asked, length)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self._let_go()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815 - the names that http.server calls

    def _let_go(self) -> None:
        """The sender keeps the bytes of a request until it has the answer; so they count until just before that."""
        self.proxy.holds(-self._held)
        self._held = 0

    def _serve(self, asked: Asked, length: int) -> None:
        harm = self.proxy.harm_of(asked) or Harm()
        if harm.reset == "request":
            self.rfile.read(length // 2)
            self._reset()
            return
        asked.body = self.rfile.read(length)
        if len(asked.body) < length:  # the sender died: no server does half of a request
            self.close_connection = True
            return
        if harm.delay_s:
            self.proxy.delay(harm.delay_s)
        if harm.answer is not None:
            self._refuse(harm, *harm.answer)
            return
        answer, body = self._forward(asked)
        if harm.reset == "answer":
            self._reset()
            return
        self._answer(answer, harm.change(body), harm.cut)

    def _forward(self, asked: Asked) -> tuple[http.client.HTTPResponse, bytes]:
        if asked.method in _READS:
            return self._ask_upstream(asked)
        with self.proxy.one_write:
            return self._ask_upstream(asked)

    def _ask_upstream(self, asked: Asked) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            headers = {k: v for k, v in asked.headers.items() if k not in ("expect", "connection")}
            upstream.request(asked.method, asked.target, asked.body, headers)
            answer = upstream.getresponse()
            return answer, answer.read()
        finally:
            upstream.close()

    def _answer(self, answer: http.client.HTTPResponse, body: bytes, cut: int | None) -> None:
        self._let_go()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = answer.getheader("content-length") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def _refuse(self, harm: Harm, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{harm.message}</Message></Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        self._let_go()
        self.send_response_only(status)
        for name, value in harm.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        """Close so that the other side gets ECONNRESET."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.rfile = self.wfile = _Closed()  # type: ignore[assignment]


class _Closed:
    """What is left of a connection that was reset."""

    closed = True

    def readline(self, *_: int) -> bytes:
        return b""

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
