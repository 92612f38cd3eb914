"""When an incident closes, which node makes its trace, and what is in it."""

from __future__ import annotations

from msgspec.structs import replace

from distroml import commands as c
from distroml.model import JobStatus
from distroml.runtime.incident_traces import IncidentTrace, IncidentWatch
from tests.builders import Log, fail, form, members, node, submit


class Cluster:
    """A log, and what nodes a, b and a restarted a make of it; entries are proposed by ``proposer``."""

    def __init__(self) -> None:
        self.log = Log()
        self.made: list[tuple[str, IncidentTrace]] = []
        self._watches = [
            IncidentWatch(
                name,
                incarnation,
                lambda: self.log.state,
                lambda trace, who=f"{name}{incarnation}": self.made.append((who, trace)),  # type: ignore[misc]
            )
            for name, incarnation in (("a", 1), ("b", 1), ("a", 2))
        ]
        for name in "ab":
            self.says("a", node(name))
        self.says("a", submit())
        self.says("a", form("job-1", 1, members("a", "b")))
        self.says("a", c.MarkRunning(job_id="job-1", generation=1, total_steps=100))

    def says(self, proposer: str, command: c.AnyCommand, at: float | None = None) -> None:
        self.log.proposer = proposer
        self.log.sequence += 1
        number = self.log.sequence
        when = float(number) if at is None else at
        self.apply(c.Entry(proposer, 1, number, number, when, command))

    def apply(self, entry: c.Entry) -> None:
        applied = self.log.entry(entry)
        for watch in self._watches:
            watch.on_applied(entry, applied.outcome, applied.events)

    def breaks(self, generation: int = 1, at: float = 100.5) -> None:
        self.says("a", fail("job-1", generation, observed_at=100.0, highest_step=10), at)

    def recovers(self, by: str, generation: int = 2) -> None:
        self.says("a", form("job-1", generation, members("a", "b"), resume_step=8), 101.0)
        running = c.MarkRunning(
            job_id="job-1",
            generation=generation,
            total_steps=100,
            left_at=100.75,
            met_at=101.5,
            restored_at=102.0,
            resume_step=8,
            source="rank 1",
        )
        self.says("a", running)
        self.steps(by, generation)

    def steps(self, by: str, generation: int = 2) -> None:
        self.says(
            by, c.MarkStepped(job_id="job-1", generation=generation, stepped_at=103.0), 103.25
        )


def test_a_recovery_is_a_trace_with_a_span_for_each_phase() -> None:
    cluster = Cluster()
    cluster.breaks()
    cluster.recovers("a")
    ((_, trace),) = cluster.made
    assert (trace.root.name, trace.root.began_at, trace.root.ended_at) == ("recovery", 100.0, 103.0)
    spans = [(one.name, one.began_at, one.ended_at) for one in trace.phases]
    assert spans == [
        ("detect", 100.0, 100.5),
        ("decide", 100.5, 101.0),
        ("abort", 101.0, 101.0),
        ("rendezvous", 101.0, 101.5),
        ("restore", 101.5, 102.0),
        ("first_step", 102.0, 103.0),
    ]
    attributes = dict(trace.root.attributes)
    assert attributes.pop("distroml.incident.reason").startswith("generation 1: worker 0")  # type: ignore[union-attr]
    assert attributes == {
        "distroml.job.id": "job-1",
        "distroml.job.name": cluster.log.job().name,
        "distroml.run.id": "run-job-1",
        "distroml.generation": 1,
        "distroml.next_generation": 2,
        "distroml.incident.number": 1,
        "distroml.incident.outcome": "recovered",
        "distroml.steps_lost": 2,
        "distroml.resume_step": 8,
        "distroml.state_source": "rank 1",
        "distroml.collateral_ranks": (1,),
        "distroml.cause.kind": "exit",
        "distroml.cause.rank": 0,
        "distroml.cause.node": "a",
        "distroml.cause.signal": "SIGKILL",
    }
    assert trace.error == ""
    ids = [trace.root.span_id, *(one.span_id for one in trace.phases)]
    assert len({trace.trace_id, *ids}) == 8


def test_it_is_made_once_by_whoever_said_that_it_is_over() -> None:
    cluster = Cluster()
    cluster.breaks()
    cluster.recovers("b")
    assert [who for who, _ in cluster.made] == ["b1"], "a led when it began, b when it ended"
    cluster.steps("a")
    assert len(cluster.made) == 1, "the leader before had said so too"


def test_an_entry_that_is_offered_again_closes_nothing_again() -> None:
    cluster = Cluster()
    cluster.breaks()
    cluster.recovers("a")
    number = cluster.log.sequence
    stepped = c.MarkStepped(job_id="job-1", generation=2, stepped_at=103.0)
    cluster.apply(c.Entry("a", 1, number, number, 103.25, stepped))
    assert len(cluster.made) == 1


def test_two_nodes_would_make_the_same_trace() -> None:
    both = []
    for by in "ab":
        cluster = Cluster()
        cluster.breaks()
        cluster.recovers(by)
        both.append(cluster.made[0][1])
    assert both[0] == both[1]


def test_one_that_another_failure_overtakes_did_not_recover() -> None:
    cluster = Cluster()
    cluster.breaks()
    cluster.says("a", form("job-1", 2, members("a", "b")), 101.0)
    assert cluster.made == []
    cluster.breaks(2, at=104.0)
    ((_, trace),) = cluster.made
    assert trace.root.attributes["distroml.incident.outcome"] == "failed_again"
    assert "incident 2 came before" in trace.error
    assert [one.name for one in trace.phases] == ["detect", "decide"]
    assert trace.root.ended_at == 104.0
    cluster.recovers("a", 3)
    assert [one.root.attributes["distroml.incident.number"] for _, one in cluster.made] == [1, 2]


def test_a_run_that_fails_or_is_cancelled_closes_its_last_one() -> None:
    cluster = Cluster()
    cluster.breaks()
    cluster.says("b", c.CancelJob(job_id="job-1", reason="enough"), 105.0)
    ((who, trace),) = cluster.made
    assert (who, trace.error) == ("b1", "")
    assert trace.root.attributes["distroml.incident.outcome"] == "cancelled"
    assert trace.root.ended_at == 105.0

    cluster = Cluster()
    broken = fail("job-1", 1, observed_at=100.0)
    finish = c.FinishRun(
        job_id="job-1",
        generation=1,
        status=JobStatus.FAILED,
        reason="max_restarts",
        cause=broken.cause,
        observed_at=100.0,
    )
    cluster.says("a", finish, 101.0)
    ((_, trace),) = cluster.made
    assert (trace.error, trace.root.ended_at) == ("max_restarts", 101.0)
    assert trace.root.attributes["distroml.incident.outcome"] == "failed"


def test_clocks_that_disagree_give_no_negative_span() -> None:
    cluster = Cluster()
    cluster.breaks(at=99.0)
    cluster.recovers("a")
    ((_, trace),) = cluster.made
    spans = (trace.root, *trace.phases)
    assert all(one.began_at <= one.ended_at for one in spans)
    assert all(one.ended_at <= trace.root.ended_at for one in trace.phases)
    incident = cluster.log.job().incidents[0]
    lasted_ms = {one.name: round((one.ended_at - one.began_at) * 1000, 1) for one in trace.phases}
    assert lasted_ms | {"total": 3000.0} == incident.phases_ms


def test_a_snapshot_closes_nothing() -> None:
    cluster = Cluster()
    cluster.breaks()
    watch = cluster._watches[0]
    job = cluster.log.job()
    over = replace(job.incidents[0], next_generation=2, first_step_at=103.0)
    jobs = {"job-1": replace(job, incidents=(over,))}
    cluster.log.state = replace(cluster.log.state, jobs=jobs)
    watch.on_applied(None, c.Outcome(99), ())
    cluster.says("a", c.CancelJob(job_id="job-1", reason="enough"))
    assert cluster.made == []
