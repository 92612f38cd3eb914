"""What the leader passes on between learners: keys at once, the rest now and then, nothing of others."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from distroml.consensus.frames import Channel
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime import report_relay as module
from distroml.runtime.observations import Observations
from distroml.runtime.report_relay import PASS_ON_MOST_S, PASS_ON_S, ReportRelay

FACT = WorkerFact(
    job_id="job-1",
    run_id="run-1",
    generation=1,
    rank=0,
    phase=WorkerPhase.CONNECTING,
    step=0,
    started_at=0.0,
)


def report(node: str, sequence: int = 1, *workers: WorkerFact) -> NodeReport:
    return NodeReport(node=node, incarnation=1, sequence=sequence, at=0.0, slots=1, workers=workers)


class Scene:
    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.learners = {"x", "y", "z"}
        self.leads = True
        self.now_s = 0.0
        self.relay = ReportRelay(
            links=self,
            learners=self.learners.__contains__,
            leads=lambda: self.leads,
            monotonic=lambda: self.now_s,
        )

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        assert channel is Channel.REPORT
        self.sent.append((peer, body))
        return True

    def take(self, report: NodeReport) -> dict[str, set[str]]:
        """Who was told of whom, as the receivers understand it."""
        self.sent.clear()
        self.relay.take(report, msgspec.msgpack.encode(report))
        told: dict[str, set[str]] = {}
        for peer, body in self.sent:
            heard = Observations(name=peer, monotonic=lambda: 0.0, relays=frozenset("ab"))
            told.setdefault(peer, set()).update(r.node for r in heard.receive("a", body).reports)
            assert heard.refused == 0
        return told


def test_a_learner_that_reports_is_told_of_the_others_now_and_then() -> None:
    scene = Scene()
    assert scene.take(report("x")) == {}, "nobody else has spoken"
    assert scene.take(report("y")) == {"y": {"x"}}
    assert scene.take(report("z")) == {"z": {"x", "y"}}
    assert len(scene.sent) == 1, "one frame for all of them"
    assert scene.take(report("x", 2)) == {}
    scene.now_s += PASS_ON_S
    assert scene.take(report("x", 3)) == {"x": {"y", "z"}}


def test_new_keys_go_on_at_once_and_known_ones_do_not() -> None:
    scene = Scene()
    for name in "xyz":
        scene.take(report(name))
    with_key = replace(FACT, rendezvous={"g1/0": b"address"})
    assert scene.take(report("x", 2, with_key)) == {"y": {"x"}, "z": {"x"}}
    assert scene.take(report("x", 3, with_key)) == {}
    next_run = replace(with_key, run_id="run-2")
    assert scene.take(report("x", 4, next_run)) == {"y": {"x"}, "z": {"x"}}


def test_a_learner_that_is_forgotten_is_neither_told_nor_told_of() -> None:
    scene = Scene()
    for name in "xyz":
        scene.take(report(name))
    scene.learners.remove("y")
    scene.now_s += PASS_ON_S
    assert scene.take(report("x", 2)) == {"x": {"z"}}
    assert scene.take(report("y", 2)) == {}


def test_voters_speak_for_themselves_and_followers_pass_nothing_on() -> None:
    scene = Scene()
    scene.take(report("x"))
    assert scene.take(report("a")) == {}
    scene.leads = False
    assert scene.take(report("y")) == {}
    scene.leads = True
    assert scene.take(report("y", 2)) == {}, "what it heard in an earlier term is forgotten"


def test_what_is_passed_on_is_bounded_in_time_and_by_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    size_bytes = len(msgspec.msgpack.encode(report("x")))
    scene = Scene()
    for name in "xyz":
        scene.take(report(name))
    monkeypatch.setattr(module, "MAX_DIGEST_BYTES", size_bytes)
    monkeypatch.setattr(module, "PASS_ON_BYTES_PER_S", 3 * size_bytes)
    scene.now_s += PASS_ON_S
    assert scene.take(report("x", 2)) == {}, "three learners of three reports take three seconds"
    scene.now_s += 1.5
    assert scene.take(report("x", 3)) == {"x": {"y", "z"}}
    assert len(scene.sent) == 3, "its own is among them"
    monkeypatch.setattr(module, "PASS_ON_BYTES_PER_S", 1)
    scene.now_s += PASS_ON_MOST_S
    assert scene.take(report("x", 4)) == {"x": {"y", "z"}}, "keys that were lost come again in time"


def test_a_learner_takes_a_voters_word_about_other_learners_only() -> None:
    heard = Observations(name="x", monotonic=lambda: 0.0, relays=frozenset("ab"))
    encode = msgspec.msgpack.encode
    assert heard.receive("a", encode(report("y"))).reports == (report("y"),)
    assert heard.receive("a", encode(report("b"))).reports == ()
    assert heard.receive("a", encode(report("x"))).reports == ()
    assert heard.receive("y", encode(report("z"))).reports == ()
    assert heard.refused == 3
    mixed = [report("b", 2), report("y", 2), report("z", 2), report("x", 2)]
    assert heard.receive("a", encode(mixed)).reports == (report("y", 2), report("z", 2))
    assert heard.refused == 4, "its own is left out, which is no offence"
