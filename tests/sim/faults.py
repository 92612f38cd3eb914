"""The schedule of faults of one run: plain data drawn from the seed, so that it can be printed and shrunk.

`plan` draws it, `Nemesis` carries it out. Random numbers that a fault needs later (how much of an unsynced write
survives) come from a stream of its own number, so removing one fault leaves the others as they were.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import ClassVar

import msgspec

from tests.sim.cluster import Cluster, Config
from tests.sim.disk import Failpoint
from tests.sim.world import START_S

_OF_TWO = ("partition", "link", "isolate", "reset", "slow_link")
LEADER = "leader"
"""In place of a node's name: whoever leads when the fault comes."""
FAULTS_PER_S = 0.8
FIRST_S = 1.0
DISK_CALLS = ("write", "sync", "replace", "sync_directory", "remove", "open_append", "truncate")
PROCESS_CALLS = ("send", "apply", "snapshot", "restore")
"""Instructions between which a process dies, beside its calls of the disk (`process.Process.passes`)."""
DISK_ERRORS = ("sync", "sync", "sync_directory", "replace", "write")
_WEIGHTS = {
    "kill": 6,
    "failpoint": 6,
    "kill_all": 1,
    "pause": 3,
    "partition": 3,
    "link": 3,
    "isolate": 3,
    "reset": 3,
    "slow_link": 1,
    "skew": 1,
    "disk_full": 2,
    "disk_error": 2,
    "disk_slow": 1,
    "wipe": 1,
    "compact": 1,
}


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    number: int
    at: float
    """Seconds since the start of the run."""
    kind: str
    node: str = ""
    for_s: float = 0.0
    others: tuple[str, ...] = ()
    one_way: bool = False
    power: bool = False
    """A crash of the host: unsynced bytes and renames are lost."""
    call: str = ""
    after: bool = False
    count: int = 1
    value: float = 0.0


def plan(seed: int, config: Config, seconds: float, only: tuple[str, ...] = ()) -> list[Fault]:
    """The faults of one run. Each seed leaves out some kinds, so that the rest meet more often; `only` says which
    there are, each as often as the others."""
    rng = random.Random(f"{seed}/faults")
    names = [f"n{place}" for place in range(config.nodes)]
    names += [f"x{place}" for place in range(config.learners)]
    kinds = [kind for kind in _WEIGHTS if rng.random() < 0.65] or ["kill"]
    if config.nodes < 3:
        # One or two voters need all that each of them has.
        kinds = [kind for kind in kinds if kind != "wipe"] or ["kill"]
    if len(names) == 1:
        kinds = [kind for kind in kinds if kind not in _OF_TWO] or ["kill"]
    rate = FAULTS_PER_S * rng.choice((0.5, 1.0, 2.0))
    faults: list[Fault] = []
    at = FIRST_S
    while (at := at + rng.expovariate(rate)) < seconds:
        kind = rng.choices(only or kinds, None if only else [_WEIGHTS[kind] for kind in kinds])[0]
        faults.append(_draw(rng, len(faults), round(at, 4), kind, names))
    return faults


def _draw(rng: random.Random, number: int, at: float, kind: str, names: list[str]) -> Fault:
    node = LEADER if rng.random() < 0.4 else rng.choice(names)
    fault = Fault(
        number,
        at,
        kind,
        node=node,
        for_s=round(rng.choice((0.05, 0.4, 1.0, 2.5)) * rng.uniform(0.5, 1.5), 4),
        one_way=rng.random() < 0.4,
        power=rng.random() < 0.6,
    )
    match kind:
        case "failpoint":
            return msgspec.structs.replace(
                fault,
                call=rng.choice((*DISK_CALLS, *PROCESS_CALLS, "write", "sync", "send")),
                after=rng.random() < 0.5,
                count=rng.choice((1, 1, 2, 3)),
            )
        case "partition":
            side = rng.sample(names, rng.randint(1, len(names) - 1))
            return msgspec.structs.replace(fault, node="", others=tuple(sorted(side)))
        case "link" | "reset" | "slow_link":
            pair = tuple(rng.sample(names, 2))
            return msgspec.structs.replace(
                fault, node="", others=pair, value=round(rng.uniform(0.02, 0.4), 3)
            )
        case "skew":
            return msgspec.structs.replace(
                fault, value=round(rng.uniform(0.75, 1.3), 3), for_s=10.0
            )
        case "disk_slow":
            return msgspec.structs.replace(fault, value=rng.choice((0.02, 0.2, 1.5)))
        case "disk_error":
            return msgspec.structs.replace(fault, call=rng.choice(DISK_ERRORS))
        case "kill_all":
            return msgspec.structs.replace(fault, node="")
        case "wipe":
            return msgspec.structs.replace(fault, node=rng.choice(names))
        case _:
            return fault


class Nemesis:
    """Carries a schedule out on a cluster."""

    def __init__(self, cluster: Cluster, schedule: list[Fault]) -> None:
        self.cluster = cluster
        self.counts: dict[str, int] = {}
        self._over = False
        for fault in schedule:
            cluster.world.at(START_S + fault.at, self._strike, fault)

    def stop(self) -> None:
        """All faults end now, whatever was meant to go on."""
        self._over = True
        self.cluster.heal()

    def _strike(self, fault: Fault) -> None:
        if self._over:
            return
        name = fault.node
        if name == LEADER:
            leader = self.cluster.leader()
            if leader is None:
                return
            name = leader.name
        self.counts[fault.kind] = self.counts.get(fault.kind, 0) + 1
        self.cluster.world.note(5, fault.number)
        self._KINDS[fault.kind](self, fault, name)

    def _later(self, delay_s: float, action: Callable[[], object]) -> None:
        def unless_over() -> None:
            if not self._over:
                action()

        self.cluster.world.later(delay_s, unless_over)

    def _rng(self, fault: Fault) -> random.Random:
        return self.cluster.world.stream("fault", fault.number)

    # ------------------------------------------------------------------ processes

    def _kill(self, fault: Fault, name: str) -> None:
        if name in self.cluster.processes:
            self.cluster.kill(name, power=fault.power, rng=self._rng(fault))
            self._later(fault.for_s, lambda: self.cluster.revive(name))

    def _kill_all(self, fault: Fault, _name: str) -> None:
        rng = self._rng(fault)
        for name in sorted(self.cluster.processes):
            self.cluster.kill(name, power=fault.power, rng=rng)
            self._later(fault.for_s * rng.random(), lambda name=name: self.cluster.revive(name))  # type: ignore[misc]

    def _failpoint(self, fault: Fault, name: str) -> None:
        """The process dies in the middle of the disk operations that follow, then comes back."""
        disk, cluster = self.cluster.disks[name], self.cluster
        disk.failpoint = Failpoint(fault.call, after=fault.after, count=fault.count)
        self._later(0.001, lambda: self._await_failpoint(fault, name, disk.failpoint, 0))
        if name not in cluster.processes:
            disk.failpoint = None

    def _await_failpoint(
        self, fault: Fault, name: str, point: Failpoint | None, polls: int
    ) -> None:
        disk, cluster = self.cluster.disks[name], self.cluster
        if name not in cluster.processes:
            if fault.power:
                disk.lose_power(self._rng(fault))
            self._later(fault.for_s, lambda: cluster.revive(name))
        elif polls < 60 and disk.failpoint is point:
            self._later(0.05, lambda: self._await_failpoint(fault, name, point, polls + 1))
        elif disk.failpoint is point:
            disk.failpoint = None

    def _pause(self, fault: Fault, name: str) -> None:
        process = self.cluster.processes.get(name)
        if process is not None:
            process.loop.pause()
            self._later(fault.for_s, process.loop.resume)

    def _skew(self, fault: Fault, name: str) -> None:
        self._set_rate(name, fault.value)
        self._later(fault.for_s, lambda: self._set_rate(name, 1.0))

    def _set_rate(self, name: str, rate: float) -> None:
        self.cluster.rates[name] = rate
        process = self.cluster.processes.get(name)
        if process is not None:
            process.loop.set_rate(rate)

    def _wipe(self, fault: Fault, name: str) -> None:
        """A directory is lost: of the voters' a minority at a time, whatever the others are doing. A lost one counts
        until the voter is proven."""
        cluster = self.cluster
        if name in cluster.voters:
            lost = set(cluster.checker.lost) | {name}
            if len(lost) > (len(cluster.voters) - 1) // 2:
                return
        if name in cluster.processes:
            cluster.kill(name, rng=self._rng(fault))
        cluster.wipe(name)
        self.counts["wiped"] = self.counts.get("wiped", 0) + 1
        self._later(fault.for_s, lambda: cluster.revive(name))

    def _compact(self, _fault: Fault, name: str) -> None:
        process = self.cluster.processes.get(name)
        if process is not None and process.started:
            process.compact()

    # ------------------------------------------------------------------ the network

    def _partition(self, fault: Fault, _name: str) -> None:
        rest = [name for name in self.cluster.names if name not in fault.others]
        pairs = [(one, other) for one in fault.others for other in rest]
        self._cut(fault, pairs)

    def _link(self, fault: Fault, _name: str) -> None:
        self._cut(fault, [(fault.others[0], fault.others[1])])

    def _isolate(self, fault: Fault, name: str) -> None:
        self._cut(fault, [(name, other) for other in self.cluster.names if other != name])

    def _cut(self, fault: Fault, pairs: list[tuple[str, str]]) -> None:
        if not fault.one_way:
            pairs = pairs + [(other, one) for one, other in pairs]
        cuts = self.cluster.cuts
        for pair in pairs:
            cuts.cut(*pair)
        if fault.power:  # the break is noticed: connections are reset as well
            for pair in pairs:
                self.cluster.network.reset(*pair)
        self._later(fault.for_s, lambda: [cuts.mend(*pair) for pair in pairs])

    def _reset(self, fault: Fault, _name: str) -> None:
        self.cluster.network.reset(*fault.others)

    def _slow_link(self, fault: Fault, _name: str) -> None:
        pair, slow = (fault.others[0], fault.others[1]), self.cluster.cuts.slow_s
        slow[pair] = fault.value
        self._later(fault.for_s, lambda: slow.pop(pair, None))

    # ------------------------------------------------------------------ disks

    def _disk_full(self, fault: Fault, name: str) -> None:
        self._disk_fails(fault, name, ("write", "open_append"), errno.ENOSPC)

    def _disk_error(self, fault: Fault, name: str) -> None:
        self._disk_fails(fault, name, (fault.call,), errno.EIO)

    def _disk_fails(self, fault: Fault, name: str, calls: tuple[str, ...], number: int) -> None:
        fail = self.cluster.disks[name].fail
        for call in calls:
            fail[call] = number
            self._later(fault.for_s, lambda call=call: fail.pop(call, None))  # type: ignore[misc]

    def _disk_slow(self, fault: Fault, name: str) -> None:
        slow = self.cluster.slow_disk_s
        slow[name] = fault.value
        self._later(fault.for_s, lambda: slow.pop(name, None))

    _KINDS: ClassVar[dict[str, Callable[[Nemesis, Fault, str], None]]] = {}


Nemesis._KINDS.update(
    kill=Nemesis._kill,
    failpoint=Nemesis._failpoint,
    kill_all=Nemesis._kill_all,
    pause=Nemesis._pause,
    partition=Nemesis._partition,
    link=Nemesis._link,
    isolate=Nemesis._isolate,
    reset=Nemesis._reset,
    slow_link=Nemesis._slow_link,
    skew=Nemesis._skew,
    disk_full=Nemesis._disk_full,
    disk_error=Nemesis._disk_error,
    disk_slow=Nemesis._disk_slow,
    wipe=Nemesis._wipe,
    compact=Nemesis._compact,
)
