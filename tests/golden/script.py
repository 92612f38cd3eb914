"""A script as text: comments, commands behind `> `, and below each what it caused."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Final

from tests.golden import commands
from tests.golden.world import Violated, World

SCRIPTS: Final = Path(__file__).with_name("scripts")
NOTHING: Final = "  (nothing)"
SILENT: Final = {"voters", "given", "wipe", "draw", "quietly"}
"""Commands below which an empty line need not be called nothing."""


class BadScript(Exception):
    """A script that cannot be played to its end; names the file and the line."""

    so_far = ""


def all_scripts() -> list[Path]:
    return sorted(SCRIPTS.glob("*.txt"))


def play(text: str, name: str) -> str:
    """The script with the expectations that the product gives now.

    Raises BadScript for a line that is not understood, Violated where Raft's rules are broken.
    """
    world, lines, played = World(), [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            lines.append(line.rstrip())
        elif line.startswith("> "):
            lines.append(line)
            try:
                lines += _play_line(world, line, f"{name}:{number}")
            except BadScript as error:
                error.so_far = "\n".join(lines) + "\n"
                raise
            played += 1
        elif not played:
            raise BadScript(f"{name}:{number}: an expectation stands before any command")
    if not played:
        raise BadScript(f"{name}: there is no command, a line such as '> voters n1 n2 n3'")
    return "\n".join(lines) + "\n"


def _play_line(world: World, line: str, where: str) -> list[str]:
    world.story, words = [], line[2:].split()
    try:
        commands.run(world, words)
    except commands.BadCommand as error:
        raise BadScript(f"{where}: {line!r}: {error}") from error
    except Violated as error:
        raise Violated(f"{where}: {line!r}: {error}") from error
    return world.story or [NOTHING][: words[0] not in SILENT]


def difference(path: Path) -> str:
    """Unified diff from what the script expects to what happens; empty where they agree.

    Where it happens so differently that a command makes no sense any more, the diff ends there.
    """
    expected = path.read_text()
    try:
        actual = play(expected, path.name)
    except BadScript as error:
        actual = f"{error.so_far}!! {error}\n"
    return "".join(
        difflib.unified_diff(
            expected.splitlines(keepends=True),
            actual.splitlines(keepends=True),
            f"{path.name} expects",
            f"{path.name} as it happens",
        )
    )
