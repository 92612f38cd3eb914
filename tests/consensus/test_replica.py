"""The live state of a node: every entry once, listeners told whatever they do, memory bounded."""

from __future__ import annotations

import pytest

from distroml import commands as c
from distroml.commands import Entry, Outcome, encode_entry
from distroml.consensus import replica as module
from distroml.consensus.raft_types import UnreadableEntry
from distroml.consensus.replica import Replica
from distroml.model import Event
from tests.builders import node, submit

Told = list[tuple[Entry | None, Outcome, tuple[Event, ...]]]


class Log:
    """A replica and what its listener was told."""

    def __init__(self) -> None:
        self.replica = Replica()
        self.told: Told = []
        self.replica.listen(lambda *told: self.told.append(told))
        self.index = 0

    def __call__(self, command: c.AnyCommand) -> None:
        self.index += 1
        self.replica.apply(self.index, self.entry(command))

    def entry(self, command: c.AnyCommand) -> bytes:
        return encode_entry(Entry("a", 1, self.index, self.index, float(self.index), command))

    def events(self, job_id: str) -> list[str]:
        return [str(e.data.get("status", e.type)) for e in self.replica.recent_events(job_id)]


def test_listeners_hear_of_each_entry_with_its_outcome_and_events() -> None:
    log = Log()
    log(submit("x"))
    log(c.CancelJob(job_id="nobody", reason="r"))
    (first, ok, events), (second, refused, none) = log.told
    assert first is not None
    assert second is not None
    assert (ok.index, ok.error, ok.job_id) == (1, "", "x")
    assert [event.type for event in events] == ["state"]
    assert (refused.index, refused.error, none) == (2, "not-found", ())
    assert log.replica.state.index == 2


def test_an_entry_that_is_handed_over_again_after_a_restart_is_applied_once() -> None:
    log = Log()
    log(submit("x"))
    before = log.replica.state
    log.replica.apply(1, log.entry(submit("y")))
    assert log.replica.state is before
    assert len(log.told) == 1


NEWER = encode_entry(Entry("a", 1, 2, 2, 2.0, submit("y"))).replace(b"SubmitJob", b"ShapeJobs")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 100_000, b"\x00" * 64, NEWER])
def test_an_entry_that_cannot_be_read_is_not_passed_over(data: bytes) -> None:
    log = Log()
    log(submit("x"))
    before, told = log.replica.state, len(log.told)
    with pytest.raises(UnreadableEntry, match=r"entry 2 .* newer version .* upgrade this node"):
        log.replica.apply(2, data)
    assert log.replica.state is before
    assert len(log.told) == told


def test_a_listener_that_fails_stops_neither_the_log_nor_the_others() -> None:
    log = Log()
    heard: list[int] = []

    def fails(*_: object) -> None:
        raise RuntimeError("defect")

    log.replica.listen(fails)
    log.replica.listen(lambda entry, outcome, events: heard.append(outcome.index))
    log(submit("x"))
    log(submit("y"))
    assert heard == [1, 2]
    assert set(log.replica.state.jobs) == {"x", "y"}


def test_a_snapshot_gives_the_same_state_elsewhere_and_is_told() -> None:
    log, other = Log(), Log()
    for command in (node("a"), submit("x"), submit("y")):
        log(command)
    other.replica.restore(3, log.replica.snapshot())
    assert other.replica.state == log.replica.state
    assert other.replica.snapshot() == log.replica.snapshot()
    assert other.told == [(None, Outcome(3), ())]


def test_an_older_snapshot_changes_nothing() -> None:
    log = Log()
    log(submit("x"))
    old = log.replica.snapshot()
    log(submit("y"))
    log.replica.restore(1, old)
    assert set(log.replica.state.jobs) == {"x", "y"}


@pytest.mark.parametrize("blob", [b"", b"\xc0", b"\x82\xa6format\x09\xa5state\x80"])
def test_a_snapshot_that_cannot_be_read_changes_nothing(blob: bytes) -> None:
    log = Log()
    log(submit("x"))
    before = log.replica.state
    with pytest.raises(ValueError, match="snapshot"):
        log.replica.restore(9, blob)
    assert log.replica.state is before


class TestRecentEvents:
    def test_they_are_kept_in_order_per_job_up_to_a_limit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_EVENTS_PER_JOB", 2)
        log = Log()
        log(submit("x"))
        log(submit("y"))
        log(c.CancelJob(job_id="x", reason="r"))
        assert log.events("x") == ["QUEUED", "CANCELLED"]
        assert log.events("y") == ["QUEUED"]
        assert log.events("nobody") == []

    def test_they_go_with_their_job(self) -> None:
        log = Log()
        log(submit("x"))
        log(c.CancelJob(job_id="x", reason="r"))
        log(c.RemoveJob(job_id="x"))
        assert log.events("x") == []

    def test_they_go_also_where_a_snapshot_skipped_the_removal(self) -> None:
        log, behind = Log(), Log()
        behind(submit("x"))
        for command in (
            submit("x"),
            c.CancelJob(job_id="x", reason="r"),
            c.RemoveJob(job_id="x"),
        ):
            log(command)
        behind.replica.restore(3, log.replica.snapshot())
        assert behind.events("x") == []

    def test_they_go_where_a_snapshot_skipped_some(self) -> None:
        log, behind = Log(), Log()
        for command in (submit("x"), submit("y")):
            log(command)
            behind(command)
        log(c.CancelJob(job_id="x", reason="r"))
        behind.replica.restore(3, log.replica.snapshot())
        assert behind.events("x") == []
        assert behind.events("y") == ["QUEUED"]

    def test_all_jobs_together_are_bounded_and_the_quietest_ones_lose_first(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_EVENTS", 4)
        log = Log()
        for job_id in ("quiet", "busy", "new"):
            log(submit(job_id))
        log(c.CancelJob(job_id="busy", reason="r"))
        assert log.events("quiet") == ["QUEUED"]
        log(submit("newest"))
        assert log.events("quiet") == []
        assert log.events("busy") == ["QUEUED", "CANCELLED"]
        log(c.RemoveJob(job_id="busy"))
        log(submit("another"))
        assert [log.events(job) for job in ("new", "newest", "another")] == [["QUEUED"]] * 3
