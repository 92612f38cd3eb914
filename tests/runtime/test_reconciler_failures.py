"""Failures: who is to blame, how it is told, and when the run gives up."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from distroml import commands as c
from distroml.model import FailureKind, JobStatus
from distroml.reports import StepTiming, WorkerPhase
from distroml.runtime.facts import Now
from distroml.runtime.failure_detector import Health
from distroml.runtime.hang import HangSettings
from distroml.runtime.look_ahead import with_next_generations
from distroml.runtime.reconciler import Decision
from tests.builders import checkpoint, node
from tests.runtime.scenes import (
    Scene,
    failure,
    names,
    only,
    reasons,
)

# --- failures: the cause and the sentence ---


def test_a_killed_worker() -> None:
    scene = Scene("a", "b").running("a", "a", "b", "b")
    scene.dies(2, last_lines=("step 9", "step 10"))
    failed = failure(scene)
    assert failed.reason == "generation 1: worker 2 on node b killed by SIGKILL"
    assert (failed.cause.kind, failed.cause.signal) == (FailureKind.EXIT, "SIGKILL")
    assert (failed.cause.rank, failed.cause.node, failed.cause.pid) == (2, "b", 102)
    assert failed.cause.last_lines == ("step 9", "step 10")
    assert failed.collateral == (0, 1, 3)
    assert failed.highest_step == 10
    assert failed.observed_at == scene.wall_s - 0.1


@pytest.mark.parametrize(
    ("exit_code", "said"),
    [
        (-11, "killed by SIGSEGV"),
        (-200, "killed by signal 200"),
        (3, "exited with code 3 before it finished"),
        (0, "exited with code 0 before it finished"),
    ],
)
def test_how_an_exit_is_told(exit_code: int, said: str) -> None:
    scene = Scene("a").running("a")
    scene.dies(0, exit_code=exit_code)
    assert failure(scene).reason == f"generation 1: worker 0 on node a {said}"


def test_an_error_comes_with_its_traceback() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.fails(1, "ValueError: bad batch")
    failed = failure(scene)
    assert failed.reason == "generation 1: worker 1 on node b failed: ValueError: bad batch"
    assert failed.cause.kind is FailureKind.ERROR
    assert failed.cause.traceback == "Traceback …\nValueError: bad batch"


def test_the_killed_worker_is_the_cause_even_if_its_echoes_are_seen_first() -> None:
    scene = Scene("a", "b").running("a", "a", "b")
    scene.fails(0, "collective failed", collateral=True, after_s=0.01)
    scene.fails(1, "RuntimeError: Connection closed by peer [127.0.0.1]:1", after_s=0.02)
    assert scene.turn() == [], "the root cause may be on its way"
    scene.dies(2, after_s=0.05)
    failed = failure(scene)
    assert failed.reason == "generation 1: worker 2 on node b killed by SIGKILL"
    assert failed.collateral == (0, 1)


def test_of_two_genuine_failures_the_first_is_the_cause() -> None:
    scene = Scene("a", "b").running("a", "b", "b")
    scene.dies(2, after_s=0.2)
    scene.fails(1, "KeyError: 'x'", after_s=0.1)
    failed = failure(scene)
    assert failed.reason == "generation 1: worker 1 on node b failed: KeyError: 'x'"
    assert failed.collateral == (0,), "rank 2 died by itself"


def test_echoes_alone_decide_after_a_moment() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.fails(0, "rank 1 does not answer", collateral=True)
    assert scene.turn() == []
    assert scene.turn(after_s=0.3) == []
    failed = failure(scene, after_s=0.3)
    assert (
        failed.reason == "generation 1: worker 0 on node a lost its peers: rank 1 does not answer"
    )


def test_echoes_wait_for_the_verdict_over_a_suspect_node() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.fails(0, "rank 1 does not answer", collateral=True)
    scene.health["b"] = (Health.SUSPECT, "silent for 1.1 s")
    scene.turn()
    assert scene.turn(after_s=1.0) == []
    scene.lose("b", "silent for 3.1 s")
    assert failure(scene).reason == "generation 1: node b lost (silent for 3.1 s); rank 1 with it"


def test_a_closed_connection_and_broken_collectives_are_proof_enough() -> None:
    scene = Scene("a", "b", "c").running("a", "b", "b")
    scene.health["b"] = (Health.SUSPECT, "connection closed and silent for 0.0 s")
    scene.cut_off.add("b")
    assert scene.turn() == [], "its ranks may train on"
    scene.change(0, phase=WorkerPhase.PARKED, parked_at=scene.wall_s, parked_reason="reset by peer")
    failed = failure(scene, after_s=0.01)
    assert failed.reason == (
        "generation 1: node b lost (connection closed, as by its ranks); ranks 1, 2 with it"
    )
    assert (failed.cause.node, failed.collateral) == ("b", (0,))
    scene.log.ok(failed, at=scene.wall_s)
    formed = only(scene.turn(after_s=0.0), c.FormGeneration).generation
    assert "b" not in {member.node for member in formed.members}


def test_a_lost_node_takes_its_ranks_with_it() -> None:
    scene = Scene("a", "c").running("a", "a", "c", "c")
    scene.lose("c")
    decisions = scene.step()
    assert names(decisions) == ["SetNodeStatus", "FailGeneration"]
    failed = only(decisions, c.FailGeneration)
    assert failed.reason == (
        "generation 1: node c lost (connection closed and silent for 0.6 s); ranks 2, 3 with it"
    )
    assert failed.cause.kind is FailureKind.NODE_LOST
    assert (failed.cause.node, failed.cause.rank) == ("c", None)
    assert failed.collateral == (0, 1)


def test_a_restarted_node() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.log.ok(node("b", incarnation=2, slots=2), at=scene.wall_s)
    failed = failure(scene)
    assert failed.reason == (
        "generation 1: node b restarted (incarnation 2, was 1); rank 1 with it"
    )
    assert failed.cause.kind is FailureKind.NODE_RESTARTED


def test_a_restarted_node_is_noticed_before_it_registered() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.hears("b", incarnation=2)
    assert "node b restarted (incarnation 2, was 1)" in failure(scene).reason


def test_a_draining_node_is_no_failure_of_the_job() -> None:
    scene = Scene("a", "b").running("a", "b", max_restarts=0)
    scene.hears("b", *scene.reports["b"].workers, draining=True)
    scene.dies(1, exit_code=-15)
    failed = failure(scene)
    assert failed.reason == (
        "generation 1: node b is draining (it is shutting down); rank 1 with it"
    )


def test_a_worker_that_its_agent_no_longer_lists() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.hears("b")
    assert scene.turn() == []
    failed = failure(scene, after_s=3.0)
    assert failed.reason == "generation 1: worker 1 on node b is gone: its agent does not list it"


def test_an_agent_that_has_not_learned_of_the_generation_is_not_blamed() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.hears("b", applied_index=1)
    assert scene.turn(after_s=10.0) == []


def test_reports_of_other_generations_runs_and_incarnations_are_ignored() -> None:
    scene = Scene("a", "b").running("a", "b")
    killed = {"phase": WorkerPhase.EXITED, "exit_code": -9, "ended_at": scene.wall_s}
    old = scene.worker(0, generation=0, **killed)
    other = scene.worker(0, run_id="another", **killed)
    scene.hears("a", scene.worker(0), old, other)
    assert scene.turn() == []
    scene.hears("b", scene.worker(1, **killed), incarnation=0)
    assert scene.turn() == []


def test_long_errors_are_cut_to_fit_the_log() -> None:
    scene = Scene("a").running("a")
    scene.fails(0, "é" * 100_000, traceback="x" * 100_000 + "the end")
    scene.change(0, last_lines=("ü" * 10_000,) * 100)
    failed = failure(scene)
    entry = c.Entry("a", 1, 1, 1, 0.0, failed)
    assert len(c.encode_entry(entry)) < c.MAX_ENTRY_BYTES
    assert failed.cause.traceback is not None
    assert failed.cause.traceback.endswith("the end")


# --- restarts ---


def test_the_run_fails_when_its_restarts_are_used_up() -> None:
    scene = Scene("a").running("a", max_restarts=0)
    scene.fails(0, "ValueError: bad batch")
    decisions = scene.step()
    assert reasons(decisions) == [
        "gave up after 0 restarts without progress: generation 1: worker 0 on node a failed: ValueError: bad batch"
    ]
    assert scene.job().status is JobStatus.FAILED
    assert scene.job().incidents[-1].cause.traceback is not None, "the last failure is kept too"
    assert scene.turn() == []


def restart(scene: Scene, *, step: int = 10, committed: bool = False) -> float:
    """Let the present generation fail at ``step`` and the next one run; the backoff of the failure."""
    scene.turn(after_s=1.0)
    number = scene.job().generation_number
    if committed:
        commit = c.CommitCheckpoint(
            job_id="job-1",
            generation=number,
            checkpoint=checkpoint(10 * number, number, f"{number}"),
        )
        scene.log.ok(commit, at=scene.wall_s)
    scene.change(0, step=step)
    scene.dies(0)
    failed = failure(scene)
    scene.log.ok(failed, at=scene.wall_s)
    for name in scene.reports:
        scene.hears(name)
    if failed.backoff_s > 0:
        assert scene.step() == []
    scene.step(after_s=failed.backoff_s + 0.01)
    assert scene.job().generation_number == number + 1
    scene.train(step=step)
    scene.step()
    assert scene.job().status is JobStatus.RUNNING
    return failed.backoff_s


def test_the_first_restart_after_progress_is_at_once_then_pauses_double_up_to_a_limit() -> None:
    scene = Scene("a").running("a", max_restarts=100)
    pauses = [restart(scene) for _ in range(12)]
    assert pauses[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert pauses[-1] == 30.0
    assert restart(scene, committed=True) == 0.0
    assert restart(scene) == 0.1
    assert restart(scene, step=11) == 0.0
    assert restart(scene, step=11) == 0.1
    assert scene.job().restarts == 16
    assert scene.job().strikes == 2


def test_a_worker_that_crashes_at_its_start_for_ever_fails_the_run_with_its_first_error() -> None:
    scene = Scene("a").submitted(workers=1, max_restarts=2)
    for error in ("the first", "the second", "the third"):
        while scene.job().status is not JobStatus.STARTING:
            scene.step(after_s=0.5)
        scene.train(step=0, phase=WorkerPhase.CONNECTING)
        scene.fails(0, f"ValueError: {error}")
        scene.step()
        scene.hears("a")
    job = scene.job()
    assert (job.status, job.restarts) == (JobStatus.FAILED, 2)
    assert job.reason == (
        "gave up after 2 restarts without progress: generation 3: worker 0 on node a failed: "
        "ValueError: the third; the first time: generation 1: worker 0 on node a failed: "
        "ValueError: the first"
    )
    assert scene.log.state.slots_used() == {}


# --- hangs ---


def test_a_rank_that_hangs_is_named_and_the_others_go_on() -> None:
    scene = Scene("a", "b").running("a", "b")
    timing = StepTiming(
        step_s=1.0, data_s=0.0, compute_s=1.0, communication_s=0.0, idle_s=0.0, slowest_s=2.0
    )
    for rank, waiting_s in ((0, 25.0), (1, 0.0)):
        scene.change(rank, timing=timing, waiting_s=waiting_s)
    assert scene.turn(after_s=19.0) == []
    failed = failure(scene, after_s=1.5)
    assert failed.reason == (
        "generation 1: worker 1 on node b hangs: no rank completed a step for 20.5 s, "
        "and it waits for nobody"
    )
    assert (failed.cause.kind, failed.cause.pid, failed.collateral) == (FailureKind.HANG, 101, (0,))


def test_a_step_starts_the_clock_again_and_so_does_a_new_leader() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.settings = replace(scene.settings, hang=HangSettings(floor_s=10.0, ceiling_s=10.0))
    assert scene.turn(after_s=9.0) == []
    scene.change(0, step=11)
    assert scene.turn(after_s=9.0) == []
    scene.facts = None
    assert scene.turn(after_s=9.0) == []
    assert names(scene.turn(after_s=10.0)) == ["FailGeneration"]


def test_an_evaluation_may_take_far_longer_than_a_step() -> None:
    scene = Scene("a", "b").running("a", "b")
    timing = StepTiming(
        step_s=0.1, data_s=0.0, compute_s=0.1, communication_s=0.0, idle_s=0.0, slowest_s=0.1
    )
    for rank, waiting_s in ((0, 25.0), (1, 0.0)):
        scene.change(rank, timing=timing, waiting_s=waiting_s)
    assert scene.turn(after_s=9.0) == []
    for rank in (0, 1):
        scene.change(rank, evaluating=True)
    assert scene.turn() == []
    assert scene.turn(after_s=30.0) == []
    for rank in (0, 1):
        scene.change(rank, evaluating=False)
    assert scene.turn() == []
    assert scene.turn(after_s=9.0) == [], "the next step has a deadline of its own"
    assert "worker 1 on node b hangs: no rank completed a step for 10.5 s" in (
        failure(scene, after_s=1.5).reason
    )


def test_an_evaluation_that_never_ends_is_named() -> None:
    scene = Scene("a", "b").running("a", "b")
    for rank, waiting_s in ((0, 25.0), (1, 0.0)):
        scene.change(rank, waiting_s=waiting_s, evaluating=True)
    assert scene.turn() == []
    assert scene.turn(after_s=599.0) == []
    assert "worker 1 on node b hangs: no rank completed a step for 600.5 s" in (
        failure(scene, after_s=1.5).reason
    )


def test_silence_of_a_node_is_for_the_failure_detector_to_judge() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.settings = replace(scene.settings, hang=HangSettings(floor_s=10.0, ceiling_s=10.0))
    scene.health["b"] = (Health.SUSPECT, "silent for 1.1 s")
    assert scene.turn(after_s=100.0) == []


# --- looking ahead ---


def ahead(scene: Scene) -> list[Decision]:
    """The decisions of a turn, with those that follow from them at once."""
    decisions = scene.turn()
    assert scene.facts is not None
    now = Now(scene.wall_s, scene.monotonic_s)
    return with_next_generations(scene.log.state, scene.facts, now, scene.settings, decisions)


def test_a_failure_and_the_next_generation_are_decided_together() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.dies(1)
    decisions = scene.apply(ahead(scene))
    assert names(decisions) == ["FailGeneration", "FormGeneration"]
    assert [one.together for one in decisions] == [False, True]
    assert scene.job().status is JobStatus.STARTING


@pytest.mark.parametrize(("max_restarts", "step"), [(0, 10), (3, 0)])
def test_where_the_run_ends_or_backs_off_there_is_nothing_to_decide_together(
    max_restarts: int, step: int
) -> None:
    scene = Scene("a", "b").running("a", "b", max_restarts=max_restarts)
    scene.train(step=step)
    scene.dies(1)
    assert len(ahead(scene)) == 1


def test_ranks_that_find_nobody_with_the_state_are_not_to_blame_and_it_costs_no_restart() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.dies(1)
    scene.step()
    assert names(scene.step()) == ["FormGeneration"]
    restarts = scene.job().restarts
    scene.hears("a", scene.worker(0, worker=8, phase=WorkerPhase.RESTORING))
    scene.hears("b", scene.worker(1, worker=9, phase=WorkerPhase.RESTORING))
    scene.turn()
    parked = {"phase": WorkerPhase.PARKED, "parked_at": scene.wall_s}
    scene.change(0, **parked, bereft=True, parked_reason="no rank has the 10 steps")
    scene.change(1, **parked, parked_reason="connection closed by peer")
    failed = only(scene.step(), c.FailGeneration)
    assert failed.reason == (
        "generation 2: worker 0 on node a has nothing to go on from: no rank has the 10 steps"
    )
    assert (failed.cause.kind, failed.culprits) == (FailureKind.STATE_GONE, ())
    assert (failed.backoff_s, scene.job().restarts) == (0.0, restarts)
    formed = only(scene.turn(), c.FormGeneration).generation
    assert (formed.number, formed.resume_step, formed.joining) == (3, 0, ())
