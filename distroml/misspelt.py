"""What a name that does not exist was perhaps meant to be: a setting of a node, a field of a job specification."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import msgspec
from msgspec import Struct

MAX_SHOWN = 100
"""Characters of such a name that an error repeats."""
_UNKNOWN = re.compile(r"unknown field `(.*?)`", re.DOTALL)


def unknown_field(text: str) -> str | None:
    """The name that msgspec's sentence says no Struct has; None where it says something else."""
    found = _UNKNOWN.search(text)
    return found[1][:MAX_SHOWN] if found else None


def meant(name: str, known: Iterable[str]) -> str:
    """`` (perhaps max_restarts was meant)``; nothing where nothing comes close.

    Args:
        known: names or dotted paths, the first of which that ends like ``name`` comes closest, then one beside it.
    """
    paths = [path.rpartition(".") for path in known]
    parent, dot, leaf = name.rpartition(".")
    close = ["".join(path) for path in paths if path[2] == leaf]
    if not close:
        beside = [path[2] for path in paths if path[0] == parent]
        close = [f"{parent}{dot}{one}" for one in difflib.get_close_matches(leaf, beside, n=1)]
    return f" (perhaps {close[0]} was meant)" if close else ""


def field_paths(kind: type[Struct], parent: str = "") -> Iterator[str]:
    """Dotted paths of all fields of a Struct and of the Structs in it."""
    for field in msgspec.structs.fields(kind):
        path = f"{parent}{field.encode_name}"
        yield path
        for part in _structs_in(field.type):
            yield from field_paths(part, f"{path}.")


def _structs_in(annotation: Any) -> Iterator[type[Struct]]:
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        yield annotation
    for part in get_args(annotation):
        yield from _structs_in(part)
