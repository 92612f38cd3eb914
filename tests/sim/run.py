"""One seed from start to verdict: configuration, faults, quiet, convergence. And shrinking a failure."""

from __future__ import annotations

import gc
import logging
import random
import re
import time

import msgspec

from tests.sim.cluster import Cluster, Config
from tests.sim.faults import Fault, Nemesis, plan
from tests.sim.workload import Workload
from tests.sim.world import START_S, Violated

LEADER_WITHIN_S = 6.0
CONVERGED_WITHIN_S = 25.0
"""After the last fault; includes back-off of reconnects, idle timeouts and clients' own timeouts."""
READ_WITHIN_S = 15.0
"""All nodes' last reads together; a lossy network may hold several elections meanwhile."""
READ_PAUSE_S = 0.1
SHRINK_RUNS = 200
SIMPLER = {"power": False, "one_way": False, "after": False, "count": 1, "for_s": 0.5}
"""What a fault is tried with instead, to see what of it matters."""
Task = tuple[int, int, bool, float]
"""(seed, voters, lossy, seconds of faults)"""


class Result(msgspec.Struct):
    """What came of one seed."""

    seed: int
    config: Config
    violation: str
    """Empty if all invariants held."""
    where: dict[str, str]
    schedule: list[Fault]
    fingerprint: int
    seconds: float
    """Of faults, as asked for."""
    simulated_s: float
    cpu_s: float
    figures: dict[str, int]

    @property
    def replay(self) -> str:
        """The command that runs the whole schedule of this seed again."""
        net = "lossy" if self.config.lossy else "fifo"
        options = f"--first {self.seed} --seeds 1 --nodes {self.config.nodes} --net {net}"
        return f"python -m tests.sim {options} --seconds {self.seconds:g}"

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.config}", f"  violation: {self.violation or 'none'}"]
        lines.append(f"  replay: {self.replay}")
        lines += [f"  {name}: {state}" for name, state in self.where.items()]
        lines += [f"  {fault}" for fault in self.schedule]
        return "\n".join(lines)


def draw_config(seed: int, nodes: int, *, lossy: bool) -> Config:
    """Sizes small enough that a minute meets compaction, snapshots and full windows many times."""
    rng = random.Random(f"{seed}/config")
    return Config(
        nodes=nodes,
        learners=rng.choice((0, 0, 0, 1, 2)),
        lossy=lossy,
        compaction_entries=rng.choice((10, 25, 60)),
        trailing_entries=rng.choice((0, 5, 30)),
        snapshot_chunk_bytes=rng.choice((512, 2048, 16384)),
        append_batch_bytes=rng.choice((256, 2048, 65536)),
        inflight_entries=rng.choice((4, 64)),
        disk_s=rng.choice((0.0003, 0.003)),
        poll_s=rng.choice((0.0, 0.002, 0.005)),
        keyed=rng.random() < 0.1,
        rate=rng.choice((2.0, 4.0, 8.0)),
    )


def run(seed: int, config: Config, seconds: float, schedule: list[Fault] | None = None) -> Result:
    """Runs one seed for `seconds` of faults and what it then needs to come to rest."""
    schedule = plan(seed, config, seconds) if schedule is None else schedule
    began = time.process_time()
    collecting = gc.isenabled()
    gc.disable()  # garbage is collected between runs: that is faster, and its instant cannot matter
    try:
        cluster = Cluster(seed, config)
        workload = Workload(cluster, config.rate)
        nemesis = Nemesis(cluster, schedule)
        violation = ""
        try:
            _drive(cluster, workload, nemesis, seconds)
        except Violated as violated:
            violation = str(violated)
        world = cluster.world
        return Result(
            seed=seed,
            config=config,
            violation=violation,
            where=cluster.describe() if violation else {},
            schedule=schedule,
            fingerprint=world.fingerprint,
            seconds=seconds,
            simulated_s=world.now - START_S,
            cpu_s=time.process_time() - began,
            figures={
                **workload.counts,
                **cluster.checker.counts,
                **cluster.counts,
                **nemesis.counts,
                "turns": cluster.checker.turns,
                "events": world.events,
                "committed": len(cluster.checker.committed),
            },
        )
    finally:
        if collecting:
            gc.enable()
        gc.collect()


def run_task(task: Task) -> Result:
    """`run` of one task, in a process of its own; what the product logs there is of no interest."""
    logging.disable(logging.CRITICAL)
    seed, nodes, lossy, seconds = task
    return run(seed, draw_config(seed, nodes, lossy=lossy), seconds)


def _drive(cluster: Cluster, workload: Workload, nemesis: Nemesis, seconds: float) -> None:
    world = cluster.world
    world.run(seconds)
    nemesis.stop()
    if not world.run_until(lambda: cluster.leader() is not None, LEADER_WITHIN_S):
        world.violate(f"no leader {LEADER_WITHIN_S} s after all faults ended")
    workload.active = False
    if not world.run_until(lambda: workload.idle and cluster.settled(), CONVERGED_WITHIN_S):
        world.violate(f"not converged {CONVERGED_WITHIN_S} s after all faults ended")
        world.run(0)
    cluster.checker.check_converged()
    _read_everywhere(cluster, workload)


def _read_everywhere(cluster: Cluster, workload: Workload) -> None:
    """Every node answers a read; while an election goes on it may have to be asked again."""
    world, deadline = cluster.world, cluster.world.now + READ_WITHIN_S
    for name in cluster.names:
        before = workload.counts["reads"]
        while workload.counts["reads"] == before:
            if world.now > deadline:
                world.violate(f"{name}: no read was answered on a healthy cluster")
            workload.read(cluster.processes[name])
            if not world.run_until(lambda: workload.idle, 4.0):
                world.violate("a last read found no answer")
            world.run(READ_PAUSE_S)


def shrink(result: Result, seconds: float) -> Result:
    """The same failure with fewer and simpler faults.

    First halves, then quarters, down to single faults are left out; then each that is left is made simpler. An
    attempt counts only where it breaks the same invariant.
    """
    shrinker = _Shrinker(result, seconds)
    shrinker.leave_out()
    for place in range(len(shrinker.best.schedule)):
        for field, value in SIMPLER.items():
            shrinker.simplify(place, field, value)
    return shrinker.best


class _Shrinker:
    def __init__(self, result: Result, seconds: float) -> None:
        self.best, self.seconds, self.runs = result, seconds, 0
        self._kind = kind_of(result.violation)

    def leave_out(self) -> None:
        size = max(1, len(self.best.schedule) // 2)
        while True:
            start, smaller = 0, False
            while start < len(self.best.schedule):
                schedule = self.best.schedule
                if self._fails(schedule[:start] + schedule[start + size :]):
                    smaller = True
                else:
                    start += size
            if size == 1 and not smaller:
                return
            size = max(1, size // 2)

    def simplify(self, place: int, field: str, value: object) -> None:
        schedule = list(self.best.schedule)
        if getattr(schedule[place], field) != value:
            schedule[place] = msgspec.structs.replace(schedule[place], **{field: value})
            self._fails(schedule)

    def _fails(self, schedule: list[Fault]) -> bool:
        if self.runs == SHRINK_RUNS or schedule == self.best.schedule:
            return False
        self.runs += 1
        attempt = run(self.best.seed, self.best.config, self.seconds, schedule)
        if kind_of(attempt.violation) != self._kind:
            return False
        self.best = attempt
        return True


def kind_of(violation: str) -> str:
    """A violation without its numbers and names: which invariant it breaks."""
    return " ".join(re.findall(r"[a-z]{3,}", violation))
