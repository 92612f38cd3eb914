"""Operations: health, readiness, Prometheus metrics, the API's own description, problem types, the dashboard."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from aiohttp import web

from distroml.errors import NotFound, Unavailable
from distroml.http import problems
from distroml.http.cluster_views import HealthView, ReadyView
from distroml.http.limits import Query
from distroml.http.table import Answer, Call, Route, json_response

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


async def get_health(call: Call, query: Query) -> web.StreamResponse:
    """200 as long as the process serves; says in detail how it is."""
    services = call.services
    raft, (ready, reason) = services.raft(), services.ready()
    healthy = raft.healthy and ready
    shown = HealthView(
        status="ok" if healthy else "degraded",
        reason="" if healthy else raft.reason or reason,
        ready=ready,
        node=services.name,
        version=services.version,
        leader=raft.leader,
        role=str(raft.role),
        term=raft.term,
        commit_index=raft.commit_index,
        applied_index=raft.applied_index,
        details=dict(services.health()),
    )
    return json_response(shown)


async def get_ready(call: Call, query: Query) -> web.StreamResponse:
    """200 when this node can serve reads and writes, else 503 with the reason."""
    services = call.services
    ready, reason = services.ready()
    if not ready:
        raise Unavailable(f"Node '{services.name}' is not ready: {reason}.", ready=False)
    raft = services.raft()
    return json_response(ReadyView(True, services.name, raft.leader, services.state().index))


async def get_metrics(call: Call, query: Query) -> web.StreamResponse:
    """Prometheus text format."""
    body = call.telemetry.exposition()
    return web.Response(body=body, headers={"Content-Type": EXPOSITION_TYPE})


async def get_openapi(call: Call, query: Query) -> web.StreamResponse:
    """The description of this API."""
    return web.Response(body=call.openapi, content_type="application/json")


async def get_problem(call: Call, query: Query) -> web.StreamResponse:
    """What a problem type means."""
    slug = call.request.match_info["slug"]
    known = problems.explanations()
    if slug not in known:
        raise NotFound(f"There is no problem type '{slug[:100]}'; there are: {', '.join(known)}.")
    return json_response(known[slug])


async def get_dashboard(call: Call, query: Query) -> web.StreamResponse:
    """The dashboard: one page that needs nothing from elsewhere."""
    page, policy = dashboard()
    return web.Response(
        body=page,
        content_type="text/html",
        charset="utf-8",
        headers={
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


@cache
def dashboard() -> tuple[bytes, str]:
    """The page and a Content-Security-Policy that lets exactly its own script and style run."""
    text = resources.files("distroml.http").joinpath("static/index.html").read_text("utf-8")
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for match in _INLINE.finditer(text):
        digest = hashlib.sha256(match.group(2).encode()).digest()
        hashes[match.group(1)].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}"
    )
    return text.encode(), policy


ROUTES = (
    Route(
        method="GET",
        path="/health",
        name="getHealth",
        summary="Whether this process serves, with details",
        tag="operations",
        handler=get_health,
        answers=(Answer(200, "Health", HealthView),),
        gated=False,
    ),
    Route(
        method="GET",
        path="/ready",
        name="getReady",
        summary="Whether this node can serve: it has a leader and applied the log",
        tag="operations",
        handler=get_ready,
        answers=(Answer(200, "Ready", ReadyView),),
        errors=(Unavailable,),
        gated=False,
    ),
    Route(
        method="GET",
        path="/metrics",
        name="getPrometheus",
        summary="Metrics in the Prometheus text format",
        tag="operations",
        handler=get_metrics,
        answers=(Answer(200, "Metrics", content_type="text/plain"),),
        gated=False,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        name="getOpenapi",
        summary="This description",
        tag="operations",
        handler=get_openapi,
        answers=(Answer(200, "OpenAPI 3.1"),),
    ),
    Route(
        method="GET",
        path="/problems/{slug}",
        name="getProblem",
        summary="What a problem type means",
        tag="operations",
        handler=get_problem,
        answers=(Answer(200, "Explanation", problems.Explanation),),
        errors=(NotFound,),
    ),
    Route(
        method="GET",
        path="/",
        name="getDashboard",
        summary="The dashboard",
        tag="operations",
        handler=get_dashboard,
        answers=(Answer(200, "HTML page", content_type="text/html"),),
    ),
)
