"""The state machine: pure, total, exactly once, and true to the table of transitions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml import commands as c
from distroml.consensus import machine, state
from distroml.consensus.handlers import jobs, nodes
from distroml.consensus.state import ClusterState, decode_state, encode_state
from distroml.model import (
    TERMINAL,
    TRANSITIONS,
    Cause,
    CheckpointStatus,
    FailureKind,
    JobStatus,
    NodeStatus,
    Result,
)
from tests.builders import Log, checkpoint, fail, form, members, node, running, submit

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
    log.ok(c.MarkRunning(job_id="job-1", generation=2, total_steps=100), at=100.5)
    incident = log.job().incidents[-1]
    assert incident.steps_lost == 2
    assert incident.phases_ms == {"detect": 100.0, "form": 200.0, "start": 300.0, "total": 600.0}
    assert incident.next_generation == 2


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


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_alike_and_never_raise(data: bytes) -> None:
    applied = machine.apply(ClusterState(), 1, data)
    assert applied.outcome.error
    assert applied.state.index == 1
    assert applied.state.jobs == {}


_STATUSES = st.sampled_from(list(JobStatus))
_GENERATION = st.integers(1, 3)
_JOB = st.sampled_from(["job-1", "job-2", "nope"])
_COMMANDS = st.one_of(
    st.builds(submit, st.sampled_from(["job-1", "job-2"])),
    st.builds(lambda j: c.CancelJob(job_id=j, reason="r"), _JOB),
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
        lambda s: c.SetNodeStatus(name="b", incarnation=1, status=s, reason="r"),
        st.sampled_from(list(NodeStatus)),
    ),
)


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
                assert {one.step for one in job.checkpoints} >= {
                    one.step for one in earlier.checkpoints
                }
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
