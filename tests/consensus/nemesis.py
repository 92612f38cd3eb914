"""Random faults and clients on a simulated cluster, all drawn from the cluster's own seed."""

from __future__ import annotations

import itertools

from distroml.consensus.raft_types import Role
from tests.consensus.simulator import Cluster, SimNode


class Nemesis:
    """Random faults and clients on a `Cluster`, all drawn from the cluster's own seed."""

    def __init__(self, cluster: Cluster, *, rate: float = 30.0, wipes: float = 0.0) -> None:
        self.cluster, self.rate, self.wipes = cluster, rate, wipes
        self.counts = {"kill": 0, "cut": 0, "reset": 0, "compact": 0, "transfer": 0, "wipe": 0}
        self._operations = itertools.count(1)
        self._active = True

    def run(self, seconds: float, settle_s: float = 8.0) -> None:
        cluster = self.cluster
        cluster.later(0.5, self._client)
        cluster.later(1.5, self._strike)
        cluster.run(seconds)
        self._active = False
        for name in cluster.names:
            if name not in cluster.nodes:
                cluster.boot(name)
        cluster.heal()

        def converged() -> bool:
            leader = cluster.leader()
            return (
                leader is not None
                and leader.raft.commit_index == leader.raft.log.last_index
                and all(
                    n.raft.applied_index == leader.raft.commit_index for n in cluster.nodes.values()
                )
            )

        assert cluster.run_until(converged, settle_s), f"no convergence within {settle_s} s"
        cluster.run(0.2)
        cluster.check_converged()

    def _client(self) -> None:
        if not self._active:
            return
        cluster, rng = self.cluster, self.cluster.rng
        cluster.later(rng.expovariate(self.rate), self._client)
        entry = b"op-%d" % next(self._operations)
        names = [n.name for n in cluster.nodes.values() if n.core.role is Role.LEADER]
        if names:
            cluster.submit(entry, rng.choice(names))
        if cluster.nodes and rng.random() < 0.3:
            cluster.read(rng.choice(sorted(cluster.nodes)))

    def _strike(self) -> None:
        if not self._active:
            return
        cluster, rng = self.cluster, self.cluster.rng
        kind = rng.random()
        alone = len(cluster.names) == 1
        if kind < 0.4:
            self._kill_some()
        elif kind < 0.7 and not alone:
            self._cut_some()
        elif kind < 0.85 and not alone:
            self.counts["reset"] += 1
            one, other = rng.sample(cluster.names, 2)
            cluster.disconnect(one, other)
            cluster.later(rng.choice([0.0005, 0.1, 0.5]), lambda: self._reconnect(one, other))
        elif kind < 0.93:
            leader = cluster.leader()
            if leader is not None:
                self.counts["transfer"] += 1
                cluster.give(leader, lambda: _transfer(leader))
                cluster.later(0.5, lambda: cluster.give(leader, leader.core.cancel_transfer))
        elif cluster.nodes:
            self.counts["compact"] += 1
            node = cluster.nodes[rng.choice(sorted(cluster.nodes))]
            cluster.give(node, lambda: _compact(node))
        cluster.later(rng.expovariate(1.5), self._strike)

    def _kill_some(self) -> None:
        cluster, rng = self.cluster, self.cluster.rng
        size = len(cluster.names)
        for name in rng.sample(cluster.names, min(size, rng.choice([1, 1, 1, 2, size]))):
            if name in cluster.nodes:
                self.counts["kill"] += 1
                # Anywhere between two events: mid-sync as well as mid-flight.
                cluster.later(rng.uniform(0, 0.01), lambda name=name: self._kill(name))

    def _kill(self, name: str) -> None:
        cluster = self.cluster
        if name in cluster.nodes and self._active:
            cluster.kill(name)
            if cluster.rng.random() < self.wipes and self._all_proven():
                self.counts["wipe"] += 1
                cluster.wipe(name)
            cluster.later(cluster.rng.uniform(0.05, 2.0), lambda: self._revive(name))

    def _all_proven(self) -> bool:
        """At most one directory is lost at a time: the next only when the last has caught up."""
        images = [disk.image for disk in self.cluster.disks.values()]
        return all(image is not None and image.proven for image in images)

    def _revive(self, name: str) -> None:
        if name not in self.cluster.nodes:
            self.cluster.boot(name)

    def _reconnect(self, one: str, other: str) -> None:
        if one in self.cluster.nodes and other in self.cluster.nodes:
            self.cluster.connect(one, other)

    def _cut_some(self) -> None:
        self.counts["cut"] += 1
        cluster, rng = self.cluster, self.cluster.rng
        if rng.random() < 0.6:
            side = set(rng.sample(cluster.names, rng.randint(1, len(cluster.names) - 1)))
            pairs = [
                (a, b) for a in cluster.names for b in cluster.names if (a in side) != (b in side)
            ]
        else:
            one, other = rng.sample(cluster.names, 2)
            pairs = [(one, other)] if rng.random() < 0.5 else [(one, other), (other, one)]
        cluster.cut |= set(pairs)
        if rng.random() < 0.5:
            for one, other in pairs:
                cluster.disconnect(one, other)
        cluster.later(
            rng.choice([0.2, 0.8, 2.0]) * rng.uniform(0.5, 1.5), lambda: self._mend(pairs)
        )

    def _mend(self, pairs: list[tuple[str, str]]) -> None:
        self.cluster.cut -= set(pairs)
        for one, other in pairs:
            self._reconnect(one, other)


def _transfer(node: SimNode) -> None:
    if node.core.role is Role.LEADER:
        node.core.transfer(None)


def _compact(node: SimNode) -> None:
    raft = node.raft
    if raft.applied_index > (raft.snapshot.index if raft.snapshot else 1):
        raft.compact()
