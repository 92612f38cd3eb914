"""Mutual TLS 1.3 of peer links, without I/O: bytes in, bytes out.

Both sides show a certificate of the cluster's CA that names them: `distroml://CLUSTER/node/NAME` as
a subject alternative name. Host names are not checked: a node is who its certificate says, wherever
it runs. `connections.py` moves the bytes, so that deadlines, limits and counters of the handshake
are the same with and without TLS.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from distroml.consensus.frames import BadFrame
from distroml.credentials import node_uri, read_private, read_public
from distroml.errors import ConfigError

MAX_TLS_HANDSHAKE_BYTES: Final = 64 * 1024
"""Received before a peer has shown its certificate; chains of a few certificates are far below."""
_READ_BYTES: Final = 64 * 1024

_FAILURES: Final = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "HTTP_REQUEST": "it does not speak TLS",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has no certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of this node's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this node's certificate has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this node's certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it asks for a certificate",
}
_ABOUT_CERTIFICATES: Final = frozenset({"PEER_DID_NOT_RETURN_A_CERTIFICATE"})


class LinkTls:
    """The two TLS contexts of a node, and how it names its peers."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, cluster_id: str) -> None:
        self.server = server
        self.client = client
        self.cluster_id = cluster_id

    def accept(self) -> TlsEndpoint:
        return TlsEndpoint(self.server, server_side=True)

    def dial(self) -> TlsEndpoint:
        return TlsEndpoint(self.client, server_side=False)

    def names(self, endpoint: TlsEndpoint, peer: str) -> bool:
        """Whether the certificate at the other end is that of node `peer`."""
        return node_uri(self.cluster_id, peer) in endpoint.peer_uris()


class TlsEndpoint:
    """One end of one TLS connection in memory. Raises BadFrame for whatever the peer did wrong."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.server_side = server_side
        self.secured = False
        """The peer has shown a certificate of our CA, and nothing went wrong since."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._heard_bytes = 0

    def receive(self, data: bytes) -> bytes:
        """Takes bytes of the wire, goes on with the handshake, and returns what was decrypted."""
        self._incoming.write(data)
        if not self.secured:
            self._heard_bytes += len(data)
            if not self.handshake():
                if self._heard_bytes > MAX_TLS_HANDSHAKE_BYTES:
                    raise BadFrame("oversize", "a TLS handshake does not end")
                return b""
        return self._read()

    def handshake(self) -> bool:
        """One step; whether the peer has now shown a certificate of our CA."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise _refusal(error) from error
        self.secured = True
        return True

    def _read(self) -> bytes:
        parts: list[bytes] = []
        try:
            while part := self._tls.read(_READ_BYTES):
                parts.append(part)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        except ssl.SSLError as error:
            self.secured = False
            raise _refusal(error) from error
        return b"".join(parts)

    def encrypt(self, data: bytes) -> bytes:
        """The bytes for the wire that carry `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]
        return self.outgoing()

    def outgoing(self) -> bytes:
        """What the handshake, or an alert, wants sent."""
        return self._outgoing.read()

    def peer_uris(self) -> frozenset[str]:
        """The URIs in the peer's certificate, which the cluster's CA has signed."""
        certificate = self._tls.getpeercert() if self.secured else None
        names = (certificate or {}).get("subjectAltName", ())
        return frozenset(
            entry[1]
            for entry in names
            if isinstance(entry, tuple) and len(entry) == 2 and entry[0] == "URI"
            if isinstance(entry[1], str)
        )

    def peer_names(self) -> str:
        """The same for people; empty if there is none."""
        return ", ".join(sorted(self.peer_uris()))


def _refusal(error: ssl.SSLError) -> BadFrame:
    if isinstance(error, ssl.SSLCertVerificationError):
        return BadFrame(
            "certificate", f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
        )
    known = _FAILURES.get(error.reason or "", f"TLS failed: {error.reason or error}")
    return BadFrame("certificate" if error.reason in _ABOUT_CERTIFICATES else "tls", known)


# ---------------------------------------------------------------------- from files


def load_link_tls(
    *, name: str, cluster_id: str, certificate: Path, private_key: Path, authority: Path
) -> LinkTls:
    """Reads PEM files and tries them out: this node must be able to talk to itself.

    Raises:
        ConfigError: a file is unusable, the key is open to others or of another certificate, or the
            certificate is not of this CA, not valid now, or names another node.
    """
    read_private(private_key, what="TLS key", field="tls_key")
    read_public(certificate, what="TLS certificate", field="tls_cert")
    read_public(authority, what="CA certificate", field="tls_ca")
    contexts = [
        _context(purpose, certificate, private_key, authority)
        for purpose in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
    ]
    tls = LinkTls(contexts[0], contexts[1], cluster_id)
    _check_own_name(tls, name, certificate, authority)
    return tls


def _context(
    purpose: ssl._SSLMethod, certificate: Path, private_key: Path, authority: Path
) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the node's URI is checked instead
    context.verify_mode = ssl.CERT_REQUIRED
    if purpose == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection shows its certificate
    try:
        context.load_cert_chain(certificate, private_key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"TLS certificate {certificate} with key {private_key} cannot be used: {_words(error)}. "
            "Both must be PEM, the key without a passphrase and of this certificate.",
            field="tls_cert",
        ) from None
    try:
        context.load_verify_locations(authority)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"CA certificate {authority} cannot be used: {_words(error)}. It must be PEM.",
            field="tls_ca",
        ) from None
    return context


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal, which a service does not have.
    raise ValueError("the key is encrypted")


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).replace("_", " ").lower()


def _check_own_name(tls: LinkTls, name: str, certificate: Path, authority: Path) -> None:
    dialer, acceptor = tls.dial(), tls.accept()
    try:
        dialer.handshake()
        acceptor.receive(dialer.outgoing())
        dialer.receive(acceptor.outgoing())
        acceptor.receive(dialer.outgoing())
    except BadFrame as error:
        raise ConfigError(
            f"TLS certificate {certificate} does not work with CA {authority}: {error}.",
            field="tls_cert",
        ) from None
    if not tls.names(dialer, name):
        found = dialer.peer_names() or "no node"
        raise ConfigError(
            f"TLS certificate {certificate} is for {found}; this node is "
            f"{node_uri(tls.cluster_id, name)}. 'distroml certs node {name}' makes the right one.",
            field="tls_cert",
        )
