"""``distroml certs``: make and show the cluster's CA, node certificates and cluster keys.

Works on local files only; no node is asked.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from distroml import certificates
from distroml.cli.context import Ctx, print_json, print_table
from distroml.credentials import key_id, load_cluster_keys, new_key, node_uri, read_public
from distroml.errors import ConfigError

certs = App(
    name="certs",
    help="Make and show certificates and keys of a cluster (local files only).",
    default_parameter=Parameter(negative=()),
    help_epilogue="",
)

Dir = Annotated[Path, Parameter(name="--dir")]
Host = Annotated[list[str] | None, Parameter(name="--host")]


@certs.command(sort_key=0)
def init(
    *,
    dir: Dir,
    cluster: str = "distroml",
    days: int = certificates.CA_DAYS,
    force: bool = False,
    ctx: Ctx,
) -> int:
    """Make the cluster's certificate authority.

    Args:
        dir: where ca.crt and ca.key go; keep ca.key on one safe machine.
        cluster: the nodes' --cluster-id.
        days: how long the authority is valid.
        force: replace an existing authority; all node certificates must then be made anew.
    """
    made = certificates.make_authority(dir, cluster=cluster, days=days, force=force)
    _say_made(ctx.json, made, f"CA of cluster '{cluster}'", "Give ca.crt to every node as --tls-ca")
    return 0


@certs.command(sort_key=1)
def node(
    name: str,
    /,
    *,
    dir: Dir,
    host: Host = None,
    days: int = certificates.NODE_DAYS,
    force: bool = False,
    ctx: Ctx,
) -> int:
    """Make a node's certificate, signed by the authority in --dir.

    Args:
        name: the node's name, as in --peers.
        dir: the directory with ca.crt and ca.key.
        host: name or address at which clients reach the node's API; may be given several times.
        days: how long the certificate is valid (never longer than the authority).
        force: replace an existing certificate and key of this node.
    """
    made, said = certificates.make_node(dir, name, hosts=host or (), days=days, force=force)
    what = f"certificate of {node_uri(said.cluster or '', name)}, valid to {said.valid_to:%Y-%m-%d}"
    _say_made(ctx.json, made, what, "Give both to this node only, as --tls-cert and --tls-key")
    return 0


@certs.command(sort_key=2)
def key(*, out: Path, force: bool = False, ctx: Ctx) -> int:
    """Make a random cluster key, by which nodes know each other where there are no certificates.

    Args:
        out: file to write, readable by you only; copy it to every node.
        force: replace an existing file.
    """
    certificates.write_new(out, new_key().encode(), mode=0o600, force=force)
    (made,) = load_cluster_keys(out, field="out").all
    if ctx.json:
        print_json({"file": str(out), "key_id": key_id(made)})
    else:
        print(f"Wrote {out}: cluster key {key_id(made)}.")
        print("Give it to every node as --cluster-key-file, over a safe way.")
    return 0


@certs.command(sort_key=3)
def show(file: Path, /, *, ctx: Ctx) -> int:
    """Show what a certificate or cluster key file holds; never a secret.

    Args:
        file: a certificate (PEM) or a cluster key file.
    """
    content = read_public(file, what="file", field="file")
    if b"-----BEGIN CERTIFICATE" in content:
        said = certificates.describe(content, file)
        document, rows = msgspec.to_builtins(said), _certificate_rows(said)
    elif b"-----BEGIN" in content:
        raise ConfigError(
            f"{file} is a private key, not a certificate; show its .crt.", field="file"
        )
    else:
        ids = [key_id(one) for one in load_cluster_keys(file, field="file").all]
        document = {"keys": ids}
        rows = [
            (f"key {number}", one, "in use" if number == 1 else "accepted")
            for number, one in enumerate(ids, 1)
        ]
    if ctx.json:
        print_json(document)
    else:
        print_table(("WHAT", "VALUE", "NOTE"), rows, empty="")
    return 0


def _certificate_rows(said: certificates.Description) -> list[tuple[str, str, str]]:
    left = (said.valid_to - datetime.now(UTC)).days
    return [
        ("kind", "authority" if said.authority else "node certificate", ""),
        ("cluster", said.cluster or "", "" if said.cluster else "not made for DistroML links"),
        ("node", said.node or "", ""),
        ("hosts", ", ".join(said.hosts), ""),
        ("issuer", said.issuer, ""),
        ("valid from", f"{said.valid_from:%Y-%m-%d %H:%M} UTC", ""),
        (
            "valid to",
            f"{said.valid_to:%Y-%m-%d %H:%M} UTC",
            "EXPIRED" if left < 0 else f"{left} days left",
        ),
        ("sha256", said.sha256, ""),
    ]


def _say_made(as_json: bool, made: certificates.Made, what: str, then: str) -> None:
    if as_json:
        print_json({"certificate": str(made.certificate), "private_key": str(made.private_key)})
        return
    print(f"Wrote {made.certificate} and {made.private_key}: {what}.")
    print(f"{then}.")
