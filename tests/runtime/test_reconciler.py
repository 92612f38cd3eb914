"""The reconciler case by case: nodes, the queue, starts and recoveries, each with its sentence."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from distroml import commands as c
from distroml.model import FailureKind, Generation, JobStatus, NodeStatus
from distroml.reports import WorkerPhase
from distroml.runtime import reconciler
from distroml.runtime.decisions import WriteManifest
from distroml.runtime.failure_detector import Health
from distroml.spec import Resources
from tests.builders import checkpoint, node, submit
from tests.builders import commit as commit_of
from tests.runtime.scenes import (
    Scene,
    commit,
    names,
    only,
    reasons,
    recovering,
    why_waiting,
)

# --- nodes ---


def test_a_node_that_the_detector_lost_is_set_lost_and_back_alive_when_heard() -> None:
    scene = Scene("a", "b")
    scene.lose("b", "silent for 3.1 s")
    assert reasons(scene.step()) == ["node b: silent for 3.1 s"]
    assert scene.turn() == []
    scene.hears("b")
    assert reasons(scene.step()) == ["node b: heard again"]
    assert scene.log.state.nodes["b"].status is NodeStatus.ALIVE


def test_an_earlier_incarnation_does_not_revive_a_node() -> None:
    scene = Scene("a", "b")
    scene.lose("b")
    scene.step()
    scene.log.ok(node("b", incarnation=2, slots=2), at=scene.wall_s)
    scene.log.ok(
        c.SetNodeStatus(name="b", incarnation=2, status=NodeStatus.LOST, reason="silent"),
        at=scene.wall_s,
    )
    scene.hears("b", incarnation=1)
    assert scene.turn() == []


def test_a_node_that_just_registered_is_not_judged_by_the_silence_of_its_predecessor() -> None:
    scene = Scene("a", "b")
    scene.lose("b")
    scene.step()
    scene.log.ok(node("b", incarnation=2, slots=2), at=scene.wall_s)
    assert scene.turn() == []
    assert names(scene.turn(after_s=10.0)) == ["SetNodeStatus"]


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_a_silent_node_is_awaited_for_seconds_whatever_clock_registered_it(skew_s: float) -> None:
    scene = Scene("a").submitted(workers=2)
    scene.log.ok(node("x", slots=2), at=scene.wall_s + skew_s)
    scene.lose("x", "never heard in 60.0 s since the election")
    assert scene.turn() == []
    assert why_waiting(scene) == {"job-1": "waiting for the first report of node x"}
    decisions = scene.step(after_s=scene.settings.settle_s)
    assert reasons(decisions)[0] == "node x: never heard in 60.0 s since the election"
    assert only(decisions, c.FormGeneration).generation.number == 1


@pytest.mark.parametrize("skew_s", [-3600.0, 0.0, 3600.0])
def test_a_job_keeps_its_place_for_a_lost_node_no_longer_whatever_clock_lost_it(
    skew_s: float,
) -> None:
    scene = Scene("a", "b").submitted(workers=4)
    scene.log.ok(submit("job-2", workers=2), at=scene.wall_s)
    scene.lose("b")
    lost = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.LOST, reason="silent")
    scene.log.ok(lost, at=scene.wall_s + skew_s)
    if skew_s >= 0:
        assert scene.turn() == [], "the first job's place is kept"
    formed = only(scene.turn(after_s=scene.settings.return_wait_s), c.FormGeneration)
    assert formed.job_id == "job-2"


def test_a_draining_report_drains_the_node() -> None:
    scene = Scene("a")
    scene.hears("a", draining=True)
    assert reasons(scene.step()) == ["node a: it is shutting down"]
    assert scene.log.state.nodes["a"].status is NodeStatus.DRAINING
    assert scene.turn() == []


# --- the queue ---


def test_a_queued_job_gets_its_first_generation() -> None:
    scene = Scene("a", "b").submitted()
    decisions = scene.step()
    assert reasons(decisions) == ["generation 1: 4 workers on a(2), b(2)"]
    formed = only(decisions, c.FormGeneration).generation
    assert (formed.number, formed.checkpoint_step, formed.resume_step) == (1, None, 0)
    assert names(scene.turn()) == []


def test_a_waiting_job_says_what_it_waits_for() -> None:
    scene = Scene("a", "b", slots=1).submitted("large").submitted("small", workers=1)
    scene.log.ok(node("c", slots=2), at=scene.wall_s - 100)
    scene.lose("c")
    scene.reports["c"] = scene.reports["a"]
    scene.step()
    assert why_waiting(scene) == {
        "large": "needs 4 slots, 2 free of 2",
        "small": "needs 1 slot, 2 free of 2; ahead of it: large",
    }


def test_nothing_is_placed_before_every_node_was_heard() -> None:
    scene = Scene("a", "b").submitted(workers=2)
    del scene.reports["b"]
    assert scene.turn() == []
    assert why_waiting(scene) == {"job-1": "waiting for the first report of node b"}
    scene.hears("b")
    assert reasons(scene.turn()) == ["generation 1: 2 workers on a(1), b(1)"]


def test_a_node_that_never_reports_does_not_hold_the_queue_for_ever() -> None:
    scene = Scene("a", "b").submitted(workers=2)
    del scene.reports["b"]
    scene.turn()
    assert reasons(scene.turn(after_s=5.0)) == ["generation 1: 2 workers on a(2)"]


@pytest.mark.parametrize("status", [NodeStatus.DRAINING, NodeStatus.LEFT, NodeStatus.LOST])
def test_only_alive_nodes_get_work(status: NodeStatus) -> None:
    scene = Scene("a", "b").submitted(workers=2)
    scene.log.ok(c.SetNodeStatus(name="a", incarnation=1, status=status, reason="asked"))
    scene.health["a"] = (Health.SUSPECT, "silent")
    assert reasons(scene.turn()) == ["generation 1: 2 workers on b(2)"]


def test_a_suspect_node_gets_no_work() -> None:
    scene = Scene("a", "b").submitted(workers=2)
    scene.health["a"] = (Health.SUSPECT, "silent for 1.2 s")
    assert reasons(scene.turn()) == ["generation 1: 2 workers on b(2)"]


def test_an_old_worker_still_alive_holds_its_slot() -> None:
    scene = Scene("a").submitted(workers=2)
    stray = replace(scene.worker(0), job_id="gone", run_id="gone", generation=7)
    scene.hears("a", stray)
    assert scene.turn() == []
    assert why_waiting(scene) == {"job-1": "needs 2 slots, 1 free of 2"}


def test_a_slot_is_free_only_once_its_agent_knows_that_it_was_released() -> None:
    scene = Scene("a").submitted("cancelled", workers=2)
    scene.step()
    unaware = scene.log.state.index
    scene.log.ok(c.CancelJob(job_id="cancelled", reason="cancelled"), at=scene.wall_s)
    scene.submitted("next", workers=2)
    scene.hears("a", applied_index=unaware)
    assert scene.turn() == [], "the agent may be spawning the cancelled job's workers right now"
    scene.hears("a")
    assert reasons(scene.turn()) == ["generation 1: 2 workers on a(2)"]


# --- starting ---


def test_a_generation_runs_when_all_its_ranks_train() -> None:
    scene = Scene("a", "b").starting("a", "b")
    scene.change(1, phase=WorkerPhase.RESTORING)
    assert scene.turn() == []
    scene.change(1, phase=WorkerPhase.TRAINING)
    decisions = scene.step()
    assert reasons(decisions) == ["generation 1: all 2 ranks train"]
    assert only(decisions, c.MarkRunning).total_steps == 100
    assert scene.job().status is JobStatus.RUNNING


def test_a_late_start_names_the_ranks_and_what_they_do() -> None:
    scene = Scene("a", "b").starting("a", "b", "b")
    scene.change(1, phase=WorkerPhase.CONNECTING)
    scene.reports["b"] = replace(scene.reports["b"], ready=False)
    scene.reports["b"] = replace(scene.reports["b"], workers=scene.reports["b"].workers[:1])
    failed = only(scene.turn(after_s=120.0), c.FailGeneration)
    assert failed.reason == (
        "generation 1: not all workers train after 120 s: "
        "rank 1 on node b is CONNECTING, rank 2 on node b is unknown"
    )
    assert failed.cause.kind is FailureKind.START_TIMEOUT
    assert (failed.cause.rank, failed.cause.node) == (2, "b"), (
        "who is furthest behind is waited for"
    )
    assert failed.collateral == (0, 1)


def test_a_new_leader_starts_the_start_deadline_again() -> None:
    scene = Scene("a", "b").starting("a", "b")
    scene.change(1, phase=WorkerPhase.CONNECTING)
    scene.facts = None
    assert scene.turn(after_s=500.0) == []


# --- recovery ---


def test_a_recovery_resumes_from_the_newest_checkpoint() -> None:
    scene = Scene("a", "b").running("a", "b")
    for step in (10, 20):
        commit = c.CommitCheckpoint(
            job_id="job-1", generation=1, checkpoint=checkpoint(step, 1, f"{step}")
        )
        scene.log.ok(commit)
    recovering(scene)
    assert scene.turn() == [], "the backoff begins now"
    assert why_waiting(scene) == {"job-1": "restart in 0.1 s"}
    decisions = scene.step(after_s=0.2)
    assert reasons(decisions) == [
        "generation 2: 2 workers on a(1), b(1) from the checkpoint of step 20"
    ]
    formed = only(decisions, c.FormGeneration).generation
    assert (formed.checkpoint_step, formed.resume_step) == (20, 20)


def test_a_recovery_without_a_checkpoint_starts_from_scratch() -> None:
    scene = recovering(Scene("a", "b").running("a", "b"))
    scene.turn()
    assert reasons(scene.turn(1.0)) == ["generation 2: 2 workers on a(1), b(1) from scratch"]


def test_survivors_go_on_at_once_with_their_ranks_and_their_steps() -> None:
    scene = Scene("a", "b").running("a", "b", "b")
    scene.dies(1)
    failed = only(scene.step(), c.FailGeneration)
    assert (failed.backoff_s, failed.collateral) == (0.0, (0, 2))
    scene.change(2, phase=WorkerPhase.PARKED, step=11, has_state=True)
    decisions = scene.step(after_s=0.0)
    assert reasons(decisions) == [
        "generation 2: 3 workers on a(2), b(1) from the 11 steps that its survivors have"
    ]
    formed = only(decisions, c.FormGeneration).generation
    assert [(m.rank, m.node) for m in formed.members] == [(0, "a"), (1, "a"), (2, "b")]
    assert (formed.joining, formed.resume_step, formed.planned) == ((1,), 11, False)


def fails_with_a_whole_checkpoint(scene: Scene, step: int, *, dead: int) -> WriteManifest:
    """One of two ranks dies ten steps behind it, and its manifest is being written from now on."""
    scene.train(step=step + 10)
    for rank in (0, 1):
        scene.saves(rank, step)
    scene.dies(dead)
    decisions = scene.step()
    assert names(decisions) == ["FailGeneration", "WriteManifest"]
    scene.writing.add(("job-1", 1, step))
    writing: WriteManifest = only(decisions, WriteManifest)
    return writing


def formed_once_committed(scene: Scene, writing: WriteManifest) -> Generation:
    """The run waits for the commit, and goes on from it."""
    assert scene.turn(after_s=1.0) == []
    told = f"checkpoint of step {writing.step} is being committed"
    assert why_waiting(scene) == {"job-1": told}
    commit(scene, writing)
    scene.writing.clear()
    formed: Generation = only(scene.turn(), c.FormGeneration).generation
    assert (formed.checkpoint_step, formed.resume_step) == (writing.step, writing.step)
    return formed


def test_a_replacement_that_has_no_state_yet_is_no_survivor() -> None:
    """The last one with the state ends before it could pass it on, and a checkpoint is still being committed."""
    scene = Scene("a", "b").running("a", "b")
    writing = fails_with_a_whole_checkpoint(scene, 90, dead=1)
    assert only(scene.step(), c.FormGeneration).generation.resume_step == 100
    scene.hears("a", scene.worker(0, step=100, phase=WorkerPhase.CONNECTING))
    scene.hears("b", scene.worker(1, worker=9, step=100, phase=WorkerPhase.CONNECTING))
    scene.dies(0)
    scene.step()
    scene.change(1, phase=WorkerPhase.PARKED, parked_at=scene.wall_s)
    scene.turn()
    formed_once_committed(scene, writing)


def test_whoever_is_on_a_node_that_no_rank_can_be_on_is_no_survivor() -> None:
    """The others died with it at once, and its agent was silent before it could tell how its ranks ended."""
    scene = Scene("a", "b", "c").running("a", "b")
    writing = fails_with_a_whole_checkpoint(scene, 90, dead=0)
    scene.health["b"] = (Health.SUSPECT, "connection closed")
    scene.turn()
    formed = formed_once_committed(scene, writing)
    assert "from the checkpoint of step 90" in formed.reason


def test_what_was_whole_is_committed_also_where_nobody_had_said_yet_that_all_train() -> None:
    fails_with_a_whole_checkpoint(Scene("a", "b").starting("a", "b"), 90, dead=1)


def test_a_commit_that_the_log_will_not_take_any_more_is_not_waited_for() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.log.ok(commit_of(50), at=scene.wall_s)
    scene.writing.add(("job-1", 1, 90))
    scene.train(step=95)
    scene.dies(0)
    scene.dies(1)
    scene.step()
    assert scene.turn() == []
    assert why_waiting(scene) == {"job-1": "checkpoint of step 90 is being committed"}
    formed = only(scene.step(after_s=scene.settings.commit_wait_s), c.FormGeneration).generation
    assert (formed.number, formed.resume_step) == (2, 50)
    scene.train(step=60)
    scene.dies(0)
    scene.dies(1)
    scene.step()
    scene.turn()
    formed = only(scene.turn(after_s=1.0), c.FormGeneration).generation
    assert (formed.number, formed.resume_step) == (3, 50)


def test_of_survivors_that_cannot_all_stay_the_steps_of_any_are_certain() -> None:
    """A job of higher priority takes one of their slots, and it is up to the agent who makes room."""
    resources = Resources(workers=4, min_workers=1)
    scene = Scene("a", "b").running("a", "a", "b", "b", resources=resources)
    scene.train(step=59)
    scene.change(1, step=60)
    scene.log.ok(submit("job-2", workers=1, priority=10), at=scene.wall_s)
    scene.dies(2)
    scene.dies(3)
    scene.step()
    formed = [d.action for d in scene.turn() if isinstance(d.action, c.FormGeneration)]
    kept, other = sorted(formed, key=lambda one: one.job_id)
    assert [member.node for member in other.generation.members] == ["a"]
    assert [member.node for member in kept.generation.members] == ["a", "b", "b"]
    assert (kept.generation.joining, kept.generation.resume_step) == ((1, 2), 59)


def test_a_commit_is_waited_for_where_survivors_have_to_go() -> None:
    resources = Resources(workers=2, min_workers=1)
    scene = Scene("a", "b", "c", slots=1)
    for name in "abc":
        scene.hears(name, slots=1)
    scene.running("a", "b", resources=resources)
    writing = fails_with_a_whole_checkpoint(scene, 50, dead=1)
    scene.log.ok(submit("job-2", workers=2, priority=10), at=scene.wall_s)
    formed = only(scene.step(), c.FormGeneration)
    assert (formed.job_id, [m.node for m in formed.generation.members]) == ("job-2", ["a", "b"])
    assert scene.turn() == []
    commit(scene, writing)
    scene.writing.clear()
    formed = only(scene.turn(), c.FormGeneration)
    assert (formed.job_id, [m.node for m in formed.generation.members]) == ("job-1", ["c"])
    assert formed.generation.resume_step == 50


def test_one_that_was_about_to_pass_its_state_on_is_a_survivor() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.dies(1)
    scene.step()
    assert names(scene.step()) == ["FormGeneration"]
    moved = scene.worker(0, step=10, phase=WorkerPhase.CONNECTING, has_state=True)
    scene.hears("a", moved)
    scene.hears("b", scene.worker(1, worker=9, phase=WorkerPhase.CONNECTING))
    scene.dies(1)
    scene.step()
    scene.turn()
    formed = only(scene.turn(after_s=1.0), c.FormGeneration).generation
    assert "from the 10 steps that its survivors have" in formed.reason


def test_a_hung_worker_holds_its_slot_until_it_is_gone() -> None:
    scene = Scene("a").running("a", "a")
    scene.change(1, stopped_s=2.5)
    failed = only(scene.step(), c.FailGeneration)
    assert failed.reason == "generation 1: worker 1 on node a is stopped, for 2.5 s"
    assert (failed.cause.kind, failed.cause.rank) == (FailureKind.HANG, 1)
    assert scene.turn() == []
    assert why_waiting(scene) == {"job-1": "needs 2 slots, 1 free of 2"}
    scene.dies(1)
    formed = only(scene.turn(after_s=0.0), c.FormGeneration).generation
    assert formed.joining == (1,)


def test_a_recovery_does_not_wait_for_workers_on_a_lost_node() -> None:
    scene = recovering(Scene("a", "b").running("a", "b"))
    scene.hears("b", scene.worker(1))
    scene.lose("b")
    scene.turn()
    assert reasons(scene.turn(1.0)) == [
        "node b: connection closed and silent for 0.6 s",
        "generation 2: 2 workers on a(2) from scratch",
    ]


def test_every_status_has_a_handler() -> None:
    assert set(reconciler._HANDLERS) == set(JobStatus)
