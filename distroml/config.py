"""The checked configuration of one node: its settings against each other, with all that follows from them.

``load`` reads them (``settings``), finds this node's place among the others (``addresses``) and returns a
``NodeConfig``; every mistake is a ``ConfigError`` that says where it was made and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from distroml.addresses import check_loopback, parse_address, place_of, reachable
from distroml.consensus.authentication import LinkSecurity, load_link_security
from distroml.consensus.peers import Address
from distroml.consensus.proposer import MAX_DECISION_BYTES
from distroml.consensus.raft_types import RaftSettings
from distroml.errors import ConfigError
from distroml.runtime.failure_detector import DetectorSettings
from distroml.settings import NodeSettings, read

REPORTS_PER_TIMEOUT = 3
"""A node is silent only when at least this many of its reports are missing."""
_HOME = Path("~/.distroml")


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
    data_dir: Path
    store_dir: Path
    slots: int
    security: LinkSecurity
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
    if settings.report_interval_ms * REPORTS_PER_TIMEOUT > settings.node_timeout_ms:
        raise ConfigError(
            f"report_interval_ms ({settings.report_interval_ms}) must be at most a third of "
            f"node_timeout_ms ({settings.node_timeout_ms}), or a late report makes a node lost.",
            field="report_interval_ms",
        )
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
    return NodeConfig(
        name=place.name,
        voters=place.voters,
        advertise=place.advertise,
        listen=place.listen,
        http=http,
        http_url=settings.http_url or f"http://{reachable(http, place.own.host)}",
        data_dir=_directory(settings.data_dir or _HOME / place.name.replace(":", "_"), "data_dir"),
        store_dir=_directory(settings.store_dir or _HOME / "store", "store_dir"),
        slots=settings.slots if settings.slots >= 0 else os.cpu_count() or 1,
        security=security,
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


def _path(value: str) -> Path | None:
    return Path(value).expanduser() if value else None


def _directory(path: str | Path, field: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{field} '{path}' is not a path: {error}.", field=field) from None
