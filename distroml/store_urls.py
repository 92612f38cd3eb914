"""The names of checkpoint stores, as specs, checkpoints and the API have them: ``local`` or a URL. Pure.

=====================================  ==============================================================================
``local``                              each node's ``--store-dir``
``file:///directory``                  a directory that all nodes see
``s3://bucket/prefix?endpoint=URL``    S3 and what speaks like it; ``region``, ``path_style=true`` or ``false``
``gs://bucket/prefix``                 Google Cloud Storage
``az://container/prefix?account=NAME`` Azure Blob Storage
=====================================  ==============================================================================

A URL is replicated with the job and shown by the API, so it never holds a credential: one that seems to is refused, and
no error repeats any of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, unquote, urlsplit

from msgspec import Struct

from distroml.errors import InvalidSpec

LOCAL = "local"
MAX_PREFIX_CHARACTERS = 512

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z")
_REGION = re.compile(r"[A-Za-z0-9-]{1,64}\Z")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}\Z")
_BOOLEAN = re.compile(r"(true|false)\Z")
_SECRET = re.compile(
    r"key|secret|token|password|passwd|credential|signature|\bsig\b|\bsas\b|connection",
    re.IGNORECASE,
)


class StoreUrl(Struct, frozen=True):
    """A store's name, understood."""

    scheme: str
    """``local``, ``file``, ``s3``, ``gs`` or ``az``."""
    place: str = ""
    """Directory, bucket or container; of ``local`` empty."""
    prefix: str = ""
    """What all keys begin with, without slashes around it."""
    options: dict[str, str] = {}


class StoreSettings(Struct, frozen=True, kw_only=True):
    """What a node says of stores beyond their URLs; paths and names, no secrets."""

    s3_endpoint: str = ""
    s3_region: str = ""
    s3_profile: str = ""
    s3_credentials_file: str = ""


def parse_store(name: str, field: str) -> StoreUrl:
    """The store that ``name`` means; touches nothing.

    Raises:
        InvalidSpec: it is none; says what is wrong without repeating it, and names ``field``.
    """
    if name == LOCAL:
        return StoreUrl(LOCAL)
    try:
        url = urlsplit(name)
        _ = url.port
        options = parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
    except ValueError:
        raise InvalidSpec(f"{field} is not a URL.", field=field) from None
    if (parse := _SCHEMES.get(url.scheme)) is None or "://" not in name:
        kinds = ", ".join(f"{scheme}://…" for scheme in _SCHEMES)
        raise InvalidSpec(f"{field} must be {LOCAL}, or a URL: {kinds}.", field=field)
    if "@" in url.netloc:
        raise _credentials(field, url.scheme)
    if url.fragment or "#" in name:
        raise InvalidSpec(f"{field}: the URL of a store has no part after '#'.", field=field)
    known = _OPTIONS[url.scheme]
    found: dict[str, str] = {}
    for key, value in options:
        if key not in known:
            if _SECRET.search(key):
                raise _credentials(field, url.scheme)
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise InvalidSpec(
                f"{field}: {url.scheme}:// has no such option in its query; {has}.", field=field
            )
        if key in found:
            raise InvalidSpec(f"{field}: {key} is given twice.", field=field)
        found[key] = known[key](value, field)
    return parse(url.netloc, unquote(url.path), found, field)


def check_endpoint(value: str, field: str) -> str:
    """``value``, if it is the URL of a server.

    Raises:
        InvalidSpec: it is not, or it holds a user or password.
    """
    try:
        url = urlsplit(value)
        sound = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise InvalidSpec(
            f"{field}: endpoint must be the URL of a server, such as http://127.0.0.1:9000.",
            field=field,
        )
    if "@" in url.netloc or url.query or url.fragment:
        raise _credentials(field, "s3")
    return value


def _file(host: str, path: str, options: dict[str, str], field: str) -> StoreUrl:
    if host:
        raise InvalidSpec(
            f"{field}: file:// names a directory that every node sees, not a host; write "
            "file:///directory with three slashes and an absolute path.",
            field=field,
        )
    parts = path.split("/")
    if not path.strip("/") or ".." in parts or "\0" in path:
        raise InvalidSpec(
            f"{field}: file:// needs an absolute directory without '..', such as file:///mnt/checkpoints.",
            field=field,
        )
    return StoreUrl("file", "/" + path.strip("/"), "", options)


def _bucket(scheme: str) -> Callable[[str, str, dict[str, str], str], StoreUrl]:
    def parse(host: str, path: str, options: dict[str, str], field: str) -> StoreUrl:
        what = "container" if scheme == "az" else "bucket"
        if not _BUCKET.match(host):
            raise InvalidSpec(
                f"{field}: {scheme}:// needs the name of a {what}, such as {scheme}://{what}/prefix.",
                field=field,
            )
        prefix = path.strip("/")
        if prefix and not _is_prefix(prefix):
            raise InvalidSpec(
                f"{field}: the part after the {what} must be at most {MAX_PREFIX_CHARACTERS} characters "
                "without empty parts, '.', '..' and control characters.",
                field=field,
            )
        return StoreUrl(scheme, host, prefix, options)

    return parse


def _is_prefix(prefix: str) -> bool:
    return (
        len(prefix) <= MAX_PREFIX_CHARACTERS
        and not any(part in ("", ".", "..") for part in prefix.split("/"))
        and prefix.isprintable()
    )


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[str, str], str]:
    def check(value: str, field: str) -> str:
        if not pattern.match(value):
            raise InvalidSpec(f"{field}: {what}.", field=field)
        return value

    return check


def _credentials(field: str, scheme: str) -> InvalidSpec:
    return InvalidSpec(
        f"{field} must not hold credentials: it is replicated and shown. Give them to the nodes instead: "
        f"{_WHERE_SECRETS_GO[scheme]}.",
        field=field,
    )


_SCHEMES: dict[str, Callable[[str, str, dict[str, str], str], StoreUrl]] = {
    "file": _file,
    "s3": _bucket("s3"),
    "gs": _bucket("gs"),
    "az": _bucket("az"),
}
_OPTIONS: dict[str, dict[str, Callable[[str, str], str]]] = {
    "file": {},
    "s3": {
        "endpoint": check_endpoint,
        "region": _matching(_REGION, "region must be a name such as eu-central-1"),
        "path_style": _matching(_BOOLEAN, "path_style must be true or false"),
    },
    "gs": {},
    "az": {"account": _matching(_ACCOUNT, "account must be the name of a storage account")},
}
_WHERE_SECRETS_GO = {
    "file": "file:// needs none",
    "s3": "--s3-credentials-file, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in their environment",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS in their environment",
    "az": "AZURE_STORAGE_ACCOUNT_KEY or another variable that adlfs reads, in their environment",
}
