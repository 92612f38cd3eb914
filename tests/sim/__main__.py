"""`python -m tests.sim`: many seeds, with figures; the seeds that failed, shrunk, and exit status 1."""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.mutants.engine import apply
from tests.mutants.table import MUTANTS
from tests.sim.run import Result, Task, run_task, shrink

PROGRESS_EVERY_S = 30.0


def _results(tasks: list[Task], jobs: int) -> Iterator[Result]:
    if jobs == 1:
        yield from map(run_task, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=200) as pool:
        yield from pool.imap_unordered(run_task, tasks, chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults, per seed")
    parser.add_argument("--nodes", default="3,5", help="cluster sizes, in turn")
    parser.add_argument("--net", default="fifo,lossy", help="kinds of network, in turn")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=0.0, help="stop after so long; 0: never")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--shrink", type=int, default=3, help="failures to shrink, at most")
    parser.add_argument("--mutant", help="take this fix out (a name of tests/mutants/table.py)")
    given = parser.parse_args()
    sizes = [int(size) for size in given.nodes.split(",")]
    nets = given.net.split(",")
    if not set(nets) <= {"fifo", "lossy"}:
        parser.error("--net takes fifo, lossy or both")
    if given.mutant is not None:
        found = [mutant for mutant in MUTANTS if mutant.name == given.mutant]
        if not found or given.jobs != 1:
            parser.error("--mutant takes a name of tests/mutants/table.py, and one job")
        apply(found[0])
    tasks = [
        (
            seed,
            sizes[seed % len(sizes)],
            nets[seed // len(sizes) % len(nets)] == "lossy",
            given.seconds,
        )
        for seed in range(given.first, given.first + given.seeds)
    ]
    gc.freeze()  # between runs only what the run made is looked through
    failed: list[Result] = []
    total: Counter[str] = Counter()
    cpu_s, began = 0.0, time.monotonic()
    told = began
    for done, result in enumerate(_results(tasks, given.jobs), 1):
        total.update(result.figures)
        total["seeds"], total["simulated s"] = (
            done,
            total["simulated s"] + round(result.simulated_s),
        )
        cpu_s += result.cpu_s
        if result.violation:
            failed.append(result)
            print(f"FAILED seed {result.seed}: {result.violation}\n  {result.replay}", flush=True)
        now = time.monotonic()
        if now - told > PROGRESS_EVERY_S:
            told = now
            _tell(total, now - began, cpu_s, len(failed))
        if failed and given.stop:
            break
        if given.limit_s and now - began > given.limit_s:
            print(f"stopped after {now - began:.0f} s")
            break
    _tell(total, time.monotonic() - began, cpu_s, len(failed))
    for result in failed[: given.shrink]:
        print(f"shrinking seed {result.seed} of {len(result.schedule)} faults ...", flush=True)
        logging.disable(logging.CRITICAL)
        print(shrink(result, given.seconds), flush=True)
    if failed:
        print(f"{len(failed)} seeds failed: {' '.join(str(result.seed) for result in failed)}")
    return 1 if failed else 0


def _tell(total: Counter[str], wall_s: float, cpu_s: float, failed: int) -> None:
    speed, per_cpu = (
        total["simulated s"] / max(wall_s, 1e-9),
        total["simulated s"] / max(cpu_s, 1e-9),
    )
    figures = ", ".join(f"{name} {count}" for name, count in total.items())
    print(
        f"[{wall_s:.0f} s, {speed:.0f} simulated s per second, {per_cpu:.0f} per second of CPU, "
        f"{failed} failed] {figures}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
