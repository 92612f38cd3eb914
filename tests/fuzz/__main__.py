"""`python -m tests.fuzz [TARGET...] [--minutes N]`: fuzzes for a while, guided by coverage where atheris is there."""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time

from tests.fuzz import guided
from tests.fuzz.driver import TARGETS, Find, keep, peak_bytes, run

ADDRESS_SPACE_BYTES = 4 * 1024**3
"""An allocation beyond this fails at once instead of taking the machine with it."""
ROUND = 5_000
"""Inputs of a target before the next has its turn."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=5.0, help="in all (default: 5)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument(
        "--mutations", action="store_true", help="without atheris, though it is there"
    )
    asked = parser.parse_args()
    if unknown := set(asked.targets) - TARGETS.keys():
        parser.error(
            f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}"
        )
    names = asked.targets or list(TARGETS)
    logging.disable(logging.CRITICAL)
    if not asked.mutations and guided.available():
        return guided.fuzz_each(names, asked.minutes * 60 / len(names), asked.seed)
    if not asked.mutations:
        print(
            "atheris is not installed: mutating without the guidance of coverage. For that: "
            "pip install -c constraints.txt '.[fuzz]' (Linux, Python 3.11 or newer)",
            file=sys.stderr,
        )
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    return _mutate(names, asked.minutes * 60, asked.seed)


def _mutate(names: list[str], limit_s: float, seed: int) -> int:
    inputs, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    end, finds, seed_now = time.monotonic() + limit_s, 0, seed
    while time.monotonic() < end and names:
        for name in list(names):
            try:
                ran = run(TARGETS[name], ROUND, seed_now)
            except Find as find:
                print(f"seed {seed_now}: {find}\n  kept as {keep(find)}", flush=True)
                finds += 1
                names.remove(name)
                continue
            inputs[name] += ran.inputs
            seconds[name] += ran.seconds
            if time.monotonic() > end:
                break
        seed_now += 1
    for name, count in inputs.items():
        print(f"{name:20} {count:>10} inputs {count / max(seconds[name], 1e-9):>9.0f} /s")
    print(
        f"{sum(inputs.values())} inputs from seed {seed}, {finds} finds, peak {peak_bytes() >> 20} MiB"
    )
    return 1 if finds else 0


if __name__ == "__main__":
    raise SystemExit(main())
