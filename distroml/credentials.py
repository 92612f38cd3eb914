"""What nodes are known by: the cluster key in its file, and the name that a node's certificate carries.

Both the node, which reads them, and ``distroml certs``, which makes them, agree through this module. Keys never
appear in a ``repr``, a log line or an error; ``key_id`` tells two of them apart without telling either.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from distroml.errors import ConfigError

KEY_BYTES: Final = 32
MAX_KEY_BYTES: Final = 256
MIN_DISTINCT_BYTES: Final = 16
"""Of 32 random bytes about 30 differ; fewer than this many come only from a pattern or a typed word."""
MAX_KEYS: Final = 2
"""The key in use and, while it is being replaced, one more that is accepted."""
MAX_FILE_BYTES: Final = 64 * 1024
"""Of a key file or PEM file; what is larger is something else."""
_TOO_OPEN: Final = stat.S_IRWXO | stat.S_IWGRP
_SCHEME: Final = "distroml://"


class ClusterKeys:
    """The keys of a key file: the first is used, all are accepted. Empty: there is no key."""

    __slots__ = ("_keys",)

    def __init__(self, *keys: bytes) -> None:
        self._keys = keys

    @property
    def all(self) -> tuple[bytes, ...]:
        return self._keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"ClusterKeys({', '.join(map(key_id, self._keys))})"


def key_id(key: bytes) -> str:
    """Eight characters by which people compare keys; says nothing about the key itself."""
    return hmac.digest(key, b"distroml cluster key id", "sha256").hex()[:8]


def new_key() -> str:
    """The text of a new key file."""
    return (
        "# DistroML cluster key: the same file on every node, readable by its owner only.\n"
        f"{secrets.token_hex(KEY_BYTES)}\n"
    )


def load_cluster_keys(path: Path, *, field: str = "cluster_key_file") -> ClusterKeys:
    """The keys of a file: one or two lines of hexadecimal digits or base64; ``#`` begins a comment line.

    Raises:
        ConfigError: the file cannot be read, is open to other users, or a line is no good key.
    """
    text = read_private(path, what="cluster key file", field=field).decode("ascii", "replace")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [
        _parse_key(line, f"line {number} of cluster key file {path}", field)
        for number, line in lines
        if line and not line.startswith("#")
    ]
    hint = "'distroml certs key --out FILE' makes a good one"
    if not keys:
        raise ConfigError(f"cluster key file {path} holds no key; {hint}.", field=field)
    if len(keys) > MAX_KEYS:
        raise ConfigError(
            f"cluster key file {path} holds {len(keys)} keys; at most {MAX_KEYS}: the one in use and the next "
            "or previous one.",
            field=field,
        )
    if len(set(keys)) < len(keys):
        raise ConfigError(
            f"cluster key file {path} holds the same key twice; remove one line.", field=field
        )
    return ClusterKeys(*keys)


def _parse_key(line: str, where: str, field: str) -> bytes:
    hint = "'distroml certs key --out FILE' makes a good one"
    try:
        key = _decode_key(line)
    except (binascii.Error, ValueError):
        raise ConfigError(
            f"{where} is neither hexadecimal nor base64; {hint}.", field=field
        ) from None
    if not KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ConfigError(
            f"{where} is a key of {len(key)} bytes; it must have {KEY_BYTES} to {MAX_KEY_BYTES}; {hint}.",
            field=field,
        )
    if len(set(key)) < MIN_DISTINCT_BYTES:
        raise ConfigError(
            f"{where} is not random (only {len(set(key))} different bytes); {hint}.", field=field
        )
    return key


def _decode_key(line: str) -> bytes:
    # Hexadecimal digits are base64 letters too, so they are tried first.
    try:
        return bytes.fromhex(line)
    except ValueError:
        return base64.b64decode(line, validate=True)


def read_private(path: Path, *, what: str, field: str) -> bytes:
    """The bytes of a file that only its owner (and at most its group, to read) may open.

    Raises:
        ConfigError: it cannot be read, is no plain file, is too large, or others may read or change it.
    """
    data, mode = _read(path, what, field)
    if mode & _TOO_OPEN:
        raise ConfigError(
            f"{what} {path} has mode {stat.S_IMODE(mode):04o}: other users can read or change it. "
            f"Run: chmod 600 {path}",
            field=field,
        )
    return data


def read_public(path: Path, *, what: str, field: str) -> bytes:
    """The bytes of a small file.

    Raises:
        ConfigError: it cannot be read, is no plain file or is too large.
    """
    return _read(path, what, field)[0]


def _read(path: Path, what: str, field: str) -> tuple[bytes, int]:
    try:
        # Without O_NONBLOCK a FIFO given by mistake would hold up the start for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            data = file.read(MAX_FILE_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read: {error.strerror or error}.", field=field
        ) from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{what} {path} is not a plain file.", field=field)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{what} {path} is larger than {MAX_FILE_BYTES} bytes; is it the right file?",
            field=field,
        )
    return data, mode


# ---------------------------------------------------------------------- names in certificates


def cluster_uri(cluster_id: str) -> str:
    """The URI in the certificate of a cluster's CA."""
    return _SCHEME + quote(cluster_id, safe="")


def node_uri(cluster_id: str, name: str) -> str:
    """The URI (subject alternative name) by which a certificate names a node: ``distroml://CLUSTER/node/NAME``.

    Names are percent-encoded, so none can look like another one.
    """
    return f"{cluster_uri(cluster_id)}/node/{quote(name, safe='')}"


def read_uri(uri: str) -> tuple[str, str | None] | None:
    """(cluster id, node name) of a URI made by the functions above; the name is None for a CA's."""
    if not uri.startswith(_SCHEME):
        return None
    cluster, *rest = uri.removeprefix(_SCHEME).split("/")
    if not rest:
        return unquote(cluster), None
    if len(rest) == 2 and rest[0] == "node":
        return unquote(cluster), unquote(rest[1])
    return None
