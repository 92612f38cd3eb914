"""Whole clusters in virtual time: directed schedules, then random faults with invariants."""

from __future__ import annotations

import pytest

from distroml.consensus.raft_types import (
    RaftSettings,
    Role,
)
from tests.consensus.nemesis import Nemesis
from tests.consensus.simulator import Cluster


def test_l1_a_divergent_follower_far_behind_catches_up() -> None:
    """The schedule that livelocked the library: a conflicting tail, and several batches missing."""
    cluster = Cluster(1, settings=RaftSettings(append_batch_bytes=4096))
    old = cluster.elect()
    cluster.isolate(old.name)
    cluster.submit(b"lost", old.name)
    cluster.run(0.02)
    assert old.raft.log.last_index > old.raft.commit_index

    def replaced() -> bool:
        leader = cluster.leader()
        return leader is not None and leader.name != old.name

    assert cluster.run_until(replaced)
    cluster.elect()
    for number in range(60):
        assert cluster.submit(b"%03d" % number + bytes(1000))
    cluster.run(1.5)
    cluster.heal()
    newest = cluster.leader()
    assert newest is not None
    assert cluster.run_until(lambda: old.raft.commit_index == newest.raft.log.last_index, 2.0)
    assert b"lost" not in old.ledger.known
    cluster.run(0.1)
    cluster.check_converged()


def test_a_partitioned_node_disturbs_nobody_when_it_returns() -> None:
    cluster = Cluster(2)
    leader = cluster.elect()
    lonely = next(name for name in cluster.names if name != leader.name)
    term = leader.raft.term
    cluster.isolate(lonely)
    cluster.run(5.0)
    cluster.heal()
    cluster.run(2.0)
    assert leader.core.role is Role.LEADER
    assert leader.raft.term == term


def test_losing_one_of_three_directories_loses_nothing() -> None:
    cluster = Cluster(3)
    leader = cluster.elect()
    for number in range(20):
        cluster.submit(b"%d" % number)
    cluster.run(0.5)
    assert len(cluster.acked) == 20
    victim, other = (name for name in cluster.names if name != leader.name)
    cluster.kill(other)
    cluster.kill(victim)
    cluster.wipe(victim)
    cluster.kill(leader.name)
    cluster.boot(victim)
    cluster.boot(other)
    cluster.run(5.0)
    assert cluster.leader() is None, "an emptied voter must not help to elect"
    cluster.boot(leader.name)
    cluster.elect()
    cluster.run(1.0)
    cluster.check_converged()
    assert cluster.nodes[victim].raft.log.proven


def test_a_leader_killed_at_any_moment_is_replaced_in_time() -> None:
    for seed in range(10):
        cluster = Cluster(seed)
        leader = cluster.elect()
        cluster.run(cluster.rng.uniform(0.1, 0.3))
        cluster.kill(leader.name)
        cluster.elect(limit_s=1.0)


def test_a_silent_leader_is_replaced_in_time() -> None:
    """No connection breaks: only heartbeats stop, as when a host freezes."""
    for seed in range(10):
        cluster = Cluster(seed)
        leader = cluster.elect()
        cluster.run(0.5)
        cluster.cut |= {(leader.name, other) for other in cluster.names}
        assert cluster.run_until(
            lambda c=cluster, old=leader: any(
                node is not old and node.core.role is Role.LEADER for node in c.nodes.values()
            ),
            2.0,
        )


SMALL = RaftSettings(
    compaction_entries=60,
    trailing_entries=20,
    snapshot_chunk_bytes=512,
    snapshot_window_chunks=4,
    append_batch_bytes=2048,
)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("size", "lossy"), [(3, False), (3, True), (5, False), (1, False), (2, True)]
)
def test_random_faults_break_no_invariant(seed: int, size: int, lossy: bool) -> None:
    cluster = Cluster(1000 + seed, size, settings=SMALL, lossy=lossy)
    nemesis = Nemesis(cluster)
    nemesis.run(12.0, settle_s=20.0)
    assert len(cluster.acked) > 50, "a run without work proves nothing"
    assert nemesis.counts["kill"] > 0
    assert sum(nemesis.counts.values()) > 5


@pytest.mark.parametrize("seed", range(4))
def test_losing_directories_one_at_a_time_breaks_no_invariant(seed: int) -> None:
    cluster = Cluster(2000 + seed, 3, settings=SMALL)
    nemesis = Nemesis(cluster, wipes=0.4)
    nemesis.run(15.0, settle_s=20.0)
    assert nemesis.counts["wipe"] > 0
    assert len(cluster.acked) > 50


def test_the_same_seed_gives_the_same_run() -> None:
    def fingerprint() -> tuple[object, ...]:
        cluster = Cluster(77, 3, settings=SMALL, lossy=True)
        Nemesis(cluster).run(6.0, settle_s=20.0)
        return (cluster.now, sorted(cluster.acked.items()), sorted(cluster.leaders.items()))

    assert fingerprint() == fingerprint()
