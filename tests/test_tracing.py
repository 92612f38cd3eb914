"""Traces of recoveries on their way to a collector: what arrives, and that nobody waits for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from distroml.config import load
from distroml.consensus.replica import Replica
from distroml.errors import ConfigError
from distroml.local_cluster import LocalCluster
from distroml.node import otlp
from distroml.node.otlp import TraceExport
from distroml.node.tracing import trace_recoveries, traces_url
from distroml.runtime.incident_traces import IncidentTrace, Span
from tests.consensus.live import until
from tests.integration.jobs import long_spec, until_step

WAIT_S = 20.0


class Collector:
    """A real HTTP server that decodes OTLP; while ``holds`` it answers nobody."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []
        self.asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.set()
                collector.may_answer.wait(WAIT_S)
                decoded = ExportTraceServiceRequest.FromString(body)
                collector.requests.append((self.path, dict(self.headers.items()), decoded))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def spans(self) -> list:  # type: ignore[type-arg]
        return [
            span
            for _, _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    made = Collector()
    yield made
    made.close()


def trace(number: int = 1, error: str = "") -> IncidentTrace:
    root = Span("recovery", 7, 100.0, 103.0, {"distroml.job.id": "j", "ranks": (1, 2)})
    phases = (Span("detect", 8, 100.0, 100.5), Span("decide", 9, 100.5, 103.0))
    return IncidentTrace(trace_id=number, root=root, phases=phases, error=error)


def values(attributes) -> dict[str, object]:  # type: ignore[no-untyped-def]
    return {one.key: one.value.string_value for one in attributes if one.value.string_value}


async def test_a_collector_gets_the_spans_by_http(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer x")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test,team=us")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "training")
    resource = {"service.name": "distroml", "service.instance.id": "a"}
    export = TraceExport(traces_url(collector.url), resource, "1")
    export.send(trace(0xABC, error="it failed"))
    await export.close()
    ((path, headers, request),) = collector.requests
    assert path == "/v1/traces"
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer x"
    told = values(request.resource_spans[0].resource.attributes)
    assert told["service.instance.id"] == "a"
    assert (told["team"], told["service.name"]) == ("us", "training")
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"recovery", "detect", "decide"}
    root = spans["recovery"]
    assert (root.trace_id, root.span_id) == ((0xABC).to_bytes(16, "big"), (7).to_bytes(8, "big"))
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (100 * 10**9, 103 * 10**9)
    assert (root.parent_span_id, root.status.message) == (b"", "it failed")
    ranks = next(one for one in root.attributes if one.key == "ranks")
    assert [one.int_value for one in ranks.value.array_value.values] == [1, 2]
    for name in ("detect", "decide"):
        assert spans[name].parent_span_id == root.span_id
        assert spans[name].trace_id == root.trace_id
        assert spans[name].status.message == ""
    assert spans["detect"].end_time_unix_nano == 100_500_000_000


async def test_nobody_waits_for_a_collector_that_does_not_answer(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "SHUTDOWN_S", 0.05)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "6")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "3")
    collector.may_answer.clear()
    export = TraceExport(traces_url(collector.url), {}, "1")
    export.send(trace())
    await until(collector.asked.is_set, "the collector to be asked")
    for number in range(2, 50):
        export.send(trace(number))  # returns, though nothing leaves
    assert collector.requests == []
    await export.close()
    assert collector.requests == []
    assert "traces that no collector took" in caplog.text
    assert "Queue full" in caplog.text
    collector.may_answer.set()
    await until(lambda: len(collector.requests) > 0, "the collector to answer")


def test_without_the_setting_there_is_no_export_and_nothing_is_imported() -> None:
    code = (
        "import sys, distroml.node.tracing as t; from distroml.config import load;"
        "from distroml.consensus.replica import Replica;"
        "assert t.trace_recoveries(load([], {}), 1, Replica(), {}) is None;"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    environ = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)


def test_a_node_without_the_extra_does_not_start_and_names_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from distroml.node import main\n"
        f"main(['--name', 'a', '--data-dir', {str(tmp_path)!r}, '--http', '127.0.0.1:19999',"
        " '--otlp-endpoint', 'http://127.0.0.1:4318'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'distroml[tracing]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "as OTEL_* variables say"),
    ],
)
def test_what_opentelemetry_cannot_do_is_refused(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = load(["--otlp-endpoint", "env"], {})
    with pytest.raises(ConfigError) as caught:
        trace_recoveries(config, 1, Replica(), os.environ)
    assert told in caught.value.detail


@pytest.mark.parametrize("base", ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"])
def test_the_path_of_traces_is_added_to_a_base(base: str) -> None:
    assert traces_url(base) == "http://c:4318/v1/traces"
    assert traces_url("env") is None


@pytest.mark.integration
async def test_a_killed_worker_leaves_one_trace_of_the_whole_stack(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTROML_OTLP_ENDPOINT", "env")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with LocalCluster(tmp_path, nodes=3, slots=1) as cluster, cluster.client() as client:
        job_id = (await client.submit(long_spec(steps=100_000, workers=2, every=90_000)))["job_id"]
        job = await until_step(cluster, client, job_id, 20)
        os.kill(job["workers"][1]["pid"], signal.SIGKILL)
        await cluster.until(
            lambda: asyncio.sleep(0, collector.spans),
            lambda spans: any(span.name == "recovery" for span in spans),
            "the trace to arrive",
        )
        (incident,) = (await client.incidents(job_id))["incidents"]
        await client.cancel(job_id)
    spans = collector.spans
    (root,) = [span for span in spans if span.name == "recovery"]
    phases = {span.name: span for span in spans if span.parent_span_id == root.span_id}
    assert len(spans) == 1 + len(phases), "one node told it, once"
    lasted_ms = {
        name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
        for name, span in phases.items()
    }
    assert set(lasted_ms) >= {"detect", "decide", "rendezvous", "restore", "first_step"}
    told = incident["phases_ms"]
    assert lasted_ms == {
        name: pytest.approx(told[name], abs=0.2) for name in told if name != "total"
    }
