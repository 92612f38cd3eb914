"""Directed schedules on whole clusters: what random faults would meet too rarely, or could not judge."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from distroml.commands import SubmitJob
from distroml.consensus.raft_types import NotLeader
from distroml.errors import DistroMLError
from distroml.spec import JobSpec
from tests.sim.cluster import Cluster, Config
from tests.sim.faults import Fault, plan
from tests.sim.process import Process
from tests.sim.run import draw_config, run

PROPOSED_S = 10.0


def elected(seed: int = 1, **config: Any) -> tuple[Cluster, Process]:
    """A cluster whose nodes are all registered, and its leader."""
    cluster = Cluster(seed, Config(**config))
    cluster.elect()
    processes = cluster.processes.values()
    assert cluster.world.run_until(lambda: all(p.registered for p in processes), 5.0)
    leader = cluster.leader()
    assert leader is not None
    return cluster, leader


def submit(process: Process, name: str, size_bytes: int = 10) -> None:
    """A job whose entry in the log has about that many bytes; what comes of it is told by the state."""
    command = SubmitJob(
        key=name, request_sha256="x" * size_bytes, job_id=name, run_id=f"run-{name}", spec=JobSpec()
    )

    async def propose() -> None:
        try:
            await process.proposer.propose(command, PROPOSED_S)
        except DistroMLError:
            return

    process.do(lambda: process.spawn(propose()))


def cut_off(cluster: Cluster, *names: str) -> None:
    """Nothing comes from or to `names`, and all notice."""
    cluster.isolate(*names)
    for name in names:
        for other in cluster.names:
            if other not in names:
                cluster.network.reset(name, other)


def converge(cluster: Cluster) -> None:
    assert cluster.world.run_until(cluster.settled, 15.0), cluster.describe()
    cluster.checker.check_converged()
    cluster.world.run(0.0)


def test_l1_a_divergent_follower_far_behind_catches_up() -> None:
    """The schedule that livelocked the library: a conflicting tail, and several batches missing."""
    cluster, old = elected(append_batch_bytes=4096, compaction_entries=1000)
    cut_off(cluster, old.name)
    submit(old, "lost")
    cluster.world.run(0.02)
    assert old.raft.is_leader
    assert old.log.last_index > old.raft.commit_index

    def replaced() -> bool:
        leader = cluster.leader()
        return leader is not None and leader is not old

    assert cluster.world.run_until(replaced, 5.0)
    cluster.elect()
    newest = cluster.leader()
    assert newest is not None
    for number in range(60):
        submit(newest, f"job-{number}", 1000)
    cluster.world.run(1.5)
    cluster.heal()
    converge(cluster)
    assert len(old.replica.state.jobs) >= 60


def test_a_partitioned_node_disturbs_nobody_when_it_returns() -> None:
    cluster, leader = elected()
    term = leader.raft.term
    cut_off(cluster, cluster.followers()[0].name)
    cluster.world.run(5.0)
    cluster.heal()
    cluster.world.run(3.0)
    assert leader.raft.is_leader
    assert leader.raft.term == term
    converge(cluster)


def test_losing_one_of_three_directories_loses_nothing() -> None:
    cluster, leader = elected()
    for number in range(20):
        submit(leader, f"job-{number}")
    cluster.world.run(0.5)
    assert len(leader.replica.state.jobs) == 20
    other, victim = (follower.name for follower in cluster.followers())
    for name in (other, victim, leader.name):
        cluster.kill(name)
    cluster.wipe(victim)
    for name in (victim, other):
        cluster.boot(name)
    cluster.world.run(5.0)
    assert cluster.leader() is None, "an emptied voter must not help to elect"
    cluster.boot(leader.name)
    converge(cluster)
    assert len(cluster.processes[victim].replica.state.jobs) == 20
    assert cluster.processes[victim].log.proven


@pytest.mark.parametrize("seed", range(4))
def test_losing_directories_one_at_a_time_breaks_no_invariant(seed: int) -> None:
    config = draw_config(2000 + seed, 3, lossy=seed % 2 == 1)
    schedule = [
        Fault(number, 2.0 + 3.0 * number, "wipe", node=f"n{(seed + number) % 3}", for_s=0.4)
        for number in range(10)
    ]
    result = run(2000 + seed, config, 35.0, schedule)
    assert result.violation == ""
    assert result.figures["wiped"] > 3


@pytest.mark.parametrize("seed", range(6))
def test_losing_directories_amid_other_faults_breaks_no_invariant(seed: int) -> None:
    config = draw_config(seed, (3, 5)[seed % 2], lossy=seed % 3 == 1)
    schedule = plan(seed, config, 30.0, only=("wipe", "kill", "isolate", "pause"))
    result = run(seed, config, 30.0, schedule)
    assert result.violation == ""
    assert result.figures["wiped"] > 0


@pytest.mark.parametrize("seed", range(10))
def test_a_leader_killed_at_any_moment_is_replaced_in_time(seed: int) -> None:
    cluster, leader = elected(seed)
    cluster.world.run(0.1 + 0.02 * seed)
    cluster.kill(leader.name)
    cluster.elect(limit_s=1.0)


@pytest.mark.parametrize("seed", range(10))
def test_a_silent_leader_is_replaced_in_time(seed: int) -> None:
    """No connection breaks: only what it sends is lost, as when a host freezes."""
    cluster, leader = elected(seed)
    cluster.isolate(leader.name, inward=False)
    others = cluster.followers()
    assert cluster.world.run_until(lambda: any(other.leads for other in others), 2.0)


def test_learners_learn_everything_and_elect_nobody() -> None:
    cluster, leader = elected(learners=2, compaction_entries=20, trailing_entries=5)
    learner = cluster.processes["x0"]
    for number in range(10):
        submit(learner, f"job-{number}")
    cluster.kill("x1")
    cluster.world.run(1.0)
    for number in range(30):
        submit(cluster.processes["n0"], f"more-{number}")
    cluster.world.run(1.0)
    cluster.boot("x1")
    converge(cluster)
    assert len(cluster.processes["x1"].replica.state.jobs) == 40
    for name in cluster.voters:
        cluster.kill(name)
    cluster.boot(leader.name)
    cluster.world.run(5.0)
    assert cluster.leader() is None, "one voter of three and two learners are no majority"
    cluster.heal()
    converge(cluster)


def test_a_learner_that_comes_back_with_an_empty_directory_gets_all_anew() -> None:
    cluster, leader = elected(learners=1)
    for number in range(5):
        submit(leader, f"job-{number}")
    cluster.world.run(0.5)
    cluster.kill("x0")
    cluster.wipe("x0")
    cluster.boot("x0")
    converge(cluster)
    assert len(cluster.processes["x0"].replica.state.jobs) == 5


def test_a_handover_through_a_learner_goes_where_it_was_told() -> None:
    cluster, leader = elected(learners=1)
    target = cluster.followers()[0].name
    learner, answers = cluster.processes["x0"], list[str | None]()

    async def ask() -> None:
        try:
            answers.append(await learner.raft.transfer_leadership(target, 2.0))
        except NotLeader:
            answers.append("nobody")

    learner.do(lambda: learner.spawn(ask()))
    assert cluster.world.run_until(lambda: bool(answers), 3.0)
    assert answers == [target]
    assert not leader.leads
    assert cluster.processes[target].leads


def test_a_fault_names_learners_too() -> None:
    config = msgspec.structs.replace(draw_config(3, 3, lossy=False), learners=1)
    schedule = [
        Fault(0, 2.0, "kill", node="x0", for_s=0.4, power=True),
        Fault(1, 4.0, "partition", others=("n0", "x0"), for_s=1.0),
        Fault(2, 6.0, "failpoint", node="x0", for_s=0.4, call="apply"),
        Fault(3, 8.0, "wipe", node="x0", for_s=0.4),
    ]
    result = run(3, config, 10.0, schedule)
    assert result.violation == ""
    assert result.figures["kills"] - result.figures["exits"] == 3


def test_a_learner_that_connects_before_a_voter_has_read_its_disk_is_not_overlooked() -> None:
    cluster, leader = elected(learners=1)
    late = cluster.followers()[0].name
    cluster.kill(late)
    cluster.slow_disk_s[late] = 1.0
    process = cluster.boot(late)
    assert cluster.world.run_until(lambda: process.links.connected("x0"), 1.0)
    assert not process.started
    assert cluster.world.run_until(lambda: process.registered, 10.0)
    cluster.slow_disk_s.clear()
    leader.do(lambda: leader.spawn(leader.raft.transfer_leadership(late, 2.0)))
    assert cluster.world.run_until(lambda: process.leads, 3.0)
    converge(cluster)


def test_no_heartbeat_is_answered_with_entries_that_are_still_on_their_way_to_disk() -> None:
    cluster, leader = elected()
    cluster.world.run(1.0)
    for follower in cluster.followers():
        cluster.slow_disk_s[follower.name] = 1.0
    submit(leader, "job")
    cluster.world.run(0.4)
    for follower in cluster.followers():
        assert follower.log.last_index > leader.raft.commit_index, "it has the entry in memory"
        assert follower.disk_until > cluster.world.now
    assert not leader.replica.state.jobs
    for follower in cluster.followers():
        cluster.kill(follower.name, power=True)
    cluster.slow_disk_s.clear()
    cluster.heal()
    converge(cluster)
