"""`python -m tests.golden [--rewrite] [NAME...]`: plays the scripts and shows or writes what differs."""

from __future__ import annotations

import argparse
import sys

from tests.golden.commands import COMMANDS
from tests.golden.script import BadScript, all_scripts, difference, play
from tests.golden.world import Violated


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Plays golden scripts.",
        epilog="Commands of a script:\n  "
        + "\n  ".join(str(command.__doc__) for command in COMMANDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="scripts without .txt; default: all")
    parser.add_argument("--rewrite", action="store_true", help="write what happens into the files")
    asked = parser.parse_args()
    paths = [path for path in all_scripts() if not asked.names or path.stem in asked.names]
    if unknown := set(asked.names) - {path.stem for path in paths}:
        parser.error(f"no such script: {', '.join(sorted(unknown))}")
    failed = 0
    for path in paths:
        try:
            changed = difference(path)
            if changed and asked.rewrite:
                path.write_text(play(path.read_text(), path.name))
        except (BadScript, Violated) as error:
            changed = f"{type(error).__name__}: {error}\n"
            failed += asked.rewrite
        failed += bool(changed) and not asked.rewrite
        sys.stdout.write(changed)
    print(f"{len(paths)} scripts, {failed} {'failed' if failed else 'as expected'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
