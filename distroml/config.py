"""The checked configuration of one node: its settings against each other, with all that follows from them.

``load`` reads them (``settings``), finds this node's place among the others (``addresses``) and returns a
``NodeConfig``; every mistake is a ``ConfigError`` that says where it was made and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from distroml.addresses import check_loopback, parse_address, place_of, reachable
from distroml.consensus.authentication import LinkSecurity, load_link_security
from distroml.consensus.peers import Address
from distroml.consensus.proposer import MAX_DECISION_BYTES
from distroml.consensus.raft_types import RaftSettings
from distroml.credentials import read_private
from distroml.errors import ConfigError, InvalidSpec
from distroml.runtime.facts import ReconcilerSettings
from distroml.runtime.failure_detector import DetectorSettings
from distroml.runtime.hang import HangSettings
from distroml.settings import NodeSettings, read
from distroml.store_urls import StoreSettings, check_endpoint

REPORTS_PER_TIMEOUT = 3
"""A node is silent only when at least this many of its reports are missing."""
AS_OTEL_SAYS = "env"
"""The collector is that of ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
_HOME = Path("~/.distroml")
_HOST_NAME = re.compile(r"\*|[a-z0-9_-]+(\.[a-z0-9_-]+)*")


class NodeConfig(Struct, frozen=True, kw_only=True):
    """Checked settings of a node, in the types that the code uses."""

    name: str
    voters: dict[str, Address]
    """All voters by name, this node included unless it is a learner; one entry for a one-node cluster."""
    advertise: Address | None
    """Where the voters reach this learner; None: this node is a voter."""
    listen: Address | None
    """None: no other nodes, nothing listens for them."""
    http: Address
    http_url: str
    allowed_hosts: tuple[str, ...]
    data_dir: Path
    store_dir: Path
    slots: int
    security: LinkSecurity
    stores: StoreSettings
    settings: NodeSettings

    @property
    def host(self) -> str:
        """Address at which workers of other nodes reach workers of this one.

        The one in ``peers``: ``listen`` may be a wildcard such as 0.0.0.0, which leads nowhere from elsewhere.
        """
        return (self.advertise or self.voters[self.name]).host


def load(argv: Sequence[str], environ: Mapping[str, str]) -> NodeConfig:
    """Read the settings and check the result.

    Raises:
        ConfigError: a setting is unknown, malformed or contradicts another.
        SystemExit: ``--help`` or ``--version`` was asked for, or a flag is unknown (exit code 2).
    """
    return resolve(read(argv, environ))


def resolve(settings: NodeSettings) -> NodeConfig:
    """Check settings against each other and fill in what follows from others."""
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(
            f"log_level must be debug, info, warning or error, not '{settings.log_level}'.",
            field="log_level",
        )
    if settings.heartbeat_ms * 3 >= settings.election_timeout_ms:
        raise ConfigError(
            f"heartbeat_ms ({settings.heartbeat_ms}) must be under a third of election_timeout_ms "
            f"({settings.election_timeout_ms}), or a late heartbeat starts an election.",
            field="heartbeat_ms",
        )
    if settings.hang_floor_ms > settings.hang_ceiling_ms:
        raise ConfigError(
            f"hang_floor_ms ({settings.hang_floor_ms}) must not exceed hang_ceiling_ms "
            f"({settings.hang_ceiling_ms}).",
            field="hang_floor_ms",
        )
    if settings.report_interval_ms * REPORTS_PER_TIMEOUT > settings.node_timeout_ms:
        raise ConfigError(
            f"report_interval_ms ({settings.report_interval_ms}) must be at most a third of "
            f"node_timeout_ms ({settings.node_timeout_ms}), or a late report makes a node lost.",
            field="report_interval_ms",
        )
    _check_endpoint(settings.otlp_endpoint)
    place = place_of(settings)
    http = parse_address(settings.http, "http")
    security = load_link_security(
        name=place.name,
        cluster_id=settings.cluster_id,
        cluster_key_file=_path(settings.cluster_key_file),
        tls_cert=_path(settings.tls_cert),
        tls_key=_path(settings.tls_key),
        tls_ca=_path(settings.tls_ca),
    )
    check_loopback("listen", place.listen, settings.insecure or security.authenticates)
    check_loopback("http", http, settings.insecure)
    data_dir = _directory(settings.data_dir or _HOME / place.name.replace(":", "_"), "data_dir")
    return NodeConfig(
        name=place.name,
        voters=place.voters,
        advertise=place.advertise,
        listen=place.listen,
        http=http,
        http_url=settings.http_url or f"http://{reachable(http, place.own.host)}",
        allowed_hosts=_host_names(settings.allowed_hosts),
        data_dir=data_dir,
        store_dir=_directory(settings.store_dir or data_dir / "store", "store_dir"),
        slots=settings.slots if settings.slots >= 0 else os.cpu_count() or 1,
        security=security,
        stores=_stores(settings),
        settings=settings,
    )


def raft_settings(settings: NodeSettings) -> RaftSettings:
    """Timing of consensus: all follows from the shortest election timeout and the heartbeat."""
    election_s = settings.election_timeout_ms / 1000
    return RaftSettings(
        election_min_s=election_s,
        election_max_s=election_s * 2,
        heartbeat_s=settings.heartbeat_ms / 1000,
        check_quorum_s=max(RaftSettings().check_quorum_s, election_s),
        compaction_entries=settings.snapshot_entries,
        entry_max_bytes=MAX_DECISION_BYTES,
    )


def detector_settings(settings: NodeSettings) -> DetectorSettings:
    """Thresholds of the failure detector; none is shorter than a few missing reports."""
    interval_s, silence_s = settings.report_interval_ms / 1000, settings.node_timeout_ms / 1000
    usual = DetectorSettings()
    return DetectorSettings(
        closed_silence_s=usual.closed_silence_s,
        silence_s=silence_s,
        suspect_silence_s=min(silence_s, max(usual.suspect_silence_s, 2 * interval_s)),
        first_word_s=max(usual.first_word_s, REPORTS_PER_TIMEOUT * interval_s),
    )


def reconciler_settings(settings: NodeSettings) -> ReconcilerSettings:
    """Waits and limits of the coordinator's decisions."""
    return ReconcilerSettings(
        start_deadline_s=settings.start_timeout_ms / 1000,
        checkpoint_wait_s=settings.checkpoint_wait_ms / 1000,
        hang=HangSettings(
            stopped_grace_s=settings.stopped_grace_ms / 1000,
            floor_s=settings.hang_floor_ms / 1000,
            ceiling_s=settings.hang_ceiling_ms / 1000,
        ),
    )


def _check_endpoint(endpoint: str) -> None:
    """Raises ConfigError for what is neither empty, ``env`` nor the URL of a collector."""
    if endpoint in ("", AS_OTEL_SAYS):
        return
    try:
        url = urlsplit(endpoint)
        sound = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        sound = False
    if not sound or url.query or url.fragment:
        raise ConfigError(
            f"otlp_endpoint '{endpoint}' must be the URL of a collector, such as "
            f"http://127.0.0.1:4318, or '{AS_OTEL_SAYS}' for what OTEL_EXPORTER_OTLP_ENDPOINT says.",
            field="otlp_endpoint",
        )
    if url.username is not None or url.password is not None:
        raise ConfigError(
            "otlp_endpoint must not hold a user or password; OTEL_EXPORTER_OTLP_HEADERS may hold a token.",
            field="otlp_endpoint",
        )


def _host_names(text: str) -> tuple[str, ...]:
    names = tuple(one.strip().lower() for one in text.split(",")) if text.strip() else ()
    for name in names:
        if not _HOST_NAME.fullmatch(name):
            raise ConfigError(
                f"allowed_hosts: '{name}' must be the name of a host without scheme and port, such as "
                "lb.example, or '*' for any; names are separated by commas.",
                field="allowed_hosts",
            )
    return names


def _stores(settings: NodeSettings) -> StoreSettings:
    if settings.s3_endpoint:
        try:
            check_endpoint(settings.s3_endpoint, "s3_endpoint")
        except InvalidSpec as error:
            raise ConfigError(error.detail, field="s3_endpoint") from None
    file = _path(settings.s3_credentials_file)
    if file is not None:
        read_private(file, what="S3 credentials file", field="s3_credentials_file")
    return StoreSettings(
        s3_endpoint=settings.s3_endpoint,
        s3_region=settings.s3_region,
        s3_profile=settings.s3_profile,
        s3_credentials_file=str(file.absolute()) if file else "",
    )


def _path(value: str) -> Path | None:
    return Path(value).expanduser() if value else None


def _directory(path: str | Path, field: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{field} '{path}' is not a path: {error}.", field=field) from None
