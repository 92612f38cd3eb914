"""Incident traces on their way to an OpenTelemetry collector, by OTLP over HTTP; needs the extra ``tracing``.

Only ``tracing`` imports this, once a user has asked for it. Spans wait in the SDK's bounded queue, from which its own
thread sends them: the event loop never waits for a collector, and what the queue cannot hold is dropped and logged.
All but the endpoint is what OpenTelemetry's own ``OTEL_*`` variables say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import StatusCode, set_span_in_context

from distroml.runtime.incident_traces import IncidentTrace, Span

SHUTDOWN_S = 2.0
"""How long a stopping node waits for its last traces to be taken."""
SCOPE: Final = "distroml.recovery"

_log = logging.getLogger(__name__)


class TraceExport:
    """Sends traces; see the module.

    Args:
        endpoint: where spans are posted; None: as ``OTEL_EXPORTER_OTLP_*`` say.
        resource: attributes of this node, over which ``OTEL_RESOURCE_ATTRIBUTES`` win.
        exporter: in place of OTLP, for tests.

    Raises:
        ValueError, OSError: an ``OTEL_*`` variable cannot be used.
    """

    def __init__(
        self,
        endpoint: str | None,
        resource: Mapping[str, str],
        version: str,
        *,
        exporter: SpanExporter | None = None,
    ) -> None:
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            resource=Resource.create(dict(resource)).merge(OTELResourceDetector().detect()),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        )
        self._tracer = self._provider.get_tracer(SCOPE, version)

    def send(self, trace: IncidentTrace) -> None:
        """Queue all spans of a trace."""
        self._ids.trace_id = trace.trace_id
        root = self._begin(trace.root, Context())
        parent = set_span_in_context(root, Context())
        for phase in trace.phases:
            self._begin(phase, parent).end(_ns(phase.ended_at))
        if trace.error:
            root.set_status(StatusCode.ERROR, trace.error)
        root.end(_ns(trace.root.ended_at))

    async def close(self) -> None:
        """Send what waits, for ``SHUTDOWN_S`` at most."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="otlp-shutdown", daemon=True).start()
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await done.wait()
        except TimeoutError:
            _log.warning("traces that no collector took within %g s are lost", SHUTDOWN_S)

    def _begin(self, span: Span, context: Context) -> OpenSpan:
        self._ids.span_id = span.span_id
        return self._tracer.start_span(
            span.name, context, attributes=span.attributes, start_time=_ns(span.began_at)
        )


class _GivenIds(IdGenerator):
    """Ids follow from the incident, so the SDK does not choose them."""

    trace_id = 0
    span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


def _ns(at: float) -> int:
    return round(at * 1e9)
