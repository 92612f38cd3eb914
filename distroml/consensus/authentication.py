"""Who may be a peer: proof of the cluster key, tags on frames, and what a node's links require.

The handshake (`frames.py`) has both sides show fresh numbers; from the key and everything that was
said, both derive four secrets with HKDF (RFC 5869): a proof for each role and a tag key for each
direction. A proof therefore holds for one conversation, one role and one pair of processes only:
nothing of it can be replayed, reflected or carried to another link. Where TLS does not protect the
connection, each later frame carries a tag over its place in the stream, so that who only waits for
the handshake to pass can neither add, change, drop, repeat nor reorder frames.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from pathlib import Path
from typing import Final

from msgspec import Struct

from distroml.consensus.link_tls import LinkTls, load_link_tls
from distroml.credentials import ClusterKeys, load_cluster_keys
from distroml.errors import ConfigError

TAG_BYTES: Final = 16
"""HMAC-SHA-256 truncated to 128 bits (RFC 2104, 5): a guess is right once in 2^128, and a wrong one ends the link."""
SECRET_BYTES: Final = hashlib.sha256().digest_size
_PURPOSE: Final = b"distroml peer link "
_SEQUENCE: Final = struct.Struct(">Q")


class LinkSecrets(Struct, frozen=True):
    """What both ends of one connection derive; all are empty where no key is in use."""

    acceptor_proof: bytes = b""
    dialer_proof: bytes = b""
    dialer_tag_key: bytes = b""
    """For frames from the dialer to the acceptor."""
    acceptor_tag_key: bytes = b""

    def __repr__(self) -> str:
        return "LinkSecrets()"


NO_SECRETS: Final = LinkSecrets()


def derive_secrets(key: bytes, transcript: bytes) -> LinkSecrets:
    """HKDF-SHA-256 of the cluster key, salted with all that both sides said."""
    salt = hashlib.sha256(transcript).digest()
    extracted = hmac.digest(salt, key, "sha256")
    return LinkSecrets(
        acceptor_proof=_expand(extracted, b"acceptor proof"),
        dialer_proof=_expand(extracted, b"dialer proof"),
        dialer_tag_key=_expand(extracted, b"dialer frames"),
        acceptor_tag_key=_expand(extracted, b"acceptor frames"),
    )


def _expand(extracted: bytes, label: bytes) -> bytes:
    """The first block of HKDF-Expand; all of our outputs are one block long."""
    return hmac.digest(extracted, _PURPOSE + label + b"\x01", "sha256")


class FrameTags:
    """The tags of one direction of one connection; sender and receiver count frames alike."""

    __slots__ = ("_fresh", "_sequence")

    def __init__(self, key: bytes) -> None:
        self._fresh = hmac.new(key, digestmod=hashlib.sha256)
        self._sequence = 0

    def next(self, header: bytes, body: bytes) -> bytes:
        """The tag of the next frame; each call counts one frame."""
        mac = self._fresh.copy()
        mac.update(_SEQUENCE.pack(self._sequence) + header)
        mac.update(body)
        self._sequence += 1
        return mac.digest()[:TAG_BYTES]


class LinkSecurity(Struct, frozen=True, kw_only=True):
    """What a node's links require of peers. Default: nothing, names are taken on trust."""

    keys: ClusterKeys = ClusterKeys()
    tls: LinkTls | None = None

    @property
    def authenticates(self) -> bool:
        """Whether strangers are kept out, so that links may leave the loopback interface."""
        return bool(self.keys) or self.tls is not None

    @property
    def tags_frames(self) -> bool:
        """TLS protects every byte by itself."""
        return bool(self.keys) and self.tls is None

    def as_acceptor(self, transcript: bytes) -> LinkSecrets:
        """Secrets of the key in use: the first."""
        keys = self.keys.all
        return derive_secrets(keys[0], transcript) if keys else NO_SECRETS

    def as_dialer(self, transcript: bytes, proof: bytes) -> LinkSecrets | None:
        """Secrets of that accepted key with which the acceptor proved itself; None if it did not."""
        if not self.keys:
            return NO_SECRETS if not proof else None
        found = None
        for key in self.keys.all:
            secrets = derive_secrets(key, transcript)
            if same(proof, secrets.acceptor_proof):
                found = secrets
        return found


def same(one: bytes, other: bytes) -> bool:
    """Equality that takes the same time wherever the two differ."""
    return hmac.compare_digest(one, other)


def load_link_security(
    *,
    name: str,
    cluster_id: str,
    cluster_key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_ca: Path | None = None,
) -> LinkSecurity:
    """What the given files make of this node's links; no file at all: `LinkSecurity()`.

    Raises:
        ConfigError: a file is missing, unusable, open to others or not for this node, or of
            certificate, key and CA only some are given.
    """
    keys = load_cluster_keys(cluster_key_file) if cluster_key_file else ClusterKeys()
    files = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_ca": tls_ca}
    missing = [field for field, path in files.items() if path is None]
    if len(missing) == len(files):
        return LinkSecurity(keys=keys)
    if tls_cert is None or tls_key is None or tls_ca is None:
        raise ConfigError(
            f"tls_cert, tls_key and tls_ca belong together; {' and '.join(missing)} is not set. "
            "'distroml certs' makes all three.",
            field=missing[0],
        )
    tls = load_link_tls(
        name=name,
        cluster_id=cluster_id,
        certificate=tls_cert,
        private_key=tls_key,
        authority=tls_ca,
    )
    return LinkSecurity(keys=keys, tls=tls)
