"""The state machine: pure, total, exactly once, and true to the table of transitions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from distroml import commands as c
from distroml.consensus import state
from distroml.consensus.handlers import change, checkpoints, jobs, nodes
from distroml.consensus.state import ClusterState, decode_state, encode_state
from distroml.model import (
    TERMINAL,
    TRANSITIONS,
    Cause,
    CheckpointStatus,
    FailureKind,
    Job,
    JobStatus,
    NodeStatus,
    Result,
)
from distroml.spec import Checkpointing, InitFrom
from tests.builders import (
    Log,
    checkpoint,
    commit,
    drain,
    fail,
    form,
    imports,
    members,
    node,
    running,
    submit,
)

_LOUD = Cause(
    kind=FailureKind.ERROR,
    rank=0,
    node="a",
    error="e" * 1024,
    traceback="t" * 8192,
    last_lines=("l" * 400,) * 20,
)
"""A failure that says as much as any may."""
RESULT = Result(state_digest="0" * 64, step=100, epoch=1, metrics={"loss": 0.1})


def test_a_job_runs_to_its_end() -> None:
    log = running(Log())
    log.ok(c.BeginCheckpoint(job_id="job-1", generation=1, step=50))
    assert log.job().status is JobStatus.CHECKPOINTING
    log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(50)))
    assert log.job().status is JobStatus.RUNNING
    finish = c.FinishRun(
        job_id="job-1", generation=1, status=JobStatus.COMPLETED, reason="done", result=RESULT
    )
    log.ok(finish, at=1000.0)
    job = log.job()
    assert job.status is JobStatus.COMPLETED
    assert job.finished_at == 1000.0
    assert job.result.state_digest == RESULT.state_digest
    assert job.result.duration_s == 1000.0 - job.started_at


def test_commit_and_abandonment_are_told_with_the_return_to_running() -> None:
    log = running(Log())
    for step, end in (
        (10, c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(10))),
        (20, c.AbandonCheckpoint(job_id="job-1", generation=1, step=20, reason="disk full")),
    ):
        log.ok(c.BeginCheckpoint(job_id="job-1", generation=1, step=step))
        told = [event.type for event in log.ok(end).events]
        assert told[0].startswith("checkpoint")
        assert told[1:] == ["state"]


def test_giving_up_leaves_the_last_failure_as_an_incident() -> None:
    log = running(Log())
    failed = c.FinishRun(
        job_id="job-1",
        generation=1,
        status=JobStatus.FAILED,
        reason="gave up after 0 restarts",
        cause=Cause(kind=FailureKind.ERROR, rank=1, error="ValueError: x", traceback="..."),
        observed_at=1.0,
    )
    log.ok(failed)
    assert log.job().incidents[-1].cause.error == "ValueError: x"


def test_a_failure_becomes_an_incident_with_its_phases() -> None:
    log = running(Log())
    log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(8)))
    log.ok(fail("job-1", 1, observed_at=99.9, highest_step=10), at=100.0)
    assert (log.job().status, log.job().restarts) == (JobStatus.RECOVERING, 1)
    log.ok(form("job-1", 2, members("a", "a"), resume_step=8, checkpoint_step=8), at=100.2)
    assert log.job().incidents[-1].steps_lost == 2, "as far as was known when it was formed"
    marks = {"left_at": 100.1, "met_at": 100.3, "restored_at": 100.4}
    log.ok(
        c.MarkRunning(
            job_id="job-1", generation=2, total_steps=100, resume_step=10, source="rank 1", **marks
        ),
        at=100.5,
    )
    log.ok(c.MarkStepped(job_id="job-1", generation=2, stepped_at=100.7), at=100.8)
    incident = log.job().incidents[-1]
    assert (incident.steps_lost, incident.source) == (0, "rank 1")
    assert incident.phases_ms == {
        "detect": 100.0,
        "decide": 200.0,
        "abort": 0.0,
        "rendezvous": 100.0,
        "restore": 100.0,
        "first_step": 300.0,
        "total": 800.0,
    }
    assert incident.next_generation == 2


def test_strikes_count_failures_without_progress_and_keep_the_first_one() -> None:
    log = running(Log())
    log.ok(fail("job-1", 1, highest_step=10, reason="the first"))
    assert (log.job().strikes, log.job().first_strike) == (1, "the first")
    log.ok(form("job-1", 2, members("a", "b")))
    log.ok(fail("job-1", 2, highest_step=10, reason="the second"))
    assert (log.job().strikes, log.job().first_strike) == (2, "the first")
    log.ok(form("job-1", 3, members("a", "b")))
    log.ok(fail("job-1", 3, highest_step=11, reason="the third"))
    assert (log.job().strikes, log.job().first_strike) == (1, "the third")
    log.ok(form("job-1", 4, members("a", "b")))
    log.ok(c.CommitCheckpoint(job_id="job-1", generation=4, checkpoint=checkpoint(9, 4)))
    log.ok(fail("job-1", 4, highest_step=9, reason="the fourth"))
    assert (log.job().strikes, log.job().restarts) == (1, 4)


def test_a_planned_change_leaves_the_job_running_until_it_is_made() -> None:
    log = running(Log())
    planned = form("job-1", 2, members("a", "b", "b"), planned=True, joining=(2,))
    log.ok(planned)
    job = log.job()
    assert (job.status, job.generation.number, job.at_work.number) == (JobStatus.RUNNING, 2, 1)
    log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(9)))
    log.ok(c.MarkRunning(job_id="job-1", generation=2, total_steps=100))
    job = log.job()
    assert (job.outgoing, job.restarts, job.incidents) == (None, 0, ())
    assert log(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(12)))
    assert log.job().newest_checkpoint().step == 9, "that generation is over"


def test_what_was_whole_before_a_planned_change_that_failed_may_still_be_committed() -> None:
    log = running(Log())
    log.ok(form("job-1", 2, members("a", "b", "b"), planned=True, joining=(2,)))
    log.ok(fail("job-1", 2))
    late = c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(12))
    log.ok(late)
    assert log.job().newest_checkpoint().step == 12
    log.ok(form("job-1", 3, members("a", "b"), checkpoint_step=12))
    beyond = c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(18))
    assert log(beyond).outcome.error == "stale-generation"


def test_a_generation_is_vacated_while_it_trains_and_changes_no_more() -> None:
    log = running(Log())
    vacate = c.VacateGeneration(job_id="job-1", generation=1, reason="its ranks leave")
    (event,) = log.ok(vacate).events
    assert (event.type, event.data["reason"]) == ("state", "its ranks leave")
    job = log.job()
    assert (job.status, job.generation.vacated, job.restarts) == (JobStatus.RUNNING, True, 0)
    planned = form("job-1", 2, members("a", "b"), planned=True)
    assert log(planned).outcome.error == "wrong-status"
    log.ok(fail("job-1", 1))
    log.ok(form("job-1", 2, members("a", "b")))
    assert not log.job().generation.vacated
    assert log(vacate).outcome.error == "stale-generation"


def test_a_generation_that_is_about_to_change_is_not_vacated() -> None:
    log = running(Log())
    log.ok(form("job-1", 2, members("a", "b", "b"), planned=True, joining=(2,)))
    vacate = c.VacateGeneration(job_id="job-1", generation=2, reason="its ranks leave")
    assert log(vacate).outcome.error == "wrong-status"


def test_a_planned_change_may_be_superseded_and_a_failure_ends_both() -> None:
    log = running(Log())
    log.ok(form("job-1", 2, members("a", "b", "b"), planned=True, joining=(2,)))
    log.ok(form("job-1", 3, members("a", "b"), planned=True))
    assert log.job().outgoing.number == 1
    assert log.state.slots_used() == {"a": 1, "b": 1}
    log.ok(fail("job-1", 3))
    assert (log.job().status, log.job().outgoing) == (JobStatus.RECOVERING, None)


def test_the_slots_of_ranks_that_leave_are_held_until_the_change_is_made() -> None:
    log = running(Log())
    log.ok(form("job-1", 2, members("a", "a"), planned=True, joining=(1,)))
    assert log.state.slots_used() == {"a": 2, "b": 1}
    log.ok(c.MarkRunning(job_id="job-1", generation=2, total_steps=100))
    assert log.state.slots_used() == {"a": 2}


def test_a_drained_node_keeps_what_it_has_and_gets_nothing_new() -> None:
    log = running(Log())
    log.ok(drain("b"))
    assert log.state.nodes["b"].drained
    log.ok(submit("job-2", workers=1))
    assert log(form("job-2", 1, members("b"))).outcome.error == "stale-node"
    log.ok(form("job-1", 2, members("a", "b", "a"), planned=True, joining=(2,)))
    lost = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.LOST, reason="silent")
    log.ok(lost)
    assert log.state.nodes["b"].drained, "it is drained still when it is heard again"


@pytest.mark.parametrize("end", [NodeStatus.LOST, NodeStatus.LEFT, None])
def test_a_drain_lasts_through_every_restart_until_it_is_taken_back(end: NodeStatus | None) -> None:
    log = Log()
    log.ok(node("b"))
    log.ok(drain("b"))
    if end is not None:
        log.ok(c.SetNodeStatus(name="b", incarnation=1, status=end, reason="gone"))
    log.ok(node("b", incarnation=2, workers_since=1))
    back = log.state.nodes["b"]
    assert (back.status, back.drained) == (NodeStatus.DRAINING, True)
    assert "drained by request" in back.reason
    log.ok(drain("b", undo=True, incarnation=2))
    back = log.state.nodes["b"]
    assert (back.status, back.drained) == (NodeStatus.ALIVE, False)


@pytest.mark.parametrize("gone", [NodeStatus.LOST, NodeStatus.LEFT])
def test_the_drain_of_a_node_that_is_gone_can_be_taken_back(gone: NodeStatus) -> None:
    log = Log()
    log.ok(node("b"))
    log.ok(drain("b"))
    log.ok(c.SetNodeStatus(name="b", incarnation=1, status=gone, reason="silent for 3.1 s"))
    before = log.state.nodes["b"]
    log.ok(drain("b", undo=True))
    assert log.state.nodes["b"] == replace(before, drained=False), "it is gone as before"
    log.ok(node("b", incarnation=2))
    assert log.state.nodes["b"].status is NodeStatus.ALIVE


def test_a_node_that_shuts_down_was_not_drained_by_anybody() -> None:
    log = Log()
    log.ok(node("b"))
    leaves = c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.DRAINING, reason="stops")
    log.ok(leaves)
    log.ok(node("b", incarnation=2))
    assert log.state.nodes["b"].status is NodeStatus.ALIVE


def test_a_node_that_is_drained_while_it_is_heard_again_gets_nothing() -> None:
    log = Log()
    log.ok(node("b"))
    log.ok(c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.LOST, reason="silent"))
    log.ok(drain("b"))
    assert log.state.nodes["b"].status is NodeStatus.LOST, "a wish does not bring it back"
    log.ok(c.SetNodeStatus(name="b", incarnation=1, status=NodeStatus.ALIVE, reason="heard again"))
    assert log.state.nodes["b"].status is NodeStatus.DRAINING


def test_the_commit_of_a_failed_generation_may_come_when_its_survivors_went_on() -> None:
    log = running(Log())
    log.ok(fail("job-1", 1))
    log.ok(form("job-1", 2, members("a", "b"), resume_step=12))
    late = c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(12))
    beyond = c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(13))
    assert log(beyond).outcome.error == "stale-generation"
    log.ok(late)
    assert log.job().newest_checkpoint().step == 12


def test_a_generation_is_not_formed_from_behind_what_was_committed_since_that_was_decided() -> None:
    log = running(Log())
    log.ok(commit(10))
    log.ok(fail("job-1", 1))
    log.ok(commit(20))
    stale = form("job-1", 2, members("a", "b"), checkpoint_step=10)
    refused = log(stale).outcome
    assert refused.error == "conflict"
    assert refused.detail == "step 20 was committed since this was decided"
    log.ok(form("job-1", 2, members("a", "b"), checkpoint_step=10, resume_step=21))


def test_the_commit_of_a_failed_generation_may_come_when_its_survivors_are_gone_too() -> None:
    log = running(Log())
    log.ok(fail("job-1", 1))
    log.ok(form("job-1", 2, members("a", "b"), resume_step=12))
    log.ok(fail("job-1", 2))
    log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(12)))
    assert log.job().newest_checkpoint().step == 12


def test_a_corrupt_checkpoint_is_skipped_and_not_counted_as_a_restart() -> None:
    log = running(Log())
    for step in (10, 20):
        log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(step)))
    corrupt = c.MarkCheckpointCorrupt(
        job_id="job-1", step=20, manifest_sha256="ab" * 32, reason="worker_0: wrong bytes"
    )
    log.ok(corrupt)
    log.ok(fail("job-1", 1, cause=Cause(kind=FailureKind.CORRUPT_CHECKPOINT)))
    assert log.job().restarts == 0
    assert log.job().newest_checkpoint().step == 10
    assert log.job().checkpoints[-1].status is CheckpointStatus.CORRUPT


@pytest.mark.parametrize(
    "stale",
    [
        c.MarkRunning(job_id="job-1", generation=1, total_steps=9),
        fail("job-1", 1),
        c.BeginCheckpoint(job_id="job-1", generation=1, step=7),
        c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(7)),
        c.AbandonCheckpoint(job_id="job-1", generation=1, step=7, reason="x"),
        c.FinishRun(job_id="job-1", generation=1, status=JobStatus.COMPLETED, reason="x"),
        form("job-1", 2, members("a", "b")),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_stale_generation_has_no_effect_and_is_counted(stale: c.AnyCommand) -> None:
    log = running(Log())
    log.ok(fail("job-1", 1))
    log.ok(form("job-1", 2, members("a", "b")))
    before = log.state.jobs
    applied = log(stale)
    assert applied.outcome.error == "stale-generation"
    assert log.state.jobs == before
    assert log.state.refused["stale-generation"] == 1


def test_a_generation_that_failed_may_still_commit_until_the_next_is_formed() -> None:
    log = running(Log())
    log.ok(fail("job-1", 1))
    log.ok(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(9)))
    assert log.job().newest_checkpoint().step == 9
    assert log.job().status is JobStatus.RECOVERING


def test_a_step_is_committed_once() -> None:
    log = running(Log())
    commit = c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=checkpoint(9))
    log.ok(commit)
    log.ok(commit)
    other = checkpoint(9, digest="cd" * 32)
    applied = log(c.CommitCheckpoint(job_id="job-1", generation=1, checkpoint=other))
    assert applied.outcome.error == "conflict"
    assert len(log.job().checkpoints) == 1


def test_slots_are_never_given_twice() -> None:
    log = Log()
    log.ok(node("a", slots=2))
    log.ok(submit("job-1"))
    log.ok(submit("job-2"))
    log.ok(form("job-1", 1, members("a", "a")))
    assert log(form("job-2", 1, members("a", "a"))).outcome.error == "no-slot"
    assert log.job("job-2").status is JobStatus.QUEUED


@pytest.mark.parametrize("status", [NodeStatus.LOST, NodeStatus.DRAINING, NodeStatus.LEFT])
def test_a_node_that_is_not_alive_gets_no_rank(status: NodeStatus) -> None:
    log = Log()
    log.ok(node("a"))
    log.ok(submit())
    log.ok(c.SetNodeStatus(name="a", incarnation=1, status=status, reason="silent"))
    assert log(form("job-1", 1, members("a", "a"))).outcome.error == "stale-node"


def test_a_node_that_left_comes_back_only_by_registering() -> None:
    log = Log()
    log.ok(node("a"))
    log.ok(c.SetNodeStatus(name="a", incarnation=1, status=NodeStatus.LEFT, reason="stopped"))
    late = c.SetNodeStatus(name="a", incarnation=1, status=NodeStatus.LOST, reason="silent")
    assert log(late).outcome.error == "wrong-status"
    assert log.state.nodes["a"].status is NodeStatus.LEFT
    log.ok(node("a", incarnation=2))
    assert log.state.nodes["a"].status is NodeStatus.ALIVE


def test_a_restarted_node_supersedes_its_earlier_self() -> None:
    log = Log()
    log.ok(node("a"))
    log.ok(submit())
    log.incarnation, log.sequence = 2, 0
    log.ok(node("a", incarnation=2))
    assert log(form("job-1", 1, members("a", "a"))).outcome.error == "stale-node"
    log.incarnation = 1
    assert log(node("a", incarnation=1)).outcome.error == "stale-proposer"
    assert log.state.nodes["a"].incarnation == 2


class TestManyNodes:
    def test_the_one_that_has_been_gone_for_longest_makes_room(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nodes, "MAX_NODES", 3)
        log = Log()
        for name in "abc":
            log.ok(node(name))
        assert log(node("d")).outcome.error == "too-many-requests"
        for name, status in (("b", NodeStatus.LOST), ("a", NodeStatus.LEFT)):
            log.ok(c.SetNodeStatus(name=name, incarnation=1, status=status, reason="gone"))
        log.ok(node("d"))
        assert sorted(log.state.nodes) == ["a", "c", "d"]
        log.ok(node("d", incarnation=2))
        assert sorted(log.state.nodes) == ["a", "c", "d"], "who is known needs no room"

    def test_a_node_whose_rank_may_still_run_is_not_forgotten(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nodes, "MAX_NODES", 1)
        log = Log()
        log.ok(node("a"))
        log.ok(submit("job-1"))
        log.ok(form("job-1", 1, members("a")))
        log.ok(c.SetNodeStatus(name="a", incarnation=1, status=NodeStatus.LOST, reason="gone"))
        assert log(node("b")).outcome.error == "too-many-requests"


class TestClientWrites:
    def test_cancel_ends_an_active_job_and_is_idempotent(self) -> None:
        log = running(Log())
        for _ in range(2):
            log.ok(c.CancelJob(job_id="job-1", reason="by request"))
        assert log.job().status is JobStatus.CANCELLED
        log.ok(c.RemoveJob(job_id="job-1"))
        assert "job-1" not in log.state.jobs

    def test_an_active_job_cannot_be_removed(self) -> None:
        log = running(Log())
        assert log(c.RemoveJob(job_id="job-1")).outcome.error == "conflict"

    @pytest.mark.parametrize("command", [c.CancelJob, c.StopJob])
    def test_unknown_and_finished_jobs(self, command: type) -> None:
        log = running(Log())
        assert log(command(job_id="nope", reason="")).outcome.error == "not-found"
        log.ok(c.FinishRun(job_id="job-1", generation=1, status=JobStatus.COMPLETED, reason="x"))
        assert log(command(job_id="job-1", reason="")).outcome.error == "conflict"

    def test_stop_asks_a_running_job_and_ends_a_waiting_one(self) -> None:
        log = running(Log())
        log.ok(c.StopJob(job_id="job-1", reason="stopping"))
        assert (log.job().status, log.job().stop_requested) == (JobStatus.STOPPING, True)
        log.ok(submit("job-2"))
        log.ok(c.StopJob(job_id="job-2", reason="stopping"))
        assert log.job("job-2").status is JobStatus.CANCELLED

    def test_the_same_key_has_one_effect_and_another_body_is_refused(self) -> None:
        log = Log()
        first = c.SubmitJob(
            job_id="job-1", run_id="r", spec=submit().spec, key="k", request_sha256="x"
        )
        again = c.SubmitJob(
            job_id="job-2", run_id="r", spec=submit().spec, key="k", request_sha256="x"
        )
        other = c.SubmitJob(
            job_id="job-3", run_id="r", spec=submit().spec, key="k", request_sha256="y"
        )
        log.ok(first)
        replayed = log.ok(again).outcome
        assert (replayed.job_id, replayed.replayed) == ("job-1", True)
        assert log(other).outcome.error == "idempotency-key-reused"
        assert list(log.state.jobs) == ["job-1"]

    def test_full_house_makes_room_only_by_forgetting_finished_jobs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "MAX_JOBS", 2)
        log = Log()
        log.ok(submit("job-1"))
        log.ok(submit("job-2"))
        assert log(submit("job-3")).outcome.error == "too-many-requests"
        log.ok(c.CancelJob(job_id="job-2", reason=""))
        told = log.ok(submit("job-3")).events
        assert [(event.type, event.job_id) for event in told] == [
            ("removed", "job-2"),
            ("state", "job-3"),
        ]
        assert list(log.state.jobs) == ["job-1", "job-3"]

    def test_what_is_kept_of_a_job_that_has_ended_is_small(self) -> None:
        log = running(Log())
        for generation in range(1, 101):
            log.ok(fail("job-1", generation, cause=_LOUD, reason="r" * 500, highest_step=0))
            log.ok(form("job-1", generation + 1, members("a", "b")))
        before = log.job().incidents
        log.ok(c.CancelJob(job_id="job-1", reason="enough"))
        kept = log.job().incidents
        assert [one.number for one in kept] == [before[0].number, *range(86, 101)]
        assert [one.number for one in kept if one.cause.traceback] == [before[0].number, 100]
        assert [one.number for one in kept if one.cause.last_lines] == [before[0].number, 100]
        assert (kept[0], kept[-1]) == (before[0], before[-1])
        assert log.job().failures == 100
        assert log.job().size_bytes == pytest.approx(len(msgspec.msgpack.encode(log.job())), abs=9)
        assert log.job().size_bytes < 64 * 1024

    def test_the_output_that_is_kept_is_that_of_the_first_and_the_last_that_said_anything(
        self,
    ) -> None:
        log = running(Log())
        silent = Cause(kind=FailureKind.NODE_LEFT, node="b")
        for generation, cause in enumerate((silent, _LOUD, _LOUD, _LOUD, silent), 1):
            log.ok(fail("job-1", generation, cause=cause))
            log.ok(form("job-1", generation + 1, members("a", "b")))
        log.ok(c.CancelJob(job_id="job-1", reason="enough"))
        assert [one.number for one in log.job().incidents if one.cause.last_lines] == [2, 4]

    @pytest.mark.parametrize("how", ["cancelled", "failed", "imported"])
    def test_jobs_that_have_ended_make_room_for_newer_ones_by_their_bytes(
        self, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        log = running(Log(), "job-1")
        log.ok(fail("job-1", 1, cause=_LOUD))
        log.ok(c.CancelJob(job_id="job-1", reason=""))
        log.ok(submit("waits"))
        log.ok(submit("job-2"))
        monkeypatch.setattr(change, "MAX_ENDED_BYTES", log.job("job-1").size_bytes)
        assert not [one for one in log.applied[-1].events if one.type == "removed"]
        ends = {
            "cancelled": c.CancelJob(job_id="job-2", reason=""),
            "failed": c.FinishRun(
                job_id="job-2", generation=0, status=JobStatus.FAILED, reason="no room for it"
            ),
            "imported": imports("job-3", 10),
        }
        told = log.ok(ends[how]).events
        assert ("removed", "job-1") in [(one.type, one.job_id) for one in told]
        assert "job-1" not in log.state.jobs
        assert {"waits", "job-2"} <= log.state.jobs.keys()
        assert decode_state(encode_state(log.state)) == log.state


class TestExactlyOnce:
    def test_a_repeated_entry_is_answered_from_memory(self) -> None:
        log = Log()
        entry = c.Entry("a", 1, 7, 7, 0.0, submit())
        first = log.entry(entry)
        again = log.entry(entry)
        assert again.outcome == first.outcome
        assert again.events == ()
        assert len(log.state.jobs) == 1

    def test_out_of_order_sequences_are_each_applied(self) -> None:
        log = Log()
        log.entry(c.Entry("a", 1, 2, 1, 0.0, submit("job-2")))
        log.entry(c.Entry("a", 1, 1, 1, 0.0, submit("job-1")))
        assert set(log.state.jobs) == {"job-1", "job-2"}

    def test_a_settled_sequence_is_never_applied_again(self) -> None:
        log = Log()
        log.ok(submit("job-1"))
        log.ok(c.CancelJob(job_id="job-1", reason=""))
        log.ok(c.RemoveJob(job_id="job-1"))
        log.entry(c.Entry("a", 1, 9, 9, 0.0, node("a")))
        assert log.entry(c.Entry("a", 1, 1, 1, 0.0, submit("job-1"))).outcome.error
        assert log.state.jobs == {}

    def test_a_proposal_of_an_earlier_life_has_no_effect_however_late_it_comes(self) -> None:
        log = Log()
        log.entry(c.Entry("a", 2, 1, 1, 0.0, node("a", incarnation=2)))
        late = log.entry(c.Entry("a", 1, 99, 99, 0.0, submit("job-1")))
        assert late.outcome.error == "stale-proposer"
        assert log.state.jobs == {}

    def test_memory_of_results_is_bounded(self) -> None:
        log = Log()
        for sequence in range(1, state.MAX_OUTSTANDING + 50):
            log.entry(c.Entry("a", 1, sequence, 1, 0.0, node("a")))
        assert len(log.state.proposers["a"].outcomes) == state.MAX_OUTSTANDING

    @given(st.lists(st.integers(0, 5), max_size=30))
    def test_any_repetition_gives_the_same_jobs(self, order: list[int]) -> None:
        entries = [c.Entry("a", 1, n, 0, 0.0, submit(f"job-{n}")) for n in range(6)]
        log = Log()
        for position in order:
            log.entry(entries[position])
        assert set(log.state.jobs) == {f"job-{n}" for n in order}


class TestRequestedCheckpoints:
    def test_each_request_counts_until_a_checkpoint_answers_it(self) -> None:
        log = running(Log())
        for _ in range(2):
            log.ok(c.RequestCheckpoint(job_id="job-1"))
        assert (log.job().save_request, log.job().is_to_save) == (2, True)
        log.ok(commit(10, save_request=1))
        assert log.job().is_to_save, "that one was taken before the second request"
        log.ok(commit(11, save_request=2))
        assert not log.job().is_to_save

    def test_a_retry_under_the_same_key_is_one_request(self) -> None:
        log = running(Log())
        for _ in range(2):
            log.ok(c.RequestCheckpoint(job_id="job-1", key="k", request_sha256="x"))
        assert log.job().save_request == 1

    def test_it_is_refused_where_nothing_can_come_of_it(self) -> None:
        log = Log()
        log.ok(submit("off", checkpointing=Checkpointing(enabled=False)))
        for job_id, said in (("off", "enabled false"), ("none", "no job")):
            outcome = log(c.RequestCheckpoint(job_id=job_id)).outcome
            assert outcome.error
            assert said in outcome.detail
        log.ok(submit("queued"))
        assert "QUEUED" in log(c.RequestCheckpoint(job_id="queued")).outcome.detail
        running(log)
        log.ok(c.StopJob(job_id="job-1", reason="r"))
        assert "final checkpoint" in log(c.RequestCheckpoint(job_id="job-1")).outcome.detail

    def test_a_checkpoint_cannot_answer_what_was_never_asked(self) -> None:
        log = running(Log())
        log.ok(commit(10, save_request=9))
        assert log.job().saved_request == 0


class TestRetirement:
    def test_what_is_needed_stays_whatever_is_said(self) -> None:
        log = running(Log())
        for step in (10, 20):
            log.ok(commit(step))
        log.ok(commit(30, refers_to=(checkpoint(10).directory,)))
        told = log.ok(c.RetireCheckpoints(job_id="job-1", steps=(10, 20, 30), reason="r")).events
        assert [one.step for one in log.job().checkpoints] == [10, 30]
        assert [(event.type, event.data["step"]) for event in told] == [("checkpoint_retired", 20)]

    def test_a_chain_of_references_stays_whole(self) -> None:
        log = running(Log())
        log.ok(commit(10))
        log.ok(commit(20, refers_to=(checkpoint(10).directory,)))
        log.ok(commit(30, refers_to=(checkpoint(20).directory,)))
        log.ok(c.RetireCheckpoints(job_id="job-1", steps=(10, 20), reason="r"))
        assert [one.step for one in log.job().checkpoints] == [10, 20, 30]

    def test_a_delta_on_what_is_gone_or_corrupt_is_refused(self) -> None:
        log = running(Log())
        for step in (10, 20, 30):
            log.ok(commit(step))
        log.ok(c.RetireCheckpoints(job_id="job-1", steps=(10,), reason="r"))
        log.ok(
            c.MarkCheckpointCorrupt(
                job_id="job-1", step=20, manifest_sha256="ab" * 32, reason="bad"
            )
        )
        for step in (10, 20):
            late = commit(40, refers_to=(checkpoint(step).directory,))
            assert log(late).outcome.error == "conflict"
        log.ok(commit(40, refers_to=(checkpoint(30).directory,)))

    def test_a_commit_behind_the_newest_is_refused(self) -> None:
        log = running(Log())
        log.ok(commit(20))
        assert "behind" in log(commit(10)).outcome.detail

    def test_a_late_commit_behind_one_that_was_found_corrupt_is_refused(self) -> None:
        """While that one was good, the files of the late one were garbage."""
        log = running(Log())
        log.ok(commit(10))
        log.ok(commit(30))
        log.ok(fail("job-1", 1))
        log.ok(form("job-1", 2, members("a", "b"), checkpoint_step=30, resume_step=30))
        log.ok(
            c.MarkCheckpointCorrupt(
                job_id="job-1",
                step=30,
                manifest_sha256=checkpoint(30).manifest_sha256,
                reason="r",
            )
        )
        assert "behind step 30" in log(commit(20)).outcome.detail
        log.ok(fail("job-1", 2))
        log.ok(form("job-1", 3, members("a", "b"), checkpoint_step=10, resume_step=10))
        log.ok(commit(20, 3))

    def test_the_source_of_the_generation_stays(self) -> None:
        log = running(Log())
        log.ok(commit(10))
        log.ok(fail("job-1", 1))
        log.ok(form("job-1", 2, members("a", "b"), checkpoint_step=10))
        log.ok(commit(20, 2))
        log.ok(c.RetireCheckpoints(job_id="job-1", steps=(10,), reason="r"))
        assert [one.step for one in log.job().checkpoints] == [10, 20]

    def test_the_oldest_that_may_go_make_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "MAX_CHECKPOINTS", 2)
        log = running(Log())
        log.ok(commit(10))
        log.ok(commit(20))
        told = log.ok(commit(30, refers_to=(checkpoint(10).directory,))).events
        assert [one.step for one in log.job().checkpoints] == [10, 30]
        assert "checkpoint_retired" in [event.type for event in told]
        full = commit(40, refers_to=(checkpoint(10).directory, checkpoint(30).directory))
        assert log(full).outcome.error == "conflict"
        assert log.job().newest_checkpoint().step == 30


class TestRemovedCheckpoints:
    def test_any_but_the_needed_ones_may_be_removed(self) -> None:
        log = running(Log())
        for step in (10, 20):
            log.ok(commit(step))
        log.ok(commit(30, refers_to=(checkpoint(20).directory,)))
        for step, said in ((30, "newest"), (20, "step 30 refers"), (99, "no checkpoint")):
            outcome = log(c.RemoveCheckpoint(job_id="job-1", step=step)).outcome
            assert outcome.error
            assert said in outcome.detail
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=10))
        assert log.job().removed == (checkpoint(10).directory,)

    def test_one_that_is_saved_again_is_removed_no_more(self) -> None:
        log = running(Log())
        for step in (10, 20):
            log.ok(commit(step))
        sha256 = checkpoint(20).manifest_sha256
        corrupt = c.MarkCheckpointCorrupt(
            job_id="job-1", step=20, manifest_sha256=sha256, reason="r"
        )
        log.ok(corrupt)
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=20))
        assert log.job().removed == (checkpoint(20).directory,)
        log.ok(commit(20))
        assert log.job().removed == ()

    def test_of_a_finished_job_the_newest_too(self) -> None:
        log = running(Log())
        log.ok(commit(10))
        log.ok(c.FinishRun(job_id="job-1", generation=1, status=JobStatus.COMPLETED, reason="x"))
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=10))
        assert log.job().checkpoints == ()


class TestInitFrom:
    def finished(self) -> Log:
        log = running(Log())
        for step in (10, 20):
            log.ok(commit(step))
        log.ok(c.FinishRun(job_id="job-1", generation=1, status=JobStatus.COMPLETED, reason="x"))
        return log

    def test_the_checkpoint_is_resolved_at_submit_and_kept_while_the_job_lives(self) -> None:
        log = self.finished()
        log.ok(submit("job-2", init_from=InitFrom(job="job-1", step=10)))
        assert log.job("job-2").initial.step == 10
        assert "job-2" in log(c.RemoveCheckpoint(job_id="job-1", step=10)).outcome.detail
        log.ok(c.CancelJob(job_id="job-2", reason="r"))
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=10))
        log.ok(submit("job-3", init_from=InitFrom(job="job-1")))
        assert log.job("job-3").initial.step == 20

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"init_from": InitFrom(job="nope")}, "init_from.job"),
            ({"init_from": InitFrom(job="job-1", step=15)}, "init_from.step"),
            ({"init_from": InitFrom(job="job-1", step=20), "steps": 20}, "weights_only"),
        ],
    )
    def test_what_cannot_be_begun_with_is_refused(self, fields: dict[str, Any], said: str) -> None:
        outcome = self.finished()(submit("job-2", **fields)).outcome
        assert outcome.error == "invalid-spec"
        assert said in outcome.detail

    def test_a_corrupt_one_is_marked_where_it_is_read(self) -> None:
        log = self.finished()
        log.ok(submit("job-2", init_from=InitFrom(job="job-1")))
        log.ok(
            c.MarkCheckpointCorrupt(
                job_id="job-2", step=20, manifest_sha256="ab" * 32, reason="bad"
            )
        )
        assert log.job("job-2").initial.status is CheckpointStatus.CORRUPT


class TestImport:
    def test_it_is_additive_and_repeatable(self) -> None:
        log = Log()
        for steps in ((10, 20), (20, 30), (10, 20)):
            log.ok(imports("job-9", *steps))
        job = log.job("job-9")
        assert ([one.step for one in job.checkpoints], job.status) == (
            [10, 20, 30],
            JobStatus.COMPLETED,
        )
        log.ok(submit("job-2", init_from=InitFrom(job="job-9", step=30)))

    def test_nothing_is_imported_over_a_job_that_is_known(self) -> None:
        log = running(Log())
        assert log(imports("job-1", 10)).outcome.error == "conflict"
        log.ok(imports("job-9", 10))
        other = imports("job-9", 10, digest="cd" * 32)
        assert log(other).outcome.error == "conflict"


_STATUSES = st.sampled_from(list(JobStatus))
_GENERATION = st.integers(1, 3)
_JOB = st.sampled_from(["job-1", "job-2", "nope"])
_COMMANDS = st.one_of(
    st.builds(submit, st.sampled_from(["job-1", "job-2"])),
    st.builds(
        lambda j, lenient: c.CancelJob(job_id=j, reason="r", if_active=lenient), _JOB, st.booleans()
    ),
    st.builds(lambda j: c.StopJob(job_id=j, reason="r"), _JOB),
    st.builds(lambda j: c.RemoveJob(job_id=j), _JOB),
    st.builds(lambda j, g: form(j, g, members("a", "b")), _JOB, _GENERATION),
    st.builds(lambda j, g: c.MarkRunning(job_id=j, generation=g, total_steps=9), _JOB, _GENERATION),
    st.builds(fail, _JOB, _GENERATION),
    st.builds(lambda j, g: c.BeginCheckpoint(job_id=j, generation=g, step=g), _JOB, _GENERATION),
    st.builds(
        lambda j, g, s: c.CommitCheckpoint(job_id=j, generation=g, checkpoint=checkpoint(s, g)),
        _JOB,
        _GENERATION,
        st.integers(1, 3),
    ),
    st.builds(
        lambda j, g: c.AbandonCheckpoint(job_id=j, generation=g, step=g, reason="r"),
        _JOB,
        _GENERATION,
    ),
    st.builds(
        lambda j, g, s: c.FinishRun(job_id=j, generation=g, status=s, reason="r"),
        _JOB,
        _GENERATION,
        _STATUSES,
    ),
    st.builds(
        lambda s, drained: c.SetNodeStatus(
            name="b", incarnation=1, status=s, reason="r", drained=drained
        ),
        st.sampled_from(list(NodeStatus)),
        st.sampled_from((None, True, False)),
    ),
    st.builds(lambda j: c.RequestCheckpoint(job_id=j), _JOB),
    st.builds(
        lambda j, steps: c.RetireCheckpoints(job_id=j, steps=tuple(steps), reason="r"),
        _JOB,
        st.lists(st.integers(1, 6), max_size=4),
    ),
    st.builds(lambda j, s: c.RemoveCheckpoint(job_id=j, step=s), _JOB, st.integers(1, 6)),
    st.builds(lambda j, steps: imports(j, *steps), _JOB, st.lists(st.integers(1, 6), max_size=3)),
    st.builds(
        lambda j, g, s, refers: c.CommitCheckpoint(
            job_id=j, generation=g, checkpoint=replace(checkpoint(s, g), refers_to=refers)
        ),
        _JOB,
        _GENERATION,
        st.integers(4, 6),
        st.sampled_from([(), (checkpoint(2).directory,), (checkpoint(3).directory,)]),
    ),
    st.builds(
        lambda j, s: c.MarkCheckpointCorrupt(
            job_id=j, step=s, manifest_sha256="ab" * 32, reason="r"
        ),
        _JOB,
        st.integers(1, 6),
    ),
)


def _newest_stays(earlier: Job, job: Job) -> None:
    before, after = earlier.newest_checkpoint(), job.newest_checkpoint()
    assert before is None or (after is not None and after.step >= before.step)


@settings(max_examples=300)
@given(st.lists(_COMMANDS, max_size=40))
def test_every_history_obeys_the_table_and_replays_to_the_same_bytes(
    commands: list[c.AnyCommand],
) -> None:
    log = Log()
    log.ok(node("a", slots=2))
    log.ok(node("b", slots=2))
    for command in commands:
        before = log.state
        log(command)
        for job_id, job in log.state.jobs.items():
            earlier = before.jobs.get(job_id)
            if earlier is not None and earlier.status is not job.status:
                assert job.status in TRANSITIONS[earlier.status]
            if earlier is not None:
                assert job.generation_number >= earlier.generation_number
                assert job.saved_request <= job.save_request
                names = {one.directory for one in job.checkpoints}
                assert all(ref in names for one in job.checkpoints for ref in one.refers_to)
                if not isinstance(command, c.RemoveCheckpoint | c.MarkCheckpointCorrupt):
                    _newest_stays(earlier, job)
            assert (job.status in TERMINAL) == (job.finished_at is not None)
        for name, used in log.state.slots_used().items():
            assert used <= log.state.nodes[name].slots
    again = ClusterState()
    for index, applied in enumerate(log.applied, start=1):
        assert applied.state.index == index
    replayed = Log()
    replayed.ok(node("a", slots=2))
    replayed.ok(node("b", slots=2))
    for command in commands:
        replayed(command)
    again = replayed.state
    assert encode_state(again) == encode_state(log.state)
    assert decode_state(encode_state(log.state)) == log.state
