"""Planned changes: a run grows, shrinks, leaves a drained node and keeps spares, and never loses a step by it."""

from __future__ import annotations

from typing import Any

from distroml import commands as c
from distroml.model import FailureKind, JobStatus, NodeStatus
from distroml.reports import Former, WorkerPhase
from distroml.runtime.decisions import Decision, WriteManifest
from distroml.runtime.facts import Now
from distroml.runtime.look_ahead import with_next_generations
from distroml.spec import JobSpec, Resources
from tests.builders import form, members
from tests.runtime.scenes import Scene, commit, names, only, reasons, shard, why_waiting


def elastic(*where: str, workers: int, formed_s: float = 0.0, **fields: Any) -> Scene:
    """A run with fewer ranks than it wants, on ``where``, in a cluster with a free slot on b."""
    scene = Scene("a", "b")
    resources = Resources(workers=workers, min_workers=1, spares=fields.pop("spares", 0))
    command = c.SubmitJob(
        job_id="job-1", run_id="run-job-1", spec=JobSpec(resources=resources, **fields)
    )
    scene.log.ok(command, at=scene.wall_s)
    made = form("job-1", 1, members(*where), formed_at=scene.wall_s - formed_s)
    scene.log.ok(made, at=scene.wall_s)
    scene.turn()
    scene.train()
    scene.log.ok(c.MarkRunning(job_id="job-1", generation=1, total_steps=100), at=scene.wall_s)
    scene.turn()
    return scene


def growing() -> Scene:
    """A third rank was planned on b; those on a train on in the first generation."""
    scene = elastic("a", "a", workers=3)
    scene.wall_s += 10.0
    decisions = scene.step()
    assert reasons(decisions) == ["generation 2 grows to 3 workers on a(2), b(1)"]
    planned = only(decisions, c.FormGeneration).generation
    assert (planned.planned, planned.joining, planned.resume_step) == (True, (2,), 10)
    scene.hears("a", *(scene.worker(rank, generation=1, step=10) for rank in (0, 1)))
    scene.hears("b", scene.worker(2, phase=WorkerPhase.CONNECTING))
    return scene


def test_a_run_grows_when_slots_are_free_and_counts_no_restart() -> None:
    scene = growing()
    assert scene.turn() == []
    scene.hears("a", *(scene.worker(rank) for rank in (0, 1)))
    scene.hears("b", scene.worker(2))
    assert reasons(scene.step()) == ["generation 2: all 3 ranks train"]
    job = scene.job()
    assert (job.status, job.outgoing, job.restarts, job.incidents) == ("RUNNING", None, 0, ())


def test_a_run_does_not_grow_at_once_nor_while_a_checkpoint_is_open() -> None:
    scene = elastic("a", "a", workers=3, formed_s=1.0)
    assert scene.turn() == []
    scene.saves(0, 20)
    assert names(scene.step(after_s=10.0)) == ["BeginCheckpoint"]
    assert scene.turn() == []


def test_a_newcomer_that_fails_disturbs_nobody() -> None:
    scene = growing()
    scene.dies(2)
    decisions = scene.step()
    assert reasons(decisions) == ["generation 3 stays as it was: worker 2 killed by SIGKILL"]
    assert scene.job().at_work.number == 1
    scene.train()
    assert names(scene.step()) == ["MarkRunning"]
    assert (scene.job().restarts, scene.job().incidents) == (0, ())
    assert scene.turn(after_s=10.0) == [], "it is not tried again at once"


def test_a_newcomer_that_hangs_is_given_up_however_often_checkpoints_are_saved() -> None:
    scene = growing()
    decisions: list[Decision] = []
    for turn in range(40):  # 1000 s, with a checkpoint every 50 s
        scene.change(turn % 2, shards=(shard(turn % 2, 20 + turn // 2),))
        decisions = scene.step(after_s=25.0)
        if "FormGeneration" in names(decisions):
            break
        for decision in decisions:
            if isinstance(decision.action, WriteManifest):
                commit(scene, decision.action)
    assert reasons(decisions)[-1].startswith("generation 3 stays as it was: not all workers train")
    assert scene.job().at_work.number == 1


def test_a_failure_during_a_change_fails_both_generations() -> None:
    scene = growing()
    scene.dies(1)
    failed = only(scene.step(), c.FailGeneration)
    assert (failed.generation, failed.cause.rank, failed.collateral) == (2, 1, (0, 2))
    assert scene.job().status is JobStatus.RECOVERING
    formed = only(scene.step(after_s=0.0), c.FormGeneration).generation
    assert (formed.number, formed.joining) == (3, (1,))


def test_a_newcomer_that_fails_after_the_change_began_is_a_failure() -> None:
    scene = growing()
    scene.hears("a", *(scene.worker(rank, phase=WorkerPhase.CONNECTING) for rank in (0, 1)))
    scene.dies(2)
    failed = only(scene.step(), c.FailGeneration)
    assert (failed.generation, failed.cause.rank, failed.collateral) == (2, 2, (0, 1))


def changed_over(*saved: int) -> Scene:
    """Ranks 0 and 1 have changed over to a second generation; those in ``saved`` have durable shards of step 12."""
    scene = growing()
    former = [
        Former(generation=1, rank=rank, shards=(shard(rank, 12),) if rank in saved else ())
        for rank in (0, 1)
    ]
    scene.hears("a", *(scene.worker(rank, step=13, former=former[rank]) for rank in (0, 1)))
    scene.hears("b", scene.worker(2, step=13))
    return scene


def test_a_checkpoint_that_was_whole_when_the_ranks_changed_over_is_committed_first() -> None:
    scene = changed_over(0, 1)
    decisions = scene.step()
    assert names(decisions) == ["BeginCheckpoint", "WriteManifest"]
    scene.writing.add(("job-1", 1, 12))
    assert scene.turn() == [], "outgoing ranks are not forgotten before it is committed"
    commit(scene, only(decisions, WriteManifest))
    assert names(scene.step()) == ["MarkRunning"]
    assert [one.step for one in scene.job().checkpoints] == [12]


def test_a_checkpoint_that_is_not_whole_in_time_after_a_change_is_abandoned_with_a_reason() -> None:
    scene = changed_over(0)
    assert names(scene.step()) == ["BeginCheckpoint"]
    assert scene.step() == []
    decisions = scene.step(after_s=6.0)
    assert names(decisions) == ["AbandonCheckpoint", "MarkRunning"]
    assert reasons(decisions)[0] == (
        "checkpoint of step 12 abandoned: 1 of 2 shards were durable when generation 2 took over"
    )
    assert (scene.job().status, scene.job().outgoing) == (JobStatus.RUNNING, None)


def test_a_shard_that_a_rank_gave_up_after_a_change_is_told() -> None:
    scene = changed_over(0)
    scene.step()
    lost = Former(generation=1, rank=1, abandoned=((12, "No space left on device"),))
    scene.change(1, former=lost)
    decisions = scene.step()
    assert names(decisions) == ["AbandonCheckpoint", "MarkRunning"]
    assert "No space left on device" in reasons(decisions)[0]


def test_what_was_whole_before_a_change_that_failed_is_committed() -> None:
    scene = changed_over(0, 1)
    scene.dies(2)
    decisions = scene.step()
    assert names(decisions) == ["FailGeneration", "WriteManifest"]
    commit(scene, only(decisions, WriteManifest))
    assert [one.step for one in scene.job().checkpoints] == [12]


def test_a_newcomer_that_has_no_state_yet_waits_for_what_was_whole_when_all_others_ended() -> None:
    scene = growing()
    for rank in (0, 1):
        scene.change(rank, step=12, shards=(shard(rank, 12),))
        scene.dies(rank)
    decisions = scene.turn()
    assert names(decisions) == ["FailGeneration", "WriteManifest"]
    assert scene.facts is not None
    now = Now(scene.wall_s, scene.monotonic_s)
    ahead = with_next_generations(scene.log.state, scene.facts, now, scene.settings, decisions)
    assert names(ahead) == names(decisions), "nor is the next one formed in the same breath"
    scene.apply(decisions)
    scene.writing.add(("job-1", 1, 12))
    scene.change(2, phase=WorkerPhase.PARKED, step=10, parked_at=scene.wall_s)
    assert scene.turn() == []
    assert why_waiting(scene) == {"job-1": "checkpoint of step 12 is being committed"}
    commit(scene, only(decisions, WriteManifest))
    scene.writing.clear()
    formed = only(scene.step(), c.FormGeneration).generation
    assert (formed.checkpoint_step, formed.resume_step) == (12, 12)


def test_a_run_that_ends_before_its_change_is_made_is_completed() -> None:
    scene = growing()
    for rank in (0, 1):
        scene.finish(rank)
    scene.change(2, outcome=None, phase=WorkerPhase.CONNECTING)
    decisions = scene.step(after_s=61.0)
    assert only(decisions, c.FinishRun).status is JobStatus.COMPLETED


def test_a_drained_node_is_left_at_a_step_boundary() -> None:
    scene = Scene("a", "b", slots=4).running("a", "b", "b")
    drain = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="asked")
    scene.log.ok(drain, at=scene.wall_s)
    decisions = scene.step()
    assert reasons(decisions) == ["generation 2 moves to 3 workers on a(3)"]
    assert only(decisions, c.FormGeneration).generation.joining == (1, 2)


def test_a_drained_node_keeps_its_ranks_while_there_is_no_room() -> None:
    scene = Scene("a", "b").running("a", "a", "b")
    drain = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="asked")
    scene.log.ok(drain, at=scene.wall_s)
    assert scene.turn(after_s=100.0) == []


def test_a_node_that_shuts_down_without_room_elsewhere_ends_the_generation() -> None:
    scene = Scene("a", "b").running("a", "a", "b")
    scene.hears("b", *scene.reports["b"].workers, draining=True)
    decisions = scene.step()
    assert names(decisions) == ["SetNodeStatus", "FailGeneration"]
    failed = only(decisions, c.FailGeneration)
    assert failed.cause.kind is FailureKind.NODE_LEFT
    assert (scene.job().restarts, scene.job().strikes) == (0, 0)


def test_an_elastic_run_shrinks_off_a_node_that_shuts_down() -> None:
    scene = elastic("a", "a", "b", workers=3)
    scene.hears("b", *scene.reports["b"].workers, draining=True)
    decisions = scene.step()
    assert names(decisions) == ["SetNodeStatus", "FormGeneration"]
    assert "shrinks to 2 workers on a(2)" in reasons(decisions)[1]
    scene.hears("a", *(scene.worker(rank) for rank in (0, 1)))
    parked = scene.worker(2, generation=1, phase=WorkerPhase.PARKED, parked_at=scene.wall_s)
    scene.hears("b", parked, draining=True)
    assert reasons(scene.step()) == ["generation 2: all 2 ranks train"]


def test_all_ranks_leave_a_drained_node_but_never_all_at_once() -> None:
    scene = Scene("a", "b").running("b", "b")
    drain = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="asked")
    scene.log.ok(drain, at=scene.wall_s)
    assert reasons(scene.step()) == ["generation 2 moves to 2 workers on b(1), a(1)"]
    scene.train()
    scene.step()
    assert reasons(scene.step()) == ["generation 3 moves to 2 workers on a(2)"]


def test_an_elastic_run_takes_what_is_left_when_a_node_is_lost() -> None:
    scene = elastic("a", "a", "b", "b", workers=4)
    scene.lose("b")
    assert names(scene.step()) == ["SetNodeStatus", "FailGeneration"]
    assert reasons(scene.step(after_s=0.0)) == [
        "generation 2: 2 workers on a(2) from the 10 steps that its survivors have"
    ]


def test_spares_are_kept_up_where_slots_are_free() -> None:
    scene = elastic("a", workers=1, spares=2)
    decisions = scene.step()
    assert reasons(decisions) == ["2 workers on b(1), a(1) as spares"]
    assert scene.turn() == []
    scene.submitted("other", workers=2)
    decisions = scene.step()
    assert names(decisions) == ["PlaceSpares", "FormGeneration"], "ranks come first"
    assert reasons(decisions)[0] == "1 worker on b(1) as spares"


def test_nothing_is_planned_while_a_node_with_ranks_is_silent() -> None:
    """It may be lost, and hold ranks that train on for a while: no new generation can name it."""
    scene = elastic("a", "a", "b", workers=4)
    scene.wall_s += 10.0
    scene.hears("b", *scene.reports["b"].workers, incarnation=2, workers_since=1)
    assert scene.turn() == []
    scene.hears("b", scene.worker(2, step=10))
    assert names(scene.turn()) == ["FormGeneration"]


def test_a_rank_that_was_about_to_move_goes_on_where_it_is_when_the_change_fails() -> None:
    scene = Scene("a", "b", slots=4).running("a", "a", "b")
    drain = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="asked")
    scene.log.ok(drain, at=scene.wall_s)
    assert reasons(scene.step()) == ["generation 2 moves to 3 workers on a(3)"]
    scene.hears("a", *(scene.worker(rank, generation=1, step=10) for rank in (0, 1)))
    scene.hears("b", scene.worker(2, generation=1, step=10))
    scene.dies(0)
    assert only(scene.step(), c.FailGeneration).collateral == (1, 2)
    formed = only(scene.step(after_s=0.0), c.FormGeneration).generation
    assert [member.node for member in formed.members] == ["a", "a", "b"]
    assert formed.joining == (0,)
