"""Runs a directed test against a mutated product, in a process of its own, and says what came of it.

A mutant that never ran proves nothing, and neither does one that merely breaks the program: it counts as caught only
where its code was executed and the test then failed for its own reason, an assertion or a refusal.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import multiprocessing
import sys
import textwrap
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest

LIMIT_S = 120.0
_ACCIDENTS = (AttributeError, ImportError, NameError, SyntaxError, TypeError)
"""A mutant that ends in one of these is broken itself."""


class Mutant(msgspec.Struct, frozen=True):
    """One fix, taken out."""

    name: str
    hazard: str
    """Row of the audit, or the rule's own name."""
    breaks: str
    """What no longer holds."""
    target: str
    """`module:Class.function` below `distroml`, whose source is changed."""
    old: str
    new: str
    caught_by: str
    """The test that must fail."""


class Verdict(msgspec.Struct, frozen=True):
    mutant: Mutant
    caught: bool
    why: str


class Stale(Exception):
    """The mutant does not fit the product's source any more."""


def _locate(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute, function)."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(f"distroml.{module_name}")
    *classes, attribute = path.split(".")
    for name in classes:
        owner = getattr(owner, name)
    return owner, attribute, inspect.getattr_static(owner, attribute)


def _mutated_source(mutant: Mutant, function: Any) -> str:
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutant.old) != 1:
        raise Stale(
            f"{mutant.name}: {mutant.target} has {source.count(mutant.old)} x {mutant.old!r}"
        )
    return source.replace(mutant.old, mutant.new)


def fits(mutant: Mutant) -> bool:
    """Whether the mutant still changes the product's source. Raises Stale where it does not."""
    _, _, function = _locate(mutant.target)
    return _mutated_source(mutant, function) != ""


def apply(mutant: Mutant) -> list[int]:
    """Changes the product in this process for good; the returned list grows with each execution.

    Raises Stale.
    """
    owner, attribute, function = _locate(mutant.target)
    source = _mutated_source(mutant, function)
    namespace = sys.modules[function.__module__].__dict__
    executed: list[int] = []
    # A function around it gives `super()` its class, and the witness a name that nothing else has.
    body = textwrap.indent(source, "    ")
    exec(f"def _made(__class__):\n{body}\n    return {attribute}", namespace)
    mutated = namespace.pop("_made")(owner)

    def witnessed(*args: Any, **kwargs: Any) -> Any:
        executed.append(1)
        return mutated(*args, **kwargs)

    _replace_everywhere(owner, attribute, function, witnessed)
    return executed


def _replace_everywhere(owner: Any, attribute: str, function: Any, witnessed: Any) -> None:
    setattr(owner, attribute, witnessed)
    if inspect.isclass(owner):
        for table in (vars(cls) for cls in _subclasses(owner)):
            for mapping in [value for value in table.values() if isinstance(value, dict)]:
                for key in [key for key, value in mapping.items() if value is function]:
                    mapping[key] = witnessed
        return
    for module in [m for name, m in sys.modules.items() if name.startswith(("distroml", "tests"))]:
        for name in [name for name, value in vars(module).items() if value is function]:
            setattr(module, name, witnessed)


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    for below in cls.__subclasses__():
        yield from _subclasses(below)


class _Witness:
    """What the test ended with."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def pytest_exception_interact(self, call: Any) -> None:
        self.error = self.error or call.excinfo.value


def _attempt(mutant: Mutant) -> tuple[bool, str]:
    witness = _Witness()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        executed: list[int] = []

        class Mutates:
            """After the collection, so that all that holds the function by name is there to be changed."""

            def pytest_collection_finish(self) -> None:
                executed.append(0)
                self.runs = apply(mutant)

        mutates = Mutates()
        code = pytest.main(
            [mutant.caught_by, "-x", "-q", "-p", "no:cacheprovider", f"--timeout={LIMIT_S:g}"],
            plugins=[witness, mutates],
        )
    if code == pytest.ExitCode.OK:
        return False, "survived"
    if code != pytest.ExitCode.TESTS_FAILED or witness.error is None:
        return False, f"the test did not run: {output.getvalue()[-600:]}"
    told = f"{type(witness.error).__name__}: {str(witness.error).splitlines()[:1]}"
    if isinstance(witness.error, _ACCIDENTS):
        return False, f"is broken itself: {told}"
    if not mutates.runs:
        return False, f"was never executed, yet: {told}"
    return True, told


def _child(mutant: Mutant, pipe: Connection) -> None:
    try:
        pipe.send(_attempt(mutant))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
    pipe.close()


def run(mutants: Iterable[Mutant], jobs: int) -> Iterator[Verdict]:
    """Verdicts in the order of the mutants; at most `jobs` processes at a time."""
    context = multiprocessing.get_context("fork")
    waiting = list(mutants)
    under_way: list[tuple[Mutant, Any, Connection]] = []
    while waiting or under_way:
        while waiting and len(under_way) < jobs:
            mutant = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(mutant, there))
            process.start()
            there.close()
            under_way.append((mutant, process, here))
        mutant, process, pipe = under_way.pop(0)
        try:
            caught, why = pipe.recv() if pipe.poll(LIMIT_S * 1.5) else (False, "did not end")
        except EOFError:
            caught, why = False, "its process died"
        if process.is_alive():
            process.join(1.0)
            process.kill()
        process.join()
        yield Verdict(mutant, caught, why)
