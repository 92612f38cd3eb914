"""Checkpoints under way, and how runs end: completed, diverged, stopped."""

from __future__ import annotations

from typing import Any

import pytest

from distroml import commands as c
from distroml.model import Checkpoint, CheckpointStatus, FailureKind, JobStatus
from distroml.reports import WorkerPhase
from distroml.runtime import committing
from distroml.runtime.facts import ReconcilerSettings
from distroml.runtime.reconciler import WriteManifest
from distroml.spec import Checkpointing
from tests.builders import checkpoint
from tests.runtime.scenes import (
    Scene,
    commit,
    failure,
    names,
    only,
    reasons,
    recovering,
    shard,
    why_waiting,
)

NO_CHECKPOINTS = Checkpointing(enabled=False)


# --- checkpoints ---


def saved(*steps: int) -> Scene:
    scene = Scene("a", "b").running("a", "b")
    scene.saves(0, *steps)
    scene.saves(1, *steps)
    return scene


def test_a_checkpoint_shows_with_its_first_shard_and_is_written_with_its_last() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.saves(0, 20)
    assert names(scene.step()) == ["BeginCheckpoint"]
    assert scene.job().status is JobStatus.CHECKPOINTING
    assert scene.turn() == []
    scene.saves(1, 20)
    effect = only(scene.turn(), WriteManifest)
    assert (effect.step, effect.shards) == (20, (shard(0, 20), shard(1, 20)))
    scene.writing.add(("job-1", 1, 20))
    assert scene.turn() == []
    commit(scene, effect)
    scene.writing.clear()
    assert scene.turn() == [], "it is not committed again while agents still list its shards"


def test_two_checkpoints_are_committed_in_order() -> None:
    scene = saved(20, 40)
    assert only(scene.step(), WriteManifest).step == 20
    scene.writing.add(("job-1", 1, 20))
    assert scene.turn() == []
    scene.writing.clear()
    commit(scene, only(scene.turn(), WriteManifest))
    assert names(scene.turn()) == ["BeginCheckpoint", "WriteManifest"]
    assert only(scene.turn(), WriteManifest).step == 40


def test_shards_of_a_checkpoint_that_turned_out_corrupt_are_not_committed_again() -> None:
    scene = saved(20)
    commit(scene, only(scene.step(), WriteManifest))
    scene.log.ok(
        c.MarkCheckpointCorrupt(
            job_id="job-1", step=20, manifest_sha256="manifest of 20", reason="the hash differs"
        )
    )
    assert scene.turn() == []


def test_a_rank_that_gives_up_ends_the_checkpoint_and_nothing_else() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.saves(0, 20)
    scene.step()
    scene.change(1, abandoned=((20, "No space left on device"),))
    assert reasons(scene.step()) == [
        "checkpoint of step 20 abandoned: rank 1 could not write its shard: No space left on device"
    ]
    assert scene.job().status is JobStatus.RUNNING
    assert scene.turn() == [], "it is told once"


def test_a_checkpoint_that_no_rank_could_write_is_told_once() -> None:
    scene = Scene("a").running("a")
    scene.change(0, abandoned=((20, "No space left on device"),))
    assert names(scene.step()) == ["AbandonCheckpoint"]
    assert scene.turn() == []


def test_a_manifest_that_cannot_be_written_ends_the_checkpoint() -> None:
    scene = saved(20)
    scene.step()
    scene.write_failures[("job-1", 1, 20)] = "Permission denied"
    assert reasons(scene.step()) == [
        "checkpoint of step 20 abandoned: its manifest could not be written: Permission denied"
    ]
    assert scene.turn() == []


def test_a_checkpoint_that_never_becomes_whole_is_given_up() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.saves(0, 20)
    scene.step()
    assert reasons(scene.step(after_s=600.0)) == [
        "checkpoint of step 20 abandoned: 1 of 2 shards after 600 s"
    ]
    assert scene.turn() == []


def test_a_whole_checkpoint_of_a_failing_generation_is_still_committed_and_resumed_from() -> None:
    scene = saved(20)
    scene.dies(1)
    decisions = scene.step()
    assert names(decisions) == ["FailGeneration", "WriteManifest"]
    scene.writing.add(("job-1", 1, 20))
    for name in scene.reports:
        scene.hears(name)
    scene.step()
    assert scene.step(after_s=1.0) == []
    assert why_waiting(scene) == {"job-1": "checkpoint of step 20 is being committed"}
    commit(scene, only(decisions, WriteManifest))
    scene.writing.clear()
    assert "from the checkpoint of step 20" in reasons(scene.turn())[0]


def without_survivors() -> Scene:
    """A run that has checkpoints of steps 10 and 20, and nobody left who has its state."""
    scene = Scene("a", "b").running("a", "b", max_restarts=1)
    for step in (10, 20):
        made = checkpoint(step, 1, f"{step}")
        scene.log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=made))
    recovering(scene)
    return scene


def test_a_corrupt_checkpoint_is_marked_and_the_older_one_used_without_a_restart() -> None:
    scene = without_survivors()
    scene.turn()
    scene.step(1.0)
    scene.train(phase=WorkerPhase.RESTORING)
    scene.fails(1, "worker_0.safetensors: the hash differs", kind=FailureKind.CORRUPT_CHECKPOINT)
    decisions = scene.step()
    assert names(decisions) == ["MarkCheckpointCorrupt", "FailGeneration"]
    assert [one.status for one in scene.job().checkpoints] == [
        CheckpointStatus.COMMITTED,
        CheckpointStatus.CORRUPT,
    ]
    assert scene.job().restarts == 1
    for name in scene.reports:
        scene.hears(name)
    scene.turn()
    assert "from the checkpoint of step 10" in reasons(scene.turn(1.0))[0]


def test_a_checkpoint_on_nodes_that_are_away_is_waited_for_and_then_given_up() -> None:
    scene = without_survivors()
    begun_s, pauses_s = scene.wall_s, []
    while scene.job().checkpoints[-1].status is CheckpointStatus.COMMITTED:
        assert scene.wall_s - begun_s < 700.0
        forms(scene, "from the checkpoint of step 20")
        scene.train(phase=WorkerPhase.RESTORING)
        scene.fails(1, "c may have it", kind=FailureKind.CHECKPOINT_AWAY)
        decisions = scene.step()
        pauses_s.append(scene.job().backoff_s)
    assert scene.wall_s - begun_s >= 600.0
    assert names(decisions) == ["MarkCheckpointCorrupt", "FailGeneration"]
    assert "given up after 6" in reasons(decisions)[0]
    assert pauses_s[-2:] == [30.0, 0.0]
    assert sorted(pauses_s[:-1]) == pauses_s[:-1]
    assert scene.job().restarts == 1, "it is nobody's fault"
    forms(scene, "from the checkpoint of step 10")


def forms(scene: Scene, told: str) -> None:
    """The next generation, once the pause before it is over."""
    for name in scene.reports:
        scene.hears(name)
    for _ in range(40):
        if decisions := scene.step(1.0):
            assert told in reasons(decisions)[0]
            return
    raise AssertionError("no generation was formed")


@pytest.mark.parametrize("kind", [FailureKind.CORRUPT_CHECKPOINT, FailureKind.CHECKPOINT_AWAY])
def test_a_checkpoint_that_was_never_restored_is_an_error_like_any_other(kind: FailureKind) -> None:
    scene = Scene("a").running("a")
    scene.fails(0, "some hash differs", kind=kind)
    assert failure(scene).cause.kind is FailureKind.ERROR


# --- the end ---


def finished(scene: Scene, **outcome: Any) -> Scene:
    for rank in range(2):
        scene.finish(rank, **outcome)
    return scene


def test_equal_digests_complete_the_run() -> None:
    scene = finished(Scene("a", "b").running("a", "b", checkpointing=NO_CHECKPOINTS))
    decisions = scene.step()
    assert reasons(decisions) == ["2 workers finished at step 100 with the same state"]
    result = scene.job().result
    assert scene.job().status is JobStatus.COMPLETED
    assert result is not None
    assert (result.step, result.epoch, result.metrics) == (100, 1, {"loss": 0.25})
    assert scene.turn() == []


def test_a_run_waits_for_its_final_checkpoint() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    scene.saves(0, 100)
    scene.saves(1, 100)
    decisions = scene.step()
    assert names(decisions) == ["BeginCheckpoint", "WriteManifest"]
    commit(scene, only(decisions, WriteManifest))
    assert names(scene.step()) == ["FinishRun"]
    assert scene.job().result is not None
    assert scene.job().result.checkpoint_step == 100  # type: ignore[union-attr]


def test_a_run_does_not_wait_for_a_final_checkpoint_that_was_given_up() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    scene.saves(0, 100)
    scene.change(1, abandoned=((100, "No space left on device"),))
    assert reasons(scene.step()) == [
        "2 workers finished at step 100 with the same state; no final checkpoint because "
        "rank 1 could not write its shard: No space left on device"
    ]
    assert scene.job().status is JobStatus.COMPLETED


def test_a_run_does_not_wait_for_its_final_checkpoint_for_ever() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    assert scene.turn() == []
    assert "it was not committed within 61 s" in reasons(scene.turn(after_s=61.0))[0]


def test_shards_that_are_whole_are_given_as_long_as_their_store_is_tried() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    scene.saves(0, 100)
    scene.saves(1, 100)
    scene.step()
    assert "FinishRun" not in names(scene.turn(after_s=170.0))
    assert "it was not committed within 181 s" in reasons(scene.turn(after_s=11.0))[0]


def test_the_state_that_a_run_ends_with_is_tried_longest() -> None:
    scene = Scene("a", "b").running("a", "b")
    for rank in (0, 1):
        scene.saves(rank, 20)
    assert not only(scene.turn(), WriteManifest).last
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    for rank in (0, 1):
        scene.saves(rank, 100)
    assert only(scene.turn(), WriteManifest).last
    settings = ReconcilerSettings()
    assert committing.PATIENCE_S < committing.LAST_PATIENCE_S < settings.final_commit_wait_s


def test_a_final_checkpoint_that_is_still_being_copied_is_waited_for_longer() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    scene.saves(0, 100)
    scene.change(1, copying=(100,))
    scene.step()
    assert scene.turn(after_s=300.0) == []
    scene.change(1, copying=())
    assert "it was not committed within" in reasons(scene.turn())[0]


def test_a_final_state_that_was_lost_with_its_node_is_made_again() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), checkpoint_step=100)
    scene.saves(0, 100)
    scene.change(1, copying=(100,))
    scene.step()
    scene.lose("b")
    scene.step()
    assert scene.turn() == [], "an agent that crashed comes back to its workers"
    failed = only(scene.turn(after_s=11.0), c.FailGeneration)
    assert failed.cause is not None
    assert (failed.cause.kind, failed.cause.rank) == (FailureKind.NODE_LOST, 1)
    assert failed.reason == (
        "generation 1: node b lost (connection closed and silent for 0.6 s) before what rank 1 saved of "
        "step 100 was on another one"
    )


def test_a_run_that_stops_does_not_wait_for_copies_of_a_lost_node() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.log.ok(c.StopJob(job_id="job-1", reason="enough"), at=scene.wall_s)
    finished(scene, checkpoint_step=100, stopped=True)
    scene.saves(0, 100)
    scene.change(1, copying=(100,))
    scene.lose("b")
    scene.step()
    assert (
        "no final checkpoint because it was not committed within"
        in (reasons(scene.turn(after_s=61.0))[0])
    )


def test_different_digests_fail_the_run_and_name_the_ranks() -> None:
    scene = Scene("a", "b").running("a", "a", "b")
    for rank, digest in enumerate(("1" * 64, "1" * 64, "2" * 64)):
        scene.finish(rank, state_digest=digest)
    assert reasons(scene.step()) == [
        "generation 1: the final states differ: ranks 0, 1 ended with 111111111111; "
        "rank 2 ended with 222222222222"
    ]
    assert scene.job().status is JobStatus.FAILED
    assert scene.job().incidents[-1].cause.kind is FailureKind.DIVERGED


def test_a_run_recovers_when_one_rank_fails_after_another_finished() -> None:
    scene = Scene("a", "b").running("a", "b")
    scene.finish(0)
    scene.dies(0, exit_code=0)
    scene.finish(0)
    scene.dies(1)
    failed = failure(scene)
    assert failed.reason == "generation 1: worker 1 on node b killed by SIGKILL"
    assert failed.highest_step == 100


def test_what_happens_to_a_worker_after_its_outcome_does_not_matter() -> None:
    scene = Scene("a", "b").running("a", "b", checkpointing=NO_CHECKPOINTS)
    finished(scene)
    scene.change(0, exit_code=-9)
    scene.lose("b")
    assert names(scene.step()) == ["SetNodeStatus", "FinishRun"]
    assert scene.job().status is JobStatus.COMPLETED


def test_ranks_that_finish_before_the_run_was_marked_running() -> None:
    scene = finished(Scene("a", "b").starting("a", "b", checkpointing=NO_CHECKPOINTS))
    assert names(scene.step()) == ["MarkRunning"]
    assert names(scene.step()) == ["FinishRun"]


# --- stopping ---


def stopping(**fields: Any) -> Scene:
    scene = Scene("a", "b").running("a", "b", **fields)
    scene.log.ok(c.StopJob(job_id="job-1", reason="stopped by request"), at=scene.wall_s)
    scene.turn()
    return scene


def test_a_stopped_run_ends_with_its_final_checkpoint() -> None:
    scene = finished(stopping(), stopped=True, step=42, checkpoint_step=42)
    scene.saves(0, 42)
    scene.saves(1, 42)
    commit(scene, only(scene.step(), WriteManifest))
    assert reasons(scene.step()) == [
        "stopped by request at step 42; its final checkpoint is committed"
    ]
    job = scene.job()
    assert job.status is JobStatus.CANCELLED
    assert job.result is not None
    assert job.result.step == 42


def test_a_run_that_was_done_before_the_stop_reached_it_is_completed() -> None:
    scene = finished(stopping(checkpointing=NO_CHECKPOINTS))
    scene.step()
    assert scene.job().status is JobStatus.COMPLETED


def test_a_failure_while_stopping_ends_the_run() -> None:
    scene = stopping()
    made: Checkpoint = checkpoint(20, 1, "20")
    scene.log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=made))
    scene.dies(1)
    assert reasons(scene.step()) == [
        "stopped; no final checkpoint because generation 1: worker 1 on node b killed by SIGKILL; "
        "newest committed is step 20"
    ]
    assert scene.job().status is JobStatus.CANCELLED
    assert scene.job().incidents[-1].cause.signal == "SIGKILL"


def test_a_stop_is_bounded() -> None:
    scene = stopping()
    assert scene.turn(after_s=100.0) == []
    assert (
        "its workers did not stop within 300 s; none is committed" in reasons(scene.turn(200.0))[0]
    )


def test_workers_that_stop_unasked_are_started_again() -> None:
    scene = finished(Scene("a", "b").running("a", "b"), stopped=True, step=42)
    failed = failure(scene)
    assert failed.reason == "generation 1: ranks 0, 1 stopped at step 42 without a request"
