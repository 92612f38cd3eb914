"""What the leader passes on between learners: keys at once, the rest now and then, nothing of others."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from distroml.consensus.frames import Channel
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime.observations import Observations
from distroml.runtime.report_relay import PASS_ON_S, ReportRelay

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
        self.learners = ["x", "y", "z"]
        self.leads = True
        self.now_s = 0.0
        self.relay = ReportRelay(
            links=self,
            learners=lambda: self.learners,
            leads=lambda: self.leads,
            monotonic=lambda: self.now_s,
        )

    def send(self, peer: str, channel: Channel, body: bytes) -> bool:
        assert channel is Channel.REPORT
        self.sent.append((peer, body))
        return True

    def take(self, report: NodeReport) -> list[str]:
        self.sent.clear()
        self.relay.take(report, b"as it came")
        assert all(body == b"as it came" for _, body in self.sent)
        return [peer for peer, _ in self.sent]


def test_a_learners_report_goes_to_the_other_learners_now_and_then() -> None:
    scene = Scene()
    assert scene.take(report("x")) == ["y", "z"]
    assert scene.take(report("x", 2)) == []
    assert scene.take(report("y")) == ["x", "z"]
    scene.now_s += PASS_ON_S
    assert scene.take(report("x", 3)) == ["y", "z"]


def test_new_keys_go_on_at_once_and_known_ones_do_not() -> None:
    scene = Scene()
    scene.take(report("x"))
    with_key = replace(FACT, rendezvous={"g1/0": b"address"})
    assert scene.take(report("x", 2, with_key)) == ["y", "z"]
    assert scene.take(report("x", 3, with_key)) == []
    next_run = replace(with_key, run_id="run-2")
    assert scene.take(report("x", 4, next_run)) == ["y", "z"]


def test_voters_speak_for_themselves_and_followers_pass_nothing_on() -> None:
    scene = Scene()
    assert scene.take(report("a")) == []
    scene.leads = False
    assert scene.take(report("x")) == []


def test_a_learner_takes_a_voters_word_about_other_learners_only() -> None:
    heard = Observations(name="x", monotonic=lambda: 0.0, relays=frozenset("ab"))
    encode = msgspec.msgpack.encode
    assert heard.receive("a", encode(report("y"))) == report("y")
    assert heard.receive("a", encode(report("b"))) is None
    assert heard.receive("a", encode(report("x"))) is None
    assert heard.receive("y", encode(report("z"))) is None
    assert heard.refused == 3
