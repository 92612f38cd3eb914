"""Whether incidents of this node become traces, and where those go: off unless ``otlp_endpoint`` is set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from distroml import __version__
from distroml.config import AS_OTEL_SAYS, NodeConfig
from distroml.consensus.replica import Replica
from distroml.errors import ConfigError
from distroml.runtime.incident_traces import IncidentWatch

if TYPE_CHECKING:
    from distroml.node.otlp import TraceExport

TRACES_PATH: Final = "/v1/traces"
PROTOCOL: Final = "http/protobuf"
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXTRA_HINT: Final = (
    "otlp_endpoint is set, and traces need OpenTelemetry, which is not installed here: "
    "pip install 'distroml[tracing]', or leave otlp_endpoint out."
)


def trace_recoveries(
    config: NodeConfig, incarnation: int, replica: Replica, environ: Mapping[str, str]
) -> TraceExport | None:
    """Make a trace of each recovery from now on; None where no user asked for it.

    Args:
        environ: where the protocol is looked for; the SDK reads its other variables by itself.

    Raises:
        ConfigError: the extra is not installed, or a variable asks for what it cannot do.
    """
    endpoint = config.settings.otlp_endpoint
    if not endpoint:
        return None
    resource = {
        "service.name": "distroml",
        "service.namespace": config.settings.cluster_id,
        "service.instance.id": config.name,
        "service.version": __version__,
    }
    export = _open(endpoint, environ, resource)
    watch = IncidentWatch(config.name, incarnation, lambda: replica.state, export.send)
    replica.listen(watch.on_applied)
    return export


def _open(endpoint: str, environ: Mapping[str, str], resource: Mapping[str, str]) -> TraceExport:
    try:
        from distroml.node.otlp import TraceExport
    except ImportError:
        raise ConfigError(EXTRA_HINT, field="otlp_endpoint") from None
    name = next((one for one in _PROTOCOL_VARIABLES if environ.get(one)), None)
    if name is not None and environ[name] != PROTOCOL:
        raise ConfigError(
            f"{name} is '{environ[name]}', but traces go out by {PROTOCOL} only; "
            "set it so, or leave it out, and name the collector's port for HTTP (usually 4318)."
        )
    try:
        return TraceExport(traces_url(endpoint), resource, __version__)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"OpenTelemetry cannot be set up as OTEL_* variables say: {error}."
        ) from None


def traces_url(endpoint: str) -> str | None:
    """Where spans are posted, as the OTLP specification says for a base URL; None: as ``OTEL_*`` variables say."""
    if endpoint == AS_OTEL_SAYS:
        return None
    return endpoint.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH
