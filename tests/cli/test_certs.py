"""``distroml certs``: files that are made, their modes, and what it refuses."""

from __future__ import annotations

import json
import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from distroml.consensus.authentication import load_link_security
from distroml.credentials import load_cluster_keys
from tests.cli.conftest import Cli, finish, program


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def pki(cli: Cli, tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    assert cli("certs", "init", "--dir", directory, "--cluster", "lab 1", "--days", "30").code == 0
    return directory


def test_a_node_can_use_what_was_made(cli: Cli, pki: Path) -> None:
    made = cli("certs", "node", "127.0.0.1:7101", "--dir", pki, "--json")
    files = {name: Path(path) for name, path in json.loads(made.out).items()}
    assert set(files) == {"certificate", "private_key"}
    security = load_link_security(
        name="127.0.0.1:7101",
        cluster_id="lab 1",
        tls_cert=files["certificate"],
        tls_key=files["private_key"],
        tls_ca=pki / "ca.crt",
    )
    assert security.authenticates
    assert mode(files["private_key"]) == mode(pki / "ca.key") == 0o600
    assert mode(pki) == 0o700


def test_hosts_are_in_the_certificate_so_that_clients_can_check_them(cli: Cli, pki: Path) -> None:
    cli("certs", "node", "a", "--dir", pki, "--host", "a.example", "--host", "10.0.0.1")
    cli("certs", "node", "b", "--dir", pki)
    shown = json.loads(cli("certs", "show", pki / "a.crt", "--json").out)
    assert shown["hosts"] == ["a.example", "10.0.0.1"]
    assert (shown["cluster"], shown["node"], shown["authority"]) == ("lab 1", "a", False)
    local = json.loads(cli("certs", "show", pki / "b.crt", "--json").out)
    assert local["hosts"] == ["localhost", "127.0.0.1", "::1"]
    # OpenSSL, at its strictest, agrees that the CA signed it for a TLS server.
    context = ssl.create_default_context(cafile=pki / "ca.crt")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pki / "a.crt", pki / "a.key")
    check_handshake(context, server, "a.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        check_handshake(context, server, "b.example")


def check_handshake(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_a_certificate_ends_no_later_than_its_ca(cli: Cli, pki: Path) -> None:
    assert cli("certs", "node", "a", "--dir", pki, "--days", "3000").code == 0
    shown = json.loads(cli("certs", "show", pki / "a.crt", "--json").out)
    end = datetime.fromisoformat(shown["valid_to"])
    assert end <= datetime.now(UTC) + timedelta(days=30)


def test_nothing_is_overwritten_without_force(cli: Cli, pki: Path) -> None:
    cli("certs", "node", "a", "--dir", pki)
    key = pki / "cluster.key"
    cli("certs", "key", "--out", key)
    before = {path: path.read_bytes() for path in pki.iterdir()}
    again = [
        ("certs", "init", "--dir", pki),
        ("certs", "node", "a", "--dir", pki),
        ("certs", "key", "--out", key),
    ]
    for tokens in again:
        refused = cli(*tokens)
        assert refused.code == 2
        assert "exists; --force replaces it" in refused.err
    assert {path: path.read_bytes() for path in pki.iterdir()} == before
    (pki / "a.key").unlink()  # as if the program had died between the two files
    assert cli(*again[1]).code == 2
    for tokens in reversed(again):
        assert cli(*tokens, "--force").code == 0
    assert {path.name for path in pki.iterdir()} == {path.name for path in before}
    assert all(path.read_bytes() != old for path, old in before.items())
    assert mode(pki / "a.key") == mode(key) == mode(pki / "ca.key") == 0o600


def test_a_key_file_is_random_and_private_and_show_does_not_tell_it(
    cli: Cli, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert cli("certs", "key", "--out", one).code == 0
    assert cli("certs", "key", "--out", other).code == 0
    (key,) = load_cluster_keys(one).all
    assert load_cluster_keys(other).all != (key,)
    assert mode(one) == 0o600
    shown = cli("certs", "show", one)
    assert shown.code == 0
    assert key.hex() not in shown.out
    ids = [json.loads(cli("certs", "show", file, "--json").out)["keys"] for file in (one, other)]
    assert ids[0] != ids[1]
    assert ids[0][0] in shown.out


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (["node", "a", "--dir", "."], "has no CA: run 'distroml certs init"),
        (["node", "", "--dir", "PKI"], "must be 1 to 63 printable"),
        (["node", "a" * 64, "--dir", "PKI"], "must be 1 to 63 printable"),
        (["node", "ca", "--dir", "PKI"], "cannot be a node's name"),
        (["node", "a", "--dir", "PKI", "--host", "http://a"], "neither a host name nor an IP"),
        (["node", "a", "--dir", "PKI", "--days", "0"], "not between 1 and"),
        (["init", "--dir", "new", "--cluster", ""], "must be 1 to 255 printable"),
        (["init", "--dir", "new", "--days", "99999"], "not between 1 and"),
        (["key", "--out", "absent/dir/key"], "cannot be written: No such file"),
        (["show", "absent"], "cannot be read: No such file"),
        (["show", "PKI/ca.key"], "is a private key, not a certificate"),
        (["show", "broken.crt"], "holds no readable certificate"),
    ],
)
def test_mistakes_are_named(
    cli: Cli,
    pki: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.crt").write_text("-----BEGIN CERTIFICATE-----\nrubbish\n")
    refused = cli("certs", *(token.replace("PKI", str(pki)) for token in tokens))
    assert refused.code == 2
    assert complaint in refused.err
    assert "Traceback" not in refused.err


def test_a_ca_key_that_others_can_read_or_of_another_ca_is_refused(cli: Cli, pki: Path) -> None:
    (pki / "ca.key").chmod(0o644)
    assert "chmod 600" in cli("certs", "node", "a", "--dir", pki).err
    cli("certs", "init", "--dir", pki / "other")
    (pki / "ca.key").unlink()
    (pki / "ca.key").write_bytes((pki / "other" / "ca.key").read_bytes())
    (pki / "ca.key").chmod(0o600)
    assert "is not the key of" in cli("certs", "node", "a", "--dir", pki).err


def test_a_name_cannot_leave_the_directory(cli: Cli, pki: Path) -> None:
    assert cli("certs", "node", "../../evil", "--dir", pki).code == 0
    assert {path.parent for path in pki.parent.rglob("*evil*")} == {pki}


def test_without_the_extra_it_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.x509", None)
    refused = cli("certs", "init", "--dir", tmp_path / "pki")
    assert refused.code == 2
    assert "pip install 'distroml[tls]'" in refused.err
    assert cli("certs", "key", "--out", tmp_path / "key").code == 0


def test_it_is_there_as_a_program(tmp_path: Path) -> None:
    result = finish(program("certs", "key", "--out", tmp_path / "key"))
    assert (result.code, result.err) == (0, "")
    assert finish(program("certs")).code == 0
