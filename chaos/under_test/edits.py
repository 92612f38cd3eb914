"""Changes the product's source while it is imported, in this process alone: how a mutant comes to life.

The text of a module is changed before it is compiled, so whoever imports a function of it by name gets the changed one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

import msgspec
from msgspec import Struct

VARIABLE = "CHAOS_EDITS"
"""JSON list of edits."""


class Edit(Struct, frozen=True):
    """One piece of text of a module, replaced."""

    module: str
    old: str
    """Exactly one place of the module's source."""
    new: str


class Stale(Exception):
    """An edit does not fit the source any more."""


def edited(source: str, edits: Sequence[Edit]) -> str:
    """The source with all edits made.

    Raises:
        Stale: the old text of one is not there exactly once.
    """
    for edit in edits:
        if (count := source.count(edit.old)) != 1:
            raise Stale(f"{edit.module} has {count} times the text {edit.old!r}; once was expected")
        source = source.replace(edit.old, edit.new)
    return source


def check(edits: Sequence[Edit]) -> None:
    """See that the edits fit the source as it is.

    Raises:
        Stale: one does not.
    """
    for module in {edit.module for edit in edits}:
        edited(_source_of(module), [edit for edit in edits if edit.module == module])


def install(edits: Sequence[Edit]) -> None:
    """From now on modules are imported with these edits.

    Raises:
        Stale: an edit does not fit, or its module was imported before.
    """
    if early := sorted({edit.module for edit in edits} & sys.modules.keys()):
        raise Stale(f"{', '.join(early)} was imported before it could be changed")
    sys.meta_path.insert(0, _Finder(edits))


def install_if_asked() -> None:
    """``install`` what the environment asks for."""
    if given := os.environ.get(VARIABLE):
        install(msgspec.json.decode(given, type=tuple[Edit, ...]))


def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise Stale(f"there is no module {module}")
    return Path(spec.origin).read_text()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        edits = [edit for edit in self._edits if edit.module == fullname]
        if not edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            raise Stale(f"there is no module {fullname}")
        spec.loader = _Loader(fullname, spec.origin, edits)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(fullname, path)
        self._edits = edits

    def get_code(self, fullname: str) -> CodeType:
        """Compiled from the edited text, never from a cache."""
        source = edited(Path(self.path).read_text(), self._edits)
        return compile(source, self.path, "exec", dont_inherit=True)
