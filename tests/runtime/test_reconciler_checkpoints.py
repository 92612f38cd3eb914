"""What the leader decides about retention, and about runs that begin with another job's checkpoint."""

from __future__ import annotations

from typing import Any

from distroml import commands as c
from distroml.model import Checkpoint, FailureKind, JobStatus
from distroml.runtime.reconciler import WriteManifest
from distroml.spec import Checkpointing, InitFrom
from tests.builders import commit, fail, form, members
from tests.runtime.scenes import Scene, names, only, recovering

POLICY = Checkpointing(keep_last=2)


def saved(scene: Scene, *steps: int, **fields: Any) -> Scene:
    for step in steps:
        scene.log.ok(commit(step, **fields), at=scene.wall_s)
    return scene


def kept(scene: Scene, job_id: str = "job-1") -> list[int]:
    return [one.step for one in scene.job(job_id).checkpoints]


def test_each_commit_is_followed_by_one_retirement_and_then_by_none() -> None:
    scene = saved(Scene("a", "b").running("a", "b", checkpointing=POLICY), 2, 4, 6, 8)
    retired = only(scene.step(), c.RetireCheckpoints)
    assert (retired.steps, kept(scene)) == ((2, 4), [6, 8])
    assert names(scene.step()) == []


def test_nothing_comes_between_the_end_of_a_generation_and_the_next_one() -> None:
    scene = saved(Scene("a", "b").running("a", "b", checkpointing=POLICY), 2, 4, 6)
    scene.dies(0)
    assert "RetireCheckpoints" not in names(scene.turn())


def test_the_end_of_a_run_is_told_first_and_the_last_retirement_follows() -> None:
    scene = Scene("a", "b").running("a", "b", checkpointing=POLICY)
    for rank in (0, 1):
        scene.finish(rank, checkpoint_step=100)
    saved(scene, 20, 40, 100)
    assert names(scene.turn())[-2:] == ["FinishRun", "RetireCheckpoints"]
    scene.step()
    assert (scene.job().status, kept(scene)) == (JobStatus.COMPLETED, [40, 100])
    assert names(scene.step()) == []


def test_the_manifest_is_to_tell_the_metric_of_the_spec() -> None:
    scene = Scene("a", "b").running("a", "b", checkpointing=Checkpointing(best_metric="accuracy"))
    for rank in (0, 1):
        scene.saves(rank, 20)
    assert only(scene.turn(), WriteManifest).best_metric == "accuracy"


def test_what_a_late_commit_has_passed_is_neither_written_nor_waited_for() -> None:
    """A survivor was thought to have 70 steps, and was gone too: generation 2 went on from step 2. Only then step 60 of
    generation 1, which was whole, got into the log."""
    scene = saved(Scene("a", "b").running("a", "b", checkpointing=POLICY), 2)
    scene.log.ok(fail("job-1", 1), at=scene.wall_s)
    scene.log.ok(form("job-1", 2, members("a", "b"), resume_step=70), at=scene.wall_s)
    scene.log.ok(commit(60), at=scene.wall_s)
    scene.train(step=90)
    scene.log.ok(c.MarkRunning(job_id="job-1", generation=2, total_steps=100), at=scene.wall_s)
    for rank in (0, 1):
        scene.saves(rank, 20, 40, 60, 80)
    assert only(scene.turn(), WriteManifest).step == 80


class TestInitFrom:
    def scene(self, **fields: Any) -> Scene:
        """A finished job with a checkpoint of step 20, and one that begins with it."""
        scene = saved(Scene("a", "b").running("a", "b"), 20)
        scene.log.ok(c.CancelJob(job_id="job-1", reason="r"), at=scene.wall_s)
        for name in scene.reports:
            scene.hears(name)
        begun = InitFrom(job="job-1", **fields)
        return scene.submitted("job-2", workers=2, init_from=begun)

    def formed(self, scene: Scene) -> c.FormGeneration:
        found: c.FormGeneration = only(scene.step(1.0), c.FormGeneration)
        return found

    def test_the_first_generation_goes_on_from_it(self) -> None:
        generation = self.formed(self.scene()).generation
        assert (generation.checkpoint_step, generation.from_initial) == (20, True)
        assert generation.resume_step == 20
        assert "step 20 of job job-1" in generation.reason

    def test_with_the_weights_alone_it_begins_at_step_0(self) -> None:
        generation = self.formed(self.scene(weights_only=True)).generation
        assert (generation.checkpoint_step, generation.resume_step) == (20, 0)

    def test_a_checkpoint_of_its_own_comes_first(self) -> None:
        scene = self.scene()
        self.formed(scene)
        own = commit(20, directory="job-2/run-job-2/checkpoints/ckpt_step_00000020")
        made: Checkpoint = own.checkpoint
        command = c.CommitCheckpoint(job_id="job-2", generation=1, checkpoint=made)
        scene.log.ok(command, at=scene.wall_s)
        job = scene.job("job-2")
        assert job.origin() is job.checkpoints[0]

    def test_a_corrupt_one_fails_the_job_and_says_why(self) -> None:
        scene = self.scene()
        self.formed(scene)
        scene.hears("a", self.corrupt(scene))
        decisions = scene.step()
        marked = only(decisions, c.MarkCheckpointCorrupt)
        assert (marked.job_id, marked.step) == ("job-2", 20)
        for name in scene.reports:
            scene.hears(name)
        ended = only(scene.step(1.0), c.FinishRun)
        assert ended.status is JobStatus.FAILED
        assert "worker_0" in ended.reason
        assert "job job-1" in ended.reason

    def corrupt(self, scene: Scene) -> Any:
        from distroml.reports import WorkerFact, WorkerFailure, WorkerPhase

        failure = WorkerFailure(
            kind=FailureKind.CORRUPT_CHECKPOINT,
            error="CorruptCheckpoint: worker_0.safetensors has other bytes",
            traceback="",
            at=scene.wall_s,
            checkpoint_step=20,
        )
        job = scene.job("job-2")
        return WorkerFact(
            job_id="job-2",
            run_id=job.run_id,
            generation=1,
            rank=0,
            phase=WorkerPhase.FAILED,
            failure=failure,
            pid=1,
        )


def test_a_run_that_recovers_keeps_what_it_will_read() -> None:
    scene = recovering(saved(Scene("a", "b").running("a", "b", checkpointing=POLICY), 2, 4, 6))
    for _ in range(4):
        scene.step(1.0)
        assert 6 in kept(scene)
    assert scene.job().generation_number == 2
