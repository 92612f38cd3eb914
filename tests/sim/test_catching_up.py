"""Followers that need a snapshot get it, however busy or bad the way to them is."""

from __future__ import annotations

import pytest

from distroml.consensus.snapshot import STALL_S
from tests.sim.cluster import Cluster, Config
from tests.sim.process import Process
from tests.sim.workload import Workload


def _loses_its_directory(cluster: Cluster) -> str:
    name = cluster.followers()[0].name
    cluster.kill(name)
    cluster.wipe(name)
    return name


def _has_a_snapshot(process: Process) -> bool:
    return process.started and process.core.raft.snapshot is not None


def test_a_snapshot_arrives_although_the_leader_compacts_faster_than_it_travels() -> None:
    config = Config(
        compaction_entries=10,
        trailing_entries=0,
        snapshot_chunk_bytes=512,
        rate=20.0,
    )
    cluster = Cluster(1, config)
    cluster.elect()
    workload = Workload(cluster, config.rate, steady=True)
    cluster.world.run(30.0)
    name = _loses_its_directory(cluster)
    for other in cluster.voters:  # whoever leads by then
        cluster.cuts.slow_s[other, name] = cluster.cuts.slow_s[name, other] = 0.1
    process = cluster.boot(name)
    assert workload.active
    assert cluster.world.run_until(lambda: _has_a_snapshot(process), 8.0), cluster.describe()


@pytest.mark.parametrize("seed", range(3))
def test_lost_and_overtaken_chunks_do_not_cost_a_stall_each(seed: int) -> None:
    config = Config(lossy=True, compaction_entries=10, trailing_entries=0, snapshot_chunk_bytes=64)
    cluster = Cluster(seed, config)
    cluster.elect()
    workload = Workload(cluster, 20.0, steady=True)
    cluster.world.run(30.0)
    workload.active = False
    process = cluster.boot(_loses_its_directory(cluster))
    snapshot = cluster.elect().core.raft.snapshot
    assert snapshot is not None
    chunks = len(snapshot.blob) // config.snapshot_chunk_bytes
    assert chunks > 200
    windows = chunks / cluster.settings.snapshot_window_chunks
    limit_s = windows * STALL_S / 3
    assert cluster.world.run_until(lambda: _has_a_snapshot(process), limit_s), cluster.describe()
