"""What a job leaves behind and does right now: metrics, logs, incidents, and the streams."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from distroml.errors import InvalidRequest, NotFound, Unavailable
from distroml.http import views
from distroml.http.limits import Read
from distroml.http.streams import StreamQuery, events, stream
from distroml.http.table import Answer, Call, Route, job_of, json_response, latest_metrics

MAX_METRIC_NAMES = 64


class MetricsQuery(Read, frozen=True, kw_only=True):
    """Parameters of a job's metrics."""

    name: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...],
        Meta(max_length=MAX_METRIC_NAMES, description="may be repeated; all metrics by default"),
    ] = ()
    from_step: Annotated[int, Meta(ge=0, le=2**53)] = 0
    to_step: Annotated[int, Meta(ge=0, le=2**53, description="inclusive")] | None = None
    max_points: Annotated[int, Meta(ge=1, le=10_000, description="per metric; thinned above")] = (
        1000
    )


class LogsQuery(Read, frozen=True, kw_only=True):
    """Parameters of a job's logs."""

    rank: Annotated[int, Meta(ge=0, le=65_535)] | None = None
    tail: Annotated[int, Meta(ge=0, le=10_000, description="newest lines")] = 100


class SeriesView(Struct, frozen=True, kw_only=True):
    """One metric over steps; ``steps`` and ``values`` have the same length."""

    name: str
    steps: list[int]
    values: list[float | None]
    total: Annotated[int, Meta(description="points in the range before thinning")]


class MetricsView(Struct, frozen=True, kw_only=True):
    job_id: str
    names: Annotated[list[str], Meta(description="all metrics this job has, at most 1024")]
    names_complete: Annotated[
        bool, Meta(description="false where the job has more; those found later are left out")
    ]
    latest: dict[str, float]
    series: list[SeriesView]


class LogLineView(Struct, frozen=True, kw_only=True):
    generation: int
    rank: int
    at: views.Timestamp
    line: str


class LogsView(Struct, frozen=True, kw_only=True):
    """The newest lines in the order of their times."""

    job_id: str
    lines: list[LogLineView]


async def get_metrics(call: Call, query: MetricsQuery) -> web.StreamResponse:
    """Metrics over steps."""
    job = job_of(call)
    if query.to_step is not None and query.to_step < query.from_step:
        raise InvalidRequest(
            f"to_step ({query.to_step}) is before from_step ({query.from_step}).", field="to_step"
        )
    history = call.services.history
    known = await history.metric_names(job.job_id)
    names = sorted(known.names)
    series = []
    for name in dict.fromkeys(query.name or names[:MAX_METRIC_NAMES]):
        one = await history.metric_series(
            job.job_id, name, query.from_step, query.to_step, query.max_points
        )
        series.append(
            SeriesView(name=name, steps=list(one.steps), values=list(one.values), total=one.total)
        )
    latest = dict(latest_metrics(call, job))
    return json_response(
        MetricsView(
            job_id=job.job_id,
            names=names,
            names_complete=known.complete,
            latest=latest,
            series=series,
        )
    )


async def get_logs(call: Call, query: LogsQuery) -> web.StreamResponse:
    """The newest lines of all ranks or one."""
    job = job_of(call)
    lines = await call.services.history.log_lines(job.job_id, query.rank, query.tail)
    shown = [
        LogLineView(
            generation=one.generation, rank=one.rank, at=views.timestamp(one.at), line=one.line
        )
        for one in lines
    ]
    return json_response(LogsView(job_id=job.job_id, lines=shown))


async def get_incidents(call: Call, query: Read) -> web.StreamResponse:
    """Failures and recoveries, oldest first."""
    job = job_of(call)
    shown = [views.incident_view(one) for one in job.incidents]
    return json_response(views.IncidentList(job.job_id, shown))


_SWITCH = Answer(101, "WebSocket: one JSON message per text frame")
_SSE = Answer(200, "Server-Sent Events", content_type="text/event-stream")

ROUTES = (
    Route(
        method="GET",
        path="/api/jobs/{job_id}/metrics",
        name="getMetrics",
        summary="Metrics over steps",
        tag="jobs",
        handler=get_metrics,
        query=MetricsQuery,
        answers=(Answer(200, "Series by metric", MetricsView),),
        errors=(NotFound,),
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}/logs",
        name="getLogs",
        summary="The newest lines that the workers wrote",
        tag="jobs",
        handler=get_logs,
        query=LogsQuery,
        answers=(Answer(200, "Lines", LogsView),),
        errors=(NotFound,),
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}/incidents",
        name="getIncidents",
        summary="Failures and the recoveries from them, oldest first",
        tag="jobs",
        handler=get_incidents,
        query=Read,
        answers=(Answer(200, "Incidents", views.IncidentList),),
        errors=(NotFound,),
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}/stream",
        name="streamJob",
        summary="Follow a job: WebSocket on upgrade, Server-Sent Events otherwise",
        tag="jobs",
        handler=stream,
        query=StreamQuery,
        answers=(_SWITCH, _SSE),
        errors=(NotFound, Unavailable),
        gated=False,
        head=False,
    ),
    Route(
        method="GET",
        path="/api/jobs/{job_id}/events",
        name="streamJobEvents",
        summary="Follow a job by Server-Sent Events",
        tag="jobs",
        handler=events,
        query=StreamQuery,
        answers=(_SSE,),
        errors=(NotFound, Unavailable),
        gated=False,
        head=False,
    ),
)
