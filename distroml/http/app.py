"""The HTTP server of a node: route table in, listening socket out.

A request passes, outermost first: ``observe`` (id, headers, counters) → ``problem_middleware`` (errors become
documents, or break off what was begun) → ``guard`` (host, origin, authentication) → the route's handler under its
limits. What the HTTP parser itself refuses never becomes a request; ``_Protocol`` answers that with a problem document
too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from distroml.errors import InvalidRequest, Unavailable
from distroml.http import limits, openapi, problems
from distroml.http.guards import Authenticate, check_origin
from distroml.http.limits import Gate, Read
from distroml.http.routes import checkpoints, cluster, job_records, jobs, ops
from distroml.http.services import Services
from distroml.http.table import Call, Route
from distroml.http.telemetry import Telemetry

NODE_HEADER = "X-DistroML-Node"
REQUEST_ID_HEADER = "X-Request-Id"
BACKLOG = 1024
UNKNOWN_JOB_WAIT_S = 2.0
"""How long a read waits to learn whether there is a job that is not known here."""
UNKNOWN_ROUTE = "none"
"""Label of requests that match no route; their paths are not bounded."""

ROUTES: tuple[Route, ...] = (
    *jobs.ROUTES,
    *job_records.ROUTES,
    *checkpoints.ROUTES,
    *cluster.ROUTES,
    *ops.ROUTES,
)

_ROUTE = web.RequestKey("route", Route)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_log = logging.getLogger(__name__)


async def _everybody(request: web.Request) -> None:
    """Authentication of a loopback server: none."""


class HttpServer:
    """Serves one node's API and dashboard.

    Args:
        services: the node.
        authenticate: raises ``Unauthorized`` for a request that may not pass.
    """

    def __init__(self, services: Services, *, authenticate: Authenticate = _everybody) -> None:
        self._services = services
        self._authenticate = authenticate
        self._telemetry = Telemetry(services)
        self._closing = asyncio.Event()
        self._requests = Gate("requests", services.settings.requests_max)
        self._streams = Gate("streams", services.settings.streams_max)
        self._openapi = openapi.document(ROUTES, services.version)
        self.app = self._application()
        self._runner: _Runner | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; port 0 takes a free one. Returns the address in use.

        Raises:
            OSError: the address cannot be bound.
        """
        settings = self._services.settings
        self._runner = _Runner(
            self.app,
            self._services,
            access_log=None,
            keepalive_timeout=settings.keepalive_timeout_s,
            shutdown_timeout=settings.shutdown_timeout_s,
            max_line_size=limits.MAX_LINE_BYTES,
            max_field_size=limits.MAX_HEADER_BYTES,
            max_headers=limits.MAX_HEADERS,
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, backlog=BACKLOG).start()
        address = self._runner.addresses[0]
        return str(address[0]), int(address[1])

    async def stop(self) -> None:
        """Stop listening, end streams with 1001, let requests in work finish for a bounded time."""
        self._closing.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _application(self) -> web.Application:
        app = web.Application(
            client_max_size=self._services.settings.body_max_bytes,
            middlewares=(self._observe, problems.problem_middleware, self._guard),
        )
        app.on_response_prepare.append(self._sign)
        methods: dict[str, list[str]] = {}
        for route in ROUTES:
            handler = self._handler(route)
            resource = app.router.add_resource(route.path, name=None)
            served = ["GET", "HEAD"] if route.method == "GET" and route.head else [route.method]
            for method in served:
                resource.add_route(method, handler, expect_handler=_expect)
            methods.setdefault(route.path, []).extend(served)
        for path, served in methods.items():
            app.router.add_route("OPTIONS", path, _options(sorted({*served, "OPTIONS"})))
        return app

    def _handler(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            request[_ROUTE] = route
            query = limits.parse_query(request, route.query)
            if isinstance(query, Read):
                await self._catch_up(request, query)
            call = Call(
                request=request,
                services=self._services,
                streams=self._streams,
                telemetry=self._telemetry,
                openapi=self._openapi,
                closing=self._closing,
            )
            if not route.gated:
                return await route.handler(call, query)
            with self._requests.enter():
                return await route.handler(call, query)

        return handle

    async def _catch_up(self, request: web.Request, query: Read) -> None:
        """Apply what the read is to see: all that was acknowledged before, where it asks for that.

        So is a job that is not known here: it may have been submitted at another node a moment ago.
        """
        services, job_id = self._services, request.match_info.get("job_id")
        if query.consistency == "linearizable":
            await services.read_barrier(services.settings.write_timeout_s)
        elif job_id is not None and job_id not in services.state().jobs:
            with contextlib.suppress(Unavailable):  # then what is known here has to do
                await services.read_barrier(UNKNOWN_JOB_WAIT_S)

    @web.middleware
    async def _observe(self, request: web.Request, handler: problems.Handler) -> web.StreamResponse:
        began = time.perf_counter()
        response = await handler(request)
        route = request.get(_ROUTE)
        label = route.name if route else UNKNOWN_ROUTE
        method = request.method if request.method in _METHODS else "other"
        is_stream = route is not None and not route.head and response.status < 300
        duration_s = None if is_stream else time.perf_counter() - began
        self._telemetry.answered(method, label, response.status, duration_s)
        _log.debug("%s %s -> %d", request.method, request.rel_url.raw_path, response.status)
        return response

    @web.middleware
    async def _guard(self, request: web.Request, handler: problems.Handler) -> web.StreamResponse:
        services = self._services
        check_origin(request, services.settings, services.state().nodes.values())
        await self._authenticate(request)
        if request.path.startswith("/api/") and not services.caught_up():
            raise Unavailable(
                f"Node '{services.name}' has just started and does not know all jobs yet; "
                "try again shortly or at another node."
            )
        return await handler(request)

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        sign(request, response, self._services)
        request[problems.RESPONSE_BEGUN] = True


def sign(request: web.BaseRequest, response: web.StreamResponse, services: Services) -> None:
    """The headers that every response of a node carries."""
    response.headers[NODE_HEADER] = services.name
    response.headers.setdefault(limits.INDEX_HEADER, str(services.state().index))
    response.headers[REQUEST_ID_HEADER] = problems.request_id_of(request)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-store")


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """``Expect``: go on for 100-continue, refuse the rest; aiohttp calls this before the middlewares."""
    if request.headers["Expect"].lower() != "100-continue":
        return problems.respond_http(
            request, web.HTTPExpectationFailed(text="Only 'Expect: 100-continue' can be met.")
        )
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer itself has not begun
    return None


def _options(allowed: list[str]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def options(request: web.Request) -> web.StreamResponse:
        return web.Response(status=204, headers={"Allow": ", ".join(allowed)})

    return options


class _Protocol(RequestHandler):
    """One connection; answers what cannot be parsed with a problem document."""

    __slots__ = ("_services",)

    def __init__(self, manager: web.Server, services: Services, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._services = services

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """As the base class says: called for parse errors and for what escaped the middlewares."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        if status >= 500:
            response = problems.respond_defect(request, exc or RuntimeError("no exception"))
        else:
            _log.debug("unreadable request from %s: %s", request.remote, message)
            first = (message or "").strip().splitlines()[:1] or ["no details"]
            detail = f"This is not HTTP that this server reads: {first[0][:200]}"
            response = problems.respond(request, InvalidRequest(detail))
        sign(request, response, self._services)
        response.force_close()
        return response


class _Server(web.Server):
    """Makes a ``_Protocol`` per connection and bounds their number."""

    def __init__(self, base: web.Server, services: Services, **kwargs: Any) -> None:
        super().__init__(base.request_handler, request_factory=base.request_factory)
        self._services = services
        self._protocol_options = kwargs
        self.refused_connections = 0

    def __call__(self) -> RequestHandler:
        loop = asyncio.get_running_loop()
        return _Protocol(self, self._services, loop=loop, **self._protocol_options)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._services.settings.connections_max:
            self.refused_connections += 1
            transport.abort()


class _Runner(web.AppRunner):
    __slots__ = ("_options", "_services")

    def __init__(self, app: web.Application, services: Services, **options: Any) -> None:
        super().__init__(
            app, shutdown_timeout=options.pop("shutdown_timeout"), handle_signals=False
        )
        self._services = services
        self._options = options

    async def _make_server(self) -> web.Server:
        return _Server(await super()._make_server(), self._services, **self._options)
