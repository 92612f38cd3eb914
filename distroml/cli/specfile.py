"""Reading a job specification from a JSON, YAML or TOML file, with ``--set`` overrides.

Everything is checked here, before any node is asked, so that an error can name the file and the field.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distroml.cli.context import STDIN
from distroml.errors import InvalidSpec
from distroml.spec import convert_spec

MAX_SPEC_BYTES = 1024 * 1024


def read_spec(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The validated document of ``source`` (a path, or ``STDIN`` for YAML or JSON).

    Args:
        overrides: ``dotted.field=value``; the value is JSON, or a string where it is not.

    Raises:
        InvalidSpec: the file cannot be read or parsed, or a field is wrong; names the file and the field.
        NotBuilt: a value that this version does not have.
    """
    text = _read(source)
    suffix = ".yaml" if source == STDIN else Path(source).suffix.lower()
    parse = _PARSERS.get(suffix)
    if parse is None:
        known = ", ".join(_PARSERS)
        raise InvalidSpec(f"{source}: the name must end in one of: {known}; not {suffix!r}.")
    try:
        document = parse(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSpec(f"{source}: not valid {suffix[1:].upper()}: {error}.") from None
    if not isinstance(document, dict):
        raise InvalidSpec(
            f"{source}: a job specification is a mapping of fields, not {_kind(document)}."
        )
    for override in overrides:
        _override(document, override)
    try:
        convert_spec(document)
    except InvalidSpec as error:
        raise type(error)(f"{source}: {error.detail}", field=error.field) from None
    return document


def _read(source: str) -> str:
    try:
        if source == STDIN:
            raw = sys.stdin.buffer.read(MAX_SPEC_BYTES + 1)
        else:
            with open(source, "rb") as file:
                raw = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise InvalidSpec(f"{source}: cannot be read: {error.strerror}.") from None
    if len(raw) > MAX_SPEC_BYTES:
        raise InvalidSpec(f"{source}: larger than {MAX_SPEC_BYTES} bytes.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{source}: not UTF-8 text (byte {error.start}).") from None


def _override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise InvalidSpec(f"--set takes dotted.field=value, not {override!r}.", field="--set")
    place: Any = document
    for name in names[:-1]:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise InvalidSpec(
                f"--set {override}: {name!r} is {_kind(place)}, it has no fields.", field=path
            )
    try:
        place[names[-1]] = _json(text)
    except ValueError:
        place[names[-1]] = text


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)


def _yaml(text: str) -> Any:
    import yaml

    # YAML 1.1 as PyYAML reads it turns 1e-3 into a string, 'no' into false and 1.5.2026 into a date: keep
    # only what JSON has, and read every number that JSON reads as one.
    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}

    for tag, pattern, first in _YAML_SCALARS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


_YAML_SCALARS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
    ("merge", r"^<<$", "<"),
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return document


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", type(None): "empty"}
    return names.get(type(value), f"of type {type(value).__name__}")


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".toml": tomllib.loads,
}
