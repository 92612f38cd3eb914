"""`python -m tests.soak`: random fault schedules against jobs on three real nodes; the bits must stay the same.

Each seed is a schedule. Those that failed are printed with their seed, what differed and the nodes' logs; exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from distroml.local_cluster import LocalCluster
from tests.soak.play import Bits, digits_job, play, until_warm
from tests.soak.schedules import draw

STEPS = 200
LAST_FAULT_STEP = 150
NODES, SLOTS = 3, 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, help="of the first schedule; by default a random one")
    parser.add_argument("--limit-s", type=float, default=0.0, help="stop after so long; 0: never")
    given = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    return asyncio.run(_soak(range(first, first + given.schedules), given.limit_s))


async def _soak(seeds: range, limit_s: float) -> int:
    began, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="dml-soak-") as place:
        expected = await _undisturbed(Path(place))
        for seed in seeds:
            if limit_s and time.monotonic() - began > limit_s:
                break
            schedule = draw(seed, LAST_FAULT_STEP)
            told = f"seed {seed}: {'; '.join(map(str, schedule))}"
            took = time.monotonic()
            async with LocalCluster(Path(place, str(seed)), nodes=NODES, slots=SLOTS) as cluster:
                await until_warm(cluster)
                try:
                    played = await play(cluster, digits_job(steps=STEPS), schedule)
                    wrong = expected.differences(played.bits)
                    incidents = len(played.incidents)
                except Exception as error:  # the other schedules are still worth their time
                    wrong, incidents = [f"{type(error).__name__}: {error}"], 0
                logs = cluster.log_tails() if wrong else ""
            print(f"{told}: {incidents} incidents, {time.monotonic() - took:.1f} s", flush=True)
            if wrong:
                failed.append(seed)
                print(f"FAILED {told}\n  " + "\n  ".join(wrong) + f"\n{logs}", flush=True)
    print(f"{len(failed)} failed{': ' if failed else ''}{', '.join(map(str, failed))}")
    return 1 if failed else 0


async def _undisturbed(place: Path) -> Bits:
    async with LocalCluster(place / "undisturbed", nodes=NODES, slots=SLOTS) as cluster:
        await until_warm(cluster)
        return (await play(cluster, digits_job(steps=STEPS))).bits


if __name__ == "__main__":
    sys.exit(main())
