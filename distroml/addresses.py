"""Which node this is, which ones vote, and where each is reached: read from ``--peers`` or ``--join``."""

from __future__ import annotations

import ipaddress
import re
import socket

from msgspec import Struct

from distroml.consensus.peers import Address
from distroml.consensus.raft_types import MAX_VOTERS
from distroml.errors import ConfigError
from distroml.settings import NodeSettings

_NAME = re.compile(r"[A-Za-z0-9\[](?:[A-Za-z0-9._:\[\]-]{0,61}[A-Za-z0-9\]])?\Z")
_UNGUARDED = {
    "listen": "peers need not prove who they are (set cluster_key_file, or tls_cert, tls_key and tls_ca)",
    "http": "the API has neither TLS nor tokens in this version",
}


class Place(Struct, frozen=True, kw_only=True):
    """A node's place in its cluster."""

    name: str
    voters: dict[str, Address]
    listen: Address | None = None
    """None: there are no other nodes."""
    advertise: Address | None = None
    """Where the voters reach this learner; None: this node is a voter."""

    @property
    def own(self) -> Address:
        """Where other nodes reach this one."""
        return self.advertise or self.voters[self.name]


def place_of(settings: NodeSettings) -> Place:
    """Who this node is among which others.

    Raises:
        ConfigError: the lists, names or addresses are malformed or contradict each other.
    """
    return _learner(settings) if settings.join else _voter(settings)


def _voter(settings: NodeSettings) -> Place:
    if settings.advertise:
        raise ConfigError(
            "advertise is for learners (--join); a voter is reached at its entry in peers.",
            field="advertise",
        )
    voters, named = _voters(settings.peers, "peers")
    if not voters:
        name = _own_or_host_name(settings)
        if settings.listen:
            raise ConfigError(
                "listen is for other nodes, but peers names none; leave it out for a one-node cluster.",
                field="listen",
            )
        return Place(name=name, voters={name: Address("127.0.0.1", 0)})
    me = _own_name(settings, voters, named=named)
    _check_number(voters, "peers")
    listen = parse_address(settings.listen, "listen") if settings.listen else voters[me]
    return Place(name=me, voters=dict(sorted(voters.items())), listen=listen)


def _learner(settings: NodeSettings) -> Place:
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
    listen = parse_address(settings.listen, "listen")
    advertise = parse_address(settings.advertise, "advertise") if settings.advertise else listen
    if reachable(advertise, "") != advertise:
        raise ConfigError(
            f"{advertise} is a wildcard, which leads nowhere from elsewhere; set --advertise to an "
            "address at which the voters reach this node.",
            field="advertise",
        )
    name = _own_or_host_name(settings)
    if name in voters or advertise in voters.values():
        raise ConfigError(
            f"'{name}' at {advertise} is one of the voters that join lists; a voter is started with "
            "--peers, and a learner needs a name and an address of its own.",
            field="name" if name in voters else "listen",
        )
    return Place(name=name, voters=dict(sorted(voters.items())), listen=listen, advertise=advertise)


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
        parsed = parse_address(address, field)
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
    own = parse_address(settings.listen, "listen")
    me = str(own)
    if settings.name and settings.name != me:
        raise ConfigError(
            f"with peers given as host:port a node's name is its address ({me}); "
            f"to call it '{settings.name}', give peers as name=host:port.",
            field="name",
        )
    voters.setdefault(me, own)
    return me


def _own_or_host_name(settings: NodeSettings) -> str:
    return _checked_name(settings.name or socket.gethostname().split(".")[0] or "node")


def _checked_name(name: str) -> str:
    if not _NAME.match(name):
        raise ConfigError(
            f"'{name}' is not a node name: 1 to 63 letters, digits, '.', '_' or '-'.", field="name"
        )
    return name


def parse_address(text: str, field: str) -> Address:
    """``host:port`` with a port that others can know. Raises ConfigError, which names ``field``."""
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


def reachable(address: Address, host: str) -> Address:
    """The address as others see it: a wildcard is not one, ``host`` then is."""
    try:
        wildcard = ipaddress.ip_address(address.host).is_unspecified
    except ValueError:
        wildcard = False
    return Address(host, address.port) if wildcard else address


def check_loopback(field: str, address: Address | None, insecure: bool) -> None:
    """Raises ConfigError where strangers could reach what is not guarded against them."""
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
