"""Settings of one node: flags over ``DISTROML_*`` variables over a TOML file over defaults.

``NodeSettings`` is the single table: each field is at once a flag (``--node-timeout-ms``), a variable
(``DISTROML_NODE_TIMEOUT_MS``) and a TOML key (``node_timeout_ms``), with its default, unit and help text.
``load`` reads them and returns a checked ``NodeConfig``; every mistake is a ``ConfigError`` that names its source.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from distroml.consensus.authentication import LinkSecurity, load_link_security
from distroml.consensus.peers import Address
from distroml.consensus.proposer import MAX_DECISION_BYTES
from distroml.consensus.raft_types import RaftSettings
from distroml.errors import ConfigError
from distroml.runtime.failure_detector import DetectorSettings

ENV_PREFIX = "DISTROML_"
OTHER_VARIABLES = frozenset({"DISTROML_CONFIG", "DISTROML_URL"})
"""Variables with our prefix that are no settings: the settings file, and what the command line talks to."""
MAX_VOTERS = 7
REPORTS_PER_TIMEOUT = 3
"""A node is silent only when at least this many of its reports are missing."""
_NAME = re.compile(r"[A-Za-z0-9\[](?:[A-Za-z0-9._:\[\]-]{0,61}[A-Za-z0-9\]])?\Z")
_UNKNOWN_FIELD = re.compile("unknown field `(.*?)`")
_HOME = Path("~/.distroml")


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
    data_dir: Annotated[
        str,
        Meta(description="this node's own directory: log, snapshots, history (~/.distroml/NAME)"),
    ] = ""
    store_dir: Annotated[
        str,
        Meta(
            description="checkpoint store, one directory that all nodes see; on several hosts a "
            "shared file system (~/.distroml/store)"
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
    log_level: Annotated[str, Meta(description="debug, info, warning or error")] = "info"


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


def load(argv: Sequence[str], environ: Mapping[str, str]) -> NodeConfig:
    """Merge flags, variables and file, and check the result.

    Raises:
        ConfigError: a setting is unknown, malformed or contradicts another.
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
    return resolve(msgspec.convert(merged, NodeSettings, strict=False))


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each ``DISTROML_*`` variable that is no setting, with the one that was probably meant."""
    known = {ENV_PREFIX + name.upper() for name in NodeSettings.__struct_fields__}
    return [
        f"variable {name} is not a setting and has no effect{_meant(name, known)}"
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
    resolved = _resolve_learner(settings) if settings.join else _resolve_peers(settings)
    name, voters, listen, advertise = resolved
    own = advertise or voters[name]
    http = _address(settings.http, "http")
    security = load_link_security(
        name=name,
        cluster_id=settings.cluster_id,
        cluster_key_file=_path(settings.cluster_key_file),
        tls_cert=_path(settings.tls_cert),
        tls_key=_path(settings.tls_key),
        tls_ca=_path(settings.tls_ca),
    )
    _check_loopback("listen", listen, settings.insecure or security.authenticates)
    _check_loopback("http", http, settings.insecure)
    return NodeConfig(
        name=name,
        voters=voters,
        advertise=advertise,
        listen=listen,
        http=http,
        http_url=settings.http_url or f"http://{_reachable(http, own.host)}",
        data_dir=_directory(settings.data_dir or _HOME / name.replace(":", "_"), "data_dir"),
        store_dir=_directory(settings.store_dir or _HOME / "store", "store_dir"),
        slots=settings.slots if settings.slots >= 0 else os.cpu_count() or 1,
        security=security,
        settings=settings,
    )


def _path(value: str) -> Path | None:
    return Path(value).expanduser() if value else None


_Resolved = tuple[str, dict[str, Address], Address | None, Address | None]
"""Name, voters, where to listen, and where the voters reach a learner."""


def _resolve_peers(settings: NodeSettings) -> _Resolved:
    if settings.advertise:
        raise ConfigError(
            "advertise is for learners (--join); a voter is reached at its entry in peers.",
            field="advertise",
        )
    voters, named = _voters(settings.peers, "peers")
    if not voters:
        name = _checked_name(settings.name or socket.gethostname().split(".")[0] or "node")
        if settings.listen:
            raise ConfigError(
                "listen is for other nodes, but peers names none; leave it out for a one-node cluster.",
                field="listen",
            )
        return name, {name: Address("127.0.0.1", 0)}, None, None
    me = _own_name(settings, voters, named=named)
    _check_number(voters, "peers")
    listen = _address(settings.listen, "listen") if settings.listen else voters[me]
    return me, dict(sorted(voters.items())), listen, None


def _resolve_learner(settings: NodeSettings) -> _Resolved:
    if settings.peers:
        raise ConfigError(
            "peers makes a node a voter and join makes it a learner; set one of them.", field="join"
        )
    voters, _ = _voters(settings.join, "join")
    _check_number(voters, "join")
    if not settings.listen:
        raise ConfigError(
            "join needs --listen host:port: the voters connect back to a learner.", field="listen"
        )
    listen = _address(settings.listen, "listen")
    advertise = _address(settings.advertise, "advertise") if settings.advertise else listen
    if _reachable(advertise, "") != advertise:
        raise ConfigError(
            f"{advertise} is a wildcard, which leads nowhere from elsewhere; set --advertise to an "
            "address at which the voters reach this node.",
            field="advertise",
        )
    name = _checked_name(settings.name or socket.gethostname().split(".")[0] or "node")
    if name in voters or advertise in voters.values():
        raise ConfigError(
            f"'{name}' at {advertise} is one of the voters that join lists; a voter is started with "
            "--peers, and a learner needs a name and an address of its own.",
            field="name" if name in voters else "listen",
        )
    return name, dict(sorted(voters.items())), listen, advertise


def _voters(text: str, field: str) -> tuple[dict[str, Address], bool]:
    """Addresses by name, and whether the names are given rather than made of the addresses."""
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    named = ["=" in entry for entry in entries]
    if any(named) and not all(named):
        raise ConfigError(
            f"{field} mixes name=host:port and host:port entries; use one form for all.",
            field=field,
        )
    voters: dict[str, Address] = {}
    for entry in entries:
        name, _, address = entry.rpartition("=")
        parsed = _address(address, field)
        name = _checked_name(name or str(parsed))
        if name in voters or parsed in voters.values():
            raise ConfigError(f"{field} lists '{entry}' twice.", field=field)
        voters[name] = parsed
    return voters, all(named)


def _check_number(voters: dict[str, Address], field: str) -> None:
    if len(voters) > MAX_VOTERS:
        raise ConfigError(
            f"{field} lists {len(voters)} voters; at most {MAX_VOTERS} can vote. Further hosts join "
            "as learners (--join).",
            field=field,
        )


def _own_name(settings: NodeSettings, voters: dict[str, Address], *, named: bool) -> str:
    if named:
        if settings.name in voters:
            return settings.name
        raise ConfigError(
            f"name '{settings.name}' is not in peers ({', '.join(voters)}); every voter lists itself.",
            field="name",
        )
    if not settings.listen:
        raise ConfigError(
            "peers without names need --listen host:port to say which one is this node.",
            field="listen",
        )
    own = _address(settings.listen, "listen")
    me = str(own)
    if settings.name and settings.name != me:
        raise ConfigError(
            f"with peers given as host:port a node's name is its address ({me}); "
            f"to call it '{settings.name}', give peers as name=host:port.",
            field="name",
        )
    voters.setdefault(me, own)
    return me


def _checked_name(name: str) -> str:
    if not _NAME.match(name):
        raise ConfigError(
            f"'{name}' is not a node name: 1 to 63 letters, digits, '.', '_' or '-'.", field="name"
        )
    return name


def _address(text: str, field: str) -> Address:
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}.", field=field) from None
    if address.port == 0:
        raise ConfigError(
            f"{field}: {address} has no fixed port, so others cannot find it; use 1 to 65535.",
            field=field,
        )
    return address


def _reachable(address: Address, host: str) -> Address:
    """The address as others see it: a wildcard is not one, ``host`` then is."""
    try:
        wildcard = ipaddress.ip_address(address.host).is_unspecified
    except ValueError:
        wildcard = False
    return Address(host, address.port) if wildcard else address


def _directory(path: str | Path, field: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{field} '{path}' is not a path: {error}.", field=field) from None


_UNGUARDED = {
    "listen": "peers need not prove who they are (set cluster_key_file, or tls_cert, tls_key and tls_ca)",
    "http": "the API has neither TLS nor tokens in this version",
}


def _check_loopback(field: str, address: Address | None, insecure: bool) -> None:
    if address is None or insecure or _is_loopback(address.host):
        return
    raise ConfigError(
        f"{field} {address} is not a loopback address and {_UNGUARDED[field]}: anyone who reaches it "
        "could run code here. Otherwise use a trusted network and --insecure.",
        field=field,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
        unknown = _UNKNOWN_FIELD.search(text)
        if unknown:
            text = f"'{unknown[1]}' is not a setting"
            text += _meant(unknown[1], NodeSettings.__struct_fields__)
        raise ConfigError(
            f"{source}: {field + ': ' if field else ''}{text}.", field=field
        ) from None


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (perhaps {close[0]} was meant)" if close else ""
