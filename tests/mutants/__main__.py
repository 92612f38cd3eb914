"""`python -m tests.mutants [NAME ...]`: runs all mutants or the named ones; status 1 if one survives."""

from __future__ import annotations

import argparse
import os
import sys

from tests.mutants.engine import run
from tests.mutants.table import MUTANTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; all by default")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true", help="only say what there is")
    given = parser.parse_args()
    if unknown := set(given.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not given.names or mutant.name in given.names]
    if given.list:
        for mutant in chosen:
            print(f"{mutant.name:40} {mutant.hazard:4} {mutant.breaks}")
        return 0
    survivors = 0
    for verdict in run(chosen, given.jobs):
        survivors += not verdict.caught
        word = "caught  " if verdict.caught else "SURVIVED"
        print(f"{word} {verdict.mutant.name:40} {verdict.why[:300]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
