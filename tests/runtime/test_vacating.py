"""A run that leaves its nodes with all its ranks: nobody could take over the state, so it is saved first."""

from __future__ import annotations

from typing import Any

import pytest

from distroml import commands as c
from distroml.model import FailureKind, Job, JobStatus, NodeStatus
from distroml.runtime.decisions import WriteManifest
from distroml.spec import Checkpointing
from tests.runtime.scenes import Scene, commit, names, only, reasons

LEFT_AT = 17


def drained(**fields: Any) -> Scene:
    """A run of one rank on b, which is drained; a has room."""
    scene = Scene("a", "b").running("b", **fields)
    drain = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="asked")
    scene.log.ok(drain, at=scene.wall_s)
    return scene


def vacated(scene: Scene) -> Scene:
    """Its rank was asked to leave, and has saved step 17 and ended."""
    assert reasons(scene.step()) == [
        "generation 1: rank 0 leaves node b; a checkpoint is saved, and the run goes on elsewhere"
    ]
    scene.saves(0, LEFT_AT)
    scene.finish(0, step=LEFT_AT, stopped=True, checkpoint_step=LEFT_AT)
    return scene


def goes_on(scene: Scene) -> Job:
    formed = only(scene.step(after_s=0.0), c.FormGeneration).generation
    assert [member.node for member in formed.members] == ["a"]
    assert (scene.job().restarts, scene.job().strikes, scene.job().backoff_s) == (0, 0, 0.0)
    return scene.job()


def test_a_run_of_one_rank_leaves_with_a_checkpoint_and_loses_no_step() -> None:
    scene = vacated(drained())
    assert scene.job().generation.vacated
    assert "WriteManifest" in names(scene.step())
    assert "FailGeneration" not in names(scene.turn()), "the checkpoint is not committed yet"
    commit(scene, only(scene.turn(), WriteManifest))
    decisions = scene.step()
    assert reasons(decisions) == ["generation 1: rank 0 leaves node b; step 17 is saved"]
    assert only(decisions, c.FailGeneration).cause.kind is FailureKind.NODE_LEFT
    job = goes_on(scene)
    assert job.reason == "generation 2: 1 worker on a(1) from the checkpoint of step 17"
    assert job.generation.checkpoint_step == job.generation.resume_step == LEFT_AT
    assert job.incidents[-1].steps_lost == 0


def test_it_is_asked_once_and_trains_until_then() -> None:
    scene = drained()
    assert names(scene.step()) == ["VacateGeneration"]
    assert scene.turn(after_s=100.0) == []


def test_a_checkpoint_is_saved_for_it_even_where_they_are_off() -> None:
    scene = vacated(drained(checkpointing=Checkpointing(enabled=False)))
    scene.step()
    commit(scene, only(scene.turn(), WriteManifest))
    assert reasons(scene.step()) == ["generation 1: rank 0 leaves node b; step 17 is saved"]
    assert goes_on(scene).generation.checkpoint_step == LEFT_AT


def test_where_it_cannot_be_saved_the_reason_says_so() -> None:
    scene = drained()
    scene.step()
    scene.change(0, abandoned=((LEFT_AT, "No space left on device"),))
    scene.finish(0, step=LEFT_AT, stopped=True, checkpoint_step=None)
    decisions = scene.turn()
    failed = only(decisions, c.FailGeneration)
    assert failed.reason == (
        "generation 1: rank 0 leaves node b; step 17 is not saved because rank 0 could not write its shard: "
        "No space left on device"
    )
    scene.apply([one for one in decisions if isinstance(one.action, c.FailGeneration)])
    assert goes_on(scene).reason == "generation 2: 1 worker on a(1) from scratch"
    assert scene.job().incidents[-1].steps_lost == LEFT_AT


def test_a_run_that_comes_to_its_end_meanwhile_is_completed() -> None:
    scene = drained(checkpointing=Checkpointing(enabled=False))
    scene.step()
    scene.finish(0)
    assert only(scene.step(), c.FinishRun).status is JobStatus.COMPLETED


def test_a_run_that_is_stopped_meanwhile_is_cancelled() -> None:
    scene = drained(checkpointing=Checkpointing(enabled=False))
    scene.step()
    scene.log.ok(c.StopJob(job_id="job-1", reason="stopped by request"), at=scene.wall_s)
    scene.finish(0, step=LEFT_AT, stopped=True)
    assert only(scene.step(), c.FinishRun).status is JobStatus.CANCELLED


def test_a_rank_that_dies_meanwhile_is_a_failure() -> None:
    scene = drained()
    scene.step()
    scene.dies(0)
    assert only(scene.step(), c.FailGeneration).cause.kind is FailureKind.EXIT
    assert scene.job().restarts == 1


def test_a_rank_stays_on_a_drained_node_while_there_is_no_room() -> None:
    scene = Scene("b").running("b")
    drain = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="asked")
    scene.log.ok(drain, at=scene.wall_s)
    assert scene.turn(after_s=100.0) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_whose_only_node_shuts_down_save_their_state_though_there_is_no_room(
    ranks: int,
) -> None:
    scene = Scene("b").running(*["b"] * ranks)
    scene.hears("b", *scene.reports["b"].workers, draining=True)
    assert names(scene.step()) == ["SetNodeStatus", "VacateGeneration"]
    for rank in range(ranks):
        scene.saves(rank, LEFT_AT)
        scene.finish(rank, step=LEFT_AT, stopped=True, checkpoint_step=LEFT_AT)
    scene.step()
    commit(scene, only(scene.turn(), WriteManifest))
    assert names(scene.step()) == ["FailGeneration"]
    assert (scene.job().status, scene.job().restarts) == (JobStatus.RECOVERING, 0)
    assert scene.turn() == []
    scene.hears("a")
    scene.log.ok(c.RegisterNode(name="a", incarnation=1, http="http://a", slots=2), at=scene.wall_s)
    assert goes_on_with(scene, ranks) == LEFT_AT


def goes_on_with(scene: Scene, ranks: int) -> int | None:
    formed = only(scene.step(after_s=5.0), c.FormGeneration).generation
    assert len(formed.members) == ranks
    return formed.checkpoint_step


def test_a_stop_that_nobody_asked_for_is_still_a_failure() -> None:
    scene = Scene("a", "b").running("b")
    scene.finish(0, step=LEFT_AT, stopped=True)
    assert only(scene.step(), c.FailGeneration).cause.kind is FailureKind.ERROR


def test_no_change_is_planned_for_ranks_that_are_about_to_end() -> None:
    scene = drained()
    scene.step()
    undo = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.ALIVE, reason="taken back")
    scene.log.ok(undo, at=scene.wall_s)
    assert scene.turn(after_s=100.0) == []
