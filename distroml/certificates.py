"""A small certificate authority for one cluster: its CA, node certificates, and what a certificate says.

Only ``distroml certs`` makes certificates; nodes just read the PEM files, so the ``cryptography`` package is an
extra and imported when it is needed. Keys are ECDSA P-256, which every TLS library and browser knows.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from distroml.credentials import cluster_uri, node_uri, read_private, read_public, read_uri
from distroml.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_DAYS: Final = 3650
NODE_DAYS: Final = 825
"""Browsers and some TLS libraries accept no longer life of a server's certificate."""
MAX_DAYS: Final = 36_500
MAX_HOSTS: Final = 100
CLOCK_SKEW: Final = timedelta(minutes=10)
"""A certificate is valid from a little before it was made: clocks differ."""
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
EXTRA_HINT: Final = (
    "certificates need the package 'cryptography': pip install 'distroml[tls]' (only where they are made; "
    "nodes do not need it)."
)


class Made(Struct, frozen=True):
    """Files that were written."""

    certificate: Path
    private_key: Path


class Description(Struct, frozen=True, kw_only=True):
    """What people want to know of a certificate."""

    cluster: str | None
    node: str | None
    authority: bool
    hosts: list[str]
    issuer: str
    valid_from: datetime
    valid_to: datetime
    sha256: str
    """Fingerprint of the certificate."""


def require_extra() -> None:
    """Raises ConfigError that names the extra where ``cryptography`` is not installed."""
    try:
        import cryptography.x509  # noqa: F401
    except ImportError:
        raise ConfigError(EXTRA_HINT) from None


def make_authority(directory: Path, *, cluster: str, days: int, force: bool) -> Made:
    """``ca.crt`` and ``ca.key`` of a new CA, which can sign node certificates and nothing else.

    Raises:
        ConfigError: ``cryptography`` is missing, an argument is wrong, or files exist and ``force`` is not set.
    """
    require_extra()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    _check(cluster, "cluster", limit=255)
    made = Made(directory / "ca.crt", directory / "ca.key")
    _make_directory(directory)
    _check_absent(made, force)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(f"DistroML {cluster} CA")
    now = datetime.now(UTC)
    builder = _builder(name, key.public_key(), now, now + _lifetime(days)).issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    uri = x509.UniformResourceIdentifier(cluster_uri(cluster))
    builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    _write_pair(made, _sign(builder, key, key.public_key()), key, force)
    return made


def make_node(
    directory: Path, name: str, *, hosts: Sequence[str], days: int, force: bool
) -> tuple[Made, Description]:
    """A certificate and key for node ``name``, signed by the CA in ``directory``.

    Args:
        hosts: names and addresses at which clients reach the node's API; none: only this machine.

    Raises:
        ConfigError: as for ``make_authority``, or the CA in ``directory`` cannot be used.
    """
    require_extra()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    _check(name, "name", limit=63)
    made = Made(*(directory / f"{_file_name(name)}.{end}" for end in ("crt", "key")))
    authority, authority_key, cluster = _load_authority(directory)
    _check_absent(made, force)
    names = [_host(host) for host in hosts or LOCAL_HOSTS]
    if len(names) > MAX_HOSTS:
        raise ConfigError(f"--host is given {len(names)} times; at most {MAX_HOSTS} fit.")
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    until = min(now + _lifetime(days), authority.not_valid_after_utc)
    builder = _builder(_subject(name), key.public_key(), now, until).issuer_name(authority.subject)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    # A node is a server to those that dial it and a client to those it dials.
    purposes = [x509.OID_SERVER_AUTH, x509.OID_CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    uri = x509.UniformResourceIdentifier(node_uri(cluster, name))
    builder = builder.add_extension(x509.SubjectAlternativeName([uri, *names]), critical=False)
    certificate = _sign(builder, authority_key, authority_key.public_key())
    _write_pair(made, certificate, key, force)
    return made, _describe(certificate)


def describe(pem: bytes, where: Path) -> Description:
    """What the first certificate of a PEM file says. Raises ConfigError if there is none."""
    require_extra()
    from cryptography import x509

    try:
        return _describe(x509.load_pem_x509_certificate(pem))
    except ValueError as error:
        raise ConfigError(f"{where} holds no readable certificate: {error}.") from None


# ---------------------------------------------------------------------- X.509


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _sign(
    builder: x509.CertificateBuilder,
    signer: ec.EllipticCurvePrivateKey,
    signer_public: ec.EllipticCurvePublicKey,
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_public)
    return builder.add_extension(issuer, critical=False).sign(signer, hashes.SHA256())


def _subject(common_name: str) -> x509.Name:
    from cryptography import x509

    # X.520 allows 64 characters; who a node is follows from the URI, this is for people.
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name[:64])])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        pass
    if not text.isascii() or not text or any(c in "/:[]@,*" or c.isspace() for c in text):
        raise ConfigError(
            f"--host '{text}' is neither a host name nor an IP address (give no port and no scheme)."
        )
    return x509.DNSName(text)


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    certificate_path, key_path = directory / "ca.crt", directory / "ca.key"
    if not certificate_path.exists():
        raise ConfigError(
            f"{directory} has no CA: run 'distroml certs init --dir {directory}' first, "
            "on the one machine that keeps it."
        )
    pem = read_public(certificate_path, what="CA certificate", field="dir")
    key_pem = read_private(key_path, what="CA key", field="dir")
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the CA in {directory} cannot be read: {error}.") from None
    said = _describe(certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not said.authority or not said.cluster:
        raise ConfigError(f"{certificate_path} is not a CA made by 'distroml certs init'.")
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{key_path} is not the key of {certificate_path}.")
    if said.valid_to <= datetime.now(UTC):
        raise ConfigError(f"the CA in {directory} expired on {said.valid_to:%Y-%m-%d}.")
    return certificate, key, said.cluster


def _describe(certificate: x509.Certificate) -> Description:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    extensions = certificate.extensions
    names: list[x509.GeneralName] = []
    authority = False
    for extension in extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names = list(extension.value)
        if isinstance(extension.value, x509.BasicConstraints):
            authority = extension.value.ca
    uris = [n.value for n in names if isinstance(n, x509.UniformResourceIdentifier)]
    cluster, node = next(filter(None, map(read_uri, uris)), (None, None))
    return Description(
        cluster=cluster,
        node=node,
        authority=authority,
        hosts=[str(n.value) for n in names if isinstance(n, x509.DNSName | x509.IPAddress)],
        issuer=certificate.issuer.rfc4514_string(),
        valid_from=certificate.not_valid_before_utc,
        valid_to=certificate.not_valid_after_utc,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(":"),
    )


# ---------------------------------------------------------------------- arguments and files


def _check(text: str, what: str, *, limit: int) -> None:
    if not 0 < len(text) <= limit or not text.isprintable() or text != text.strip():
        raise ConfigError(f"{what} '{text}' must be 1 to {limit} printable characters.", field=what)


def _lifetime(days: int) -> timedelta:
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"--days {days} is not between 1 and {MAX_DAYS}.", field="days")
    return timedelta(days=days)


def _file_name(name: str) -> str:
    """A node's name as a file name: names given as host:port have a colon, and none may leave the directory."""
    file_name = "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".")
    if not file_name or file_name == "ca":
        raise ConfigError(f"'{name}' cannot be a node's name here: choose another.", field="name")
    return file_name


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}.", field="dir") from None


def _check_absent(made: Made, force: bool) -> None:
    for path in (made.certificate, made.private_key):
        if path.exists() and not force:
            raise ConfigError(
                f"{path} exists; --force replaces it (what was signed with an old CA key is then void)."
                if path.name.startswith("ca.")
                else f"{path} exists; --force replaces it."
            )


def _write_pair(
    made: Made, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, force: bool
) -> None:
    from cryptography.hazmat.primitives import serialization

    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    # The key first: a certificate without its key would look complete.
    write_new(made.private_key, key_pem, mode=0o600, force=force)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_new(made.certificate, pem, mode=0o644, force=force)


def write_new(path: Path, data: bytes, *, mode: int, force: bool) -> None:
    """Writes a file whole or not at all; an existing one only with ``force``.

    Raises:
        ConfigError: it exists, or the operating system refuses.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            if force:
                fresh.replace(path)
            else:
                os.link(fresh, path)  # unlike a rename this fails where the file exists
        finally:
            fresh.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError(f"{path} exists; --force replaces it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
