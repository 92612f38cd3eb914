"""The settings of a node as a user writes them: flags over ``DISTROML_*`` variables over a TOML file over defaults.

``NodeSettings`` is the single table: each field is at once a flag (``--node-timeout-ms``), a variable
(``DISTROML_NODE_TIMEOUT_MS``) and a TOML key (``node_timeout_ms``), with its default, unit and help text.
``read`` merges the sources; what the values mean together is up to ``config``.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from distroml.errors import ConfigError
from distroml.misspelt import meant, unknown_field

ENV_PREFIX = "DISTROML_"
OTHER_VARIABLES = frozenset({"DISTROML_CONFIG", "DISTROML_URL"})
"""Variables with our prefix that are no settings: the settings file, and what the command line talks to."""


class NodeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be set for ``distroml-node``; every field has a default."""

    name: Annotated[
        str,
        Meta(description="name of this node (default: its own address in --peers, or the host)"),
    ] = ""
    peers: Annotated[
        str,
        Meta(
            description="all voters, the same list on each node: a=host:port,b=host:port,... or, with "
            "--listen, host:port,...; empty: a complete one-node cluster"
        ),
    ] = ""
    join: Annotated[
        str,
        Meta(
            description="instead of --peers: the voters, in the same notation; this node follows them as a "
            "learner: it serves and runs workers, but never votes"
        ),
    ] = ""
    listen: Annotated[
        str,
        Meta(
            description="host:port for the other nodes (default: this node's own entry in --peers; "
            "needed with --join)"
        ),
    ] = ""
    advertise: Annotated[
        str,
        Meta(
            description="host:port at which the voters reach this learner (default: --listen; needed where "
            "that is a wildcard)"
        ),
    ] = ""
    http: Annotated[str, Meta(description="host:port of the API and dashboard")] = "127.0.0.1:8101"
    http_url: Annotated[
        str, Meta(description="URL at which clients reach this node (default: from --http)")
    ] = ""
    allowed_hosts: Annotated[
        str,
        Meta(
            description="further names by which clients may call this node, such as that of a load balancer: "
            "lb.example,...; '*' for any. localhost, addresses and the hosts in nodes' URLs always are"
        ),
    ] = ""
    data_dir: Annotated[
        str,
        Meta(description="this node's own directory: log, snapshots, history (~/.distroml/NAME)"),
    ] = ""
    store_dir: Annotated[
        str,
        Meta(
            description="this node's own part of the checkpoint store 'local', whose files are kept on "
            "several nodes (store in --data-dir)"
        ),
    ] = ""
    s3_endpoint: Annotated[
        str,
        Meta(
            description="URL of the server for s3:// stores, where theirs names none (default: AWS, or what "
            "AWS_ENDPOINT_URL_S3 says)"
        ),
    ] = ""
    s3_region: Annotated[
        str,
        Meta(
            description="region for s3:// stores whose URL names none (default: as AWS_REGION says)"
        ),
    ] = ""
    s3_profile: Annotated[
        str, Meta(description="profile of the AWS files to take credentials from, for s3:// stores")
    ] = ""
    s3_credentials_file: Annotated[
        str,
        Meta(
            description="file with credentials for s3:// stores, as ~/.aws/credentials, mode 0600 (default: AWS "
            "variables, files, container or instance)"
        ),
    ] = ""
    slots: Annotated[
        int, Meta(ge=0, le=1024, description="workers that may run here; 0: vote and serve only")
    ] = -1
    worker_threads: Annotated[
        int, Meta(ge=1, le=256, description="torch threads of each worker")
    ] = 1
    cluster_id: Annotated[str, Meta(description="nodes of another cluster id are refused")] = (
        "distroml"
    )
    election_timeout_ms: Annotated[
        int,
        Meta(
            ge=50,
            le=60_000,
            description="shortest silence of the leader before an election, ms; the longest is twice this",
        ),
    ] = 300
    heartbeat_ms: Annotated[
        int, Meta(ge=10, le=10_000, description="interval of the leader's heartbeats, ms")
    ] = 60
    snapshot_entries: Annotated[
        int, Meta(ge=100, le=10_000_000, description="log entries between snapshots")
    ] = 10_000
    report_interval_ms: Annotated[
        int, Meta(ge=20, le=10_000, description="interval of an agent's reports, ms")
    ] = 200
    node_timeout_ms: Annotated[
        int,
        Meta(ge=200, le=600_000, description="silence after which a connected node is lost, ms"),
    ] = 3000
    start_timeout_ms: Annotated[
        int,
        Meta(
            ge=1000,
            le=3_600_000,
            description="time in which all ranks of a generation must train, ms",
        ),
    ] = 120_000
    checkpoint_wait_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=1_800_000,
            description="how long a run waits for nodes that may have its newest checkpoint before it takes an older one, ms",
        ),
    ] = 600_000
    stopped_grace_ms: Annotated[
        int,
        Meta(
            ge=100,
            le=3_600_000,
            description="how long a worker's process may be stopped before it is replaced, ms",
        ),
    ] = 2000
    hang_floor_ms: Annotated[
        int,
        Meta(
            ge=1000,
            le=3_600_000,
            description="least time without any step before the rank that hangs is replaced, ms; "
            "longer where ten of the job's slowest steps take longer",
        ),
    ] = 10_000
    hang_ceiling_ms: Annotated[
        int,
        Meta(
            ge=1000,
            le=86_400_000,
            description="most of that time, ms; counts also until a step was timed, and for an "
            "evaluation",
        ),
    ] = 600_000
    orphan_grace_s: Annotated[
        int,
        Meta(
            ge=0,
            le=31_536_000,
            description="how long a checkpoint that was never whole stays after its job has ended, s",
        ),
    ] = 3600
    cluster_key_file: Annotated[
        str, Meta(description="file with the key that peers must know; see 'distroml certs key'")
    ] = ""
    tls_cert: Annotated[
        str,
        Meta(description="this node's certificate for peer links, PEM; with --tls-key, --tls-ca"),
    ] = ""
    tls_key: Annotated[str, Meta(description="private key of --tls-cert, PEM, mode 0600")] = ""
    tls_ca: Annotated[
        str, Meta(description="certificates of the authority that peers' certificates are of, PEM")
    ] = ""
    insecure: Annotated[
        bool, Meta(description="allow addresses other than loopback, without TLS and tokens")
    ] = False
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="OpenTelemetry collector (OTLP over HTTP) that gets a trace of each recovery, such as "
            "http://127.0.0.1:4318, or 'env': as OTEL_EXPORTER_OTLP_ENDPOINT says; empty: no traces; needs "
            "distroml[tracing]"
        ),
    ] = ""
    log_level: Annotated[str, Meta(description="debug, info, warning or error")] = "info"


def read(argv: Sequence[str], environ: Mapping[str, str]) -> NodeSettings:
    """Merge flags, variables and file; each value is of its type and in its range.

    Raises:
        ConfigError: a setting is unknown or malformed; it names the source.
        SystemExit: ``--help`` or ``--version`` was asked for, or a flag is unknown (exit code 2).
    """
    flags = vars(build_parser().parse_args(argv))
    file = flags.pop("config") or environ.get(f"{ENV_PREFIX}CONFIG")
    merged: dict[str, Any] = {}
    for source, values in (
        (f"file {file}", _from_file(Path(file)) if file else {}),
        ("environment", _from_environ(environ)),
        ("flags", {name: value for name, value in flags.items() if value is not None}),
    ):
        _check_types(source, values)
        merged.update(values)
    return msgspec.convert(merged, NodeSettings, strict=False)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each ``DISTROML_*`` variable that is no setting, with the one that was probably meant."""
    known = {ENV_PREFIX + name.upper() for name in NodeSettings.__struct_fields__}
    return [
        f"variable {name} is not a setting and has no effect{meant(name, known)}"
        for name in sorted(environ)
        if name.startswith(ENV_PREFIX) and name not in known | OTHER_VARIABLES
    ]


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``distroml-node``, made from the fields of ``NodeSettings``."""
    from distroml import __version__

    parser = argparse.ArgumentParser(
        prog="distroml-node",
        allow_abbrev=False,  # a flag that is added later must not change what an abbreviation means
        description="One node of a DistroML cluster: replicates jobs, serves the API, runs workers.",
        epilog="Each flag is also a variable (--data-dir is DISTROML_DATA_DIR) and a key of the TOML "
        "file (data_dir). Flags win over variables, variables over the file. Exit codes: 0 after "
        "SIGTERM or SIGINT, 1 a failure while running, 2 a wrong setting.",
    )
    parser.add_argument("--version", action="version", version=f"distroml-node {__version__}")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    for field in msgspec.structs.fields(NodeSettings):
        flag = "--" + field.name.replace("_", "-")
        meta = field.type.__metadata__[0] if hasattr(field.type, "__metadata__") else None
        text = (meta.description if meta and meta.description else "").replace("%", "%%")
        if field.default is False:
            parser.add_argument(flag, action="store_true", default=None, help=text)
            continue
        default = "number of CPU cores" if field.name == "slots" else field.default
        shown = f" (default: {default})" if default != "" else ""
        parser.add_argument(flag, metavar="VALUE", help=f"{text}{shown}")
    return parser


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}.") from None


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    known = {field.name for field in msgspec.structs.fields(NodeSettings)}
    names = {
        key.removeprefix(ENV_PREFIX).lower(): key for key in environ if key.startswith(ENV_PREFIX)
    }
    return {name: environ[key] for name, key in names.items() if name in known}


def _check_types(source: str, values: dict[str, Any]) -> None:
    """Convert each source on its own, so that an error names where the value came from."""
    try:
        msgspec.convert(values, NodeSettings, strict=False)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        field = where.rstrip("`") or None
        unknown = unknown_field(text)
        if unknown is not None:
            text = f"'{unknown}' is not a setting{meant(unknown, NodeSettings.__struct_fields__)}"
        raise ConfigError(
            f"{source}: {field + ': ' if field else ''}{text}.", field=field
        ) from None
