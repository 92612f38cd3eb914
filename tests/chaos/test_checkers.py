"""Each promise: a good history holds it, and one in which it is broken is caught by its own checker."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chaos.checkers import (
    CHECKERS,
    Limits,
    jobs_kept,
    judge,
    memory,
    one_history,
    real_time,
    streams,
)
from chaos.records import (
    Began,
    Ended,
    FaultBegan,
    FaultEnded,
    Incident,
    JobEnded,
    JobSeen,
    LeaderSeen,
    Leftover,
    MemorySeen,
    NodeSeen,
    Operation,
    Outcome,
    Record,
    Settled,
    StateDigest,
    Streamed,
)
from distroml.model import TRANSITIONS
from tests.chaos import histories as h

History = list[Record]
Breakage = Callable[[History], History]


def test_a_good_history_holds_all_promises() -> None:
    assert judge(h.good()) == []


def _lose(kind: type, number: int = 0) -> Breakage:
    return lambda history: h.changed(history, kind, lambda _: None, number)


def _set(kind: type, number: int = 0, **values: object) -> Breakage:
    return lambda history: h.changed(history, kind, lambda one: replace(one, **values), number)


def _add(*records: Record) -> Breakage:
    return lambda history: [*history, *records]


def _insert(before: type, *records: Record) -> Breakage:
    def insert(history: History) -> History:
        place = next(n for n, one in enumerate(history) if isinstance(one, before))
        return [*history[:place], *records, *history[place:]]

    return insert


_FAULT = FaultBegan(
    at_s=2.9,
    fault=1,
    kind="shard-flipped",
    family="disk",
    nodes=(),
    detail={"file": f"{h.JOB}/run-1/checkpoints/ckpt_step_00000002/worker_0.safetensors"},
)
_OUTAGE = replace(_FAULT, kind="s3-down", family="store", detail={"how": "reset"})
_UNKNOWN = h.submit("k2", 2.0, 2.1, outcome=Outcome.UNKNOWN)
_STREAMED = 3  # followers' streams come before those that are read at the end

BREAKAGES: dict[str, tuple[str, Breakage]] = {
    "an acknowledged job is gone": ("jobs_kept", _lose(JobEnded, 1)),
    "it cannot be read any more": ("jobs_kept", _set(JobEnded, 1, state="")),
    "one key made two jobs": (
        "jobs_kept",
        _add(h.submit("k1", 2.2, 2.3, index=13, job_id="job-2"), h.ended("job-2")),
    ),
    "a job that nobody asked for": ("jobs_kept", _add(h.ended("job-9"))),
    "a job of a request that was refused": (
        "jobs_kept",
        _add(h.submit("k2", 2.0, 2.1, outcome=Outcome.FAILED), h.ended("job-2")),
    ),
    "one unknown request, two jobs": (
        "jobs_kept",
        _add(_UNKNOWN, h.ended("job-2"), h.ended("job-3")),
    ),
    "a linearizable read of the past": (
        "real_time",
        _add(
            h.read(
                3.6, 3.7, index=17, state="STARTING", generation=2, restarts=1, linearizable=True
            )
        ),
    ),
    "an acknowledged write behind what was known": (
        "real_time",
        _add(h.ask("s2", 3.6, 3.7, index=16, number=1)),
    ),
    "a node that goes back": (
        "real_time",
        _add(h.read(4.2, 4.3, index=17, state="STARTING", generation=2, restarts=1)),
    ),
    "two accounts of one index": (
        "one_history",
        _add(h.seen(3.0, index=16, state="RUNNING", generation=1, restarts=1)),
    ),
    "two newest checkpoints at one index": (
        "one_history",
        _add(
            replace(
                h.seen(3.0, index=16, state="RECOVERING", generation=1, restarts=1), checkpoint=2
            )
        ),
    ),
    "a job that ended goes on": (
        "one_history",
        _add(h.seen(4.5, index=21, state="RUNNING", generation=2, restarts=1)),
    ),
    "a job is queued again": (
        "one_history",
        _add(h.seen(3.0, index=13, state="QUEUED", generation=1)),
    ),
    "a generation that falls": (
        "one_history",
        _add(h.seen(3.5, index=18, state="RUNNING", generation=1, restarts=1)),
    ),
    "a count of restarts that falls": (
        "one_history",
        _add(h.seen(3.6, index=19, state="RUNNING", generation=2, restarts=0)),
    ),
    "a node that does not know the job": (
        "one_history",
        _add(replace(h.read(3.0, 3.1, index=12), outcome=Outcome.FAILED, status=404, result={})),
    ),
    "two leaders of one term": (
        "leaders",
        _insert(FaultBegan, LeaderSeen(at_s=2.0, node="b", term=3)),
    ),
    "a term that falls": (
        "leaders",
        _add(NodeSeen(at_s=4.0, node="b", answers=True, role="follower", term=2)),
    ),
    "a stale generation commits": (
        "fencing",
        _set(JobEnded, 1, checkpoint_generations={2: 1, 4: 1}),
    ),
    "commits in the wrong order": (
        "fencing",
        _set(JobEnded, 1, checkpoint_generations={2: 2, 4: 1}),
    ),
    "a recovery behind a checkpoint": (
        "fencing",
        _set(Incident, resume_step=1, steps_lost=2),
    ),
    "a death that fails two generations": (
        "fencing",
        lambda history: [
            *_set(Incident, culprit="process 7 of node a")(history),
            *(
                replace(one, culprit="process 7 of node a", generation=2, next_generation=None)
                for one in history
                if isinstance(one, Incident)
            ),
        ],
    ),
    "lost steps that nobody tells of": ("fencing", _set(Incident, steps_lost=0)),
    "a rank tells a step twice": (
        "fencing",
        _set(Streamed, _STREAMED, items=(*h.METRICS, h.METRICS[-1])),
    ),
    "a checkpoint that does not verify": (
        "checkpoints",
        _set(JobEnded, 1, checkpoints={2: "worker_0.safetensors: differs", 4: ""}),
    ),
    "a damage that was healed and remains": (
        "checkpoints",
        lambda history: _add(_FAULT, FaultEnded(at_s=3.0, fault=1))(
            _set(JobEnded, 1, checkpoints={2: "it differs", 4: ""})(history)
        ),
    ),
    "the newest checkpoint is gone": (
        "checkpoints",
        _set(JobEnded, 1, checkpoints={2: ""}, checkpoint_generations={2: 1}),
    ),
    "a checkpoint given up for no reason": (
        "checkpoints",
        _set(JobEnded, 1, corrupt={2: "its hash differs"}),
    ),
    "a checkpoint given up because its store was down": (
        "checkpoints",
        lambda history: _add(_OUTAGE, FaultEnded(at_s=3.0, fault=1))(
            _set(JobEnded, 1, corrupt={2: "it cannot be read"})(history)
        ),
    ),
    "a request for a checkpoint counts twice": ("save_requests", _set(JobEnded, 1, save_request=2)),
    "a request for a checkpoint is forgotten": ("save_requests", _set(JobEnded, 1, save_request=0)),
    "two numbers of requests at one index": (
        "save_requests",
        _add(h.ask("s1", 2.8, 2.9, index=15, number=2)),
    ),
    "the number of requests falls": (
        "save_requests",
        _add(h.ask("s1", 3.6, 3.7, index=19, number=0)),
    ),
    "other samples": ("samples", _set(JobEnded, 1, samples={**h.SAMPLES, 4: "other"})),
    "a step without a loss": (
        "samples",
        _set(JobEnded, 1, losses={step: h.LOSSES[step] for step in (1, 2, 3, 5, 6)}),
    ),
    "a step that was done again with another loss": (
        "samples",
        _set(Streamed, _STREAMED, items=(*h.METRICS[:3], "2.0.3=0x1p+0", *h.METRICS[4:])),
    ),
    "other weights": ("same_result", _set(JobEnded, 1, model_sha256="n")),
    "another loss": ("same_result", _set(JobEnded, 1, losses={**h.LOSSES, 3: "0x1p+0"})),
    "a step too many": ("same_result", _set(JobEnded, 1, losses={**h.LOSSES, 7: "0x1p+0"})),
    "nothing to compare with": ("same_result", _set(JobEnded, 1, spec_name="other")),
    "an item twice": ("streams", _set(Streamed, 0, items=(h.METRICS[0], *h.METRICS))),
    "an item left out": ("streams", _set(Streamed, 0, items=(*h.METRICS[:1], *h.METRICS[2:]))),
    "an item that nobody wrote": ("streams", _set(Streamed, 1, items=(*h.LOGS, "2.0:t4 dd"))),
    "a cursor that is refused": ("streams", _set(Streamed, 1, error="the cursor cannot be read")),
    "an event twice": ("streams", _set(Streamed, 2, items=(*h.EVENTS, h.EVENTS[-1]))),
    "events that go back": ("streams", _set(Streamed, 2, items=(*h.EVENTS, "13:state RUNNING"))),
    "no leader": ("comeback", _set(Settled, leader_s=None)),
    "a late leader": ("comeback", _set(Settled, leader_s=2.5)),
    "a job that stands still": ("comeback", _set(Settled, progress_s={h.JOB: None})),
    "a job that trains on late": ("comeback", _set(Settled, progress_s={h.JOB: 11.0})),
    "a job that failed": (
        "comeback",
        lambda history: _set(JobEnded, 1, state="FAILED", log_index=None)(history),
    ),
    "what cannot be read": ("comeback", _set(JobEnded, 1, error="/api/jobs: no answer")),
    "replicas that differ": ("replicas", _set(StateDigest, 1, sha256="y")),
    "a replica that stays behind": ("replicas", _set(StateDigest, 1, log_index=20)),
    "a replica that says nothing": ("replicas", _lose(StateDigest, 1)),
    "a process left over": ("leftovers", _add(Leftover(at_s=7.0, kind="process", what="pid 12"))),
    "an agent that is too large": ("memory", _set(MemorySeen, rss_bytes=2**30)),
    "too many open files": ("memory", _set(MemorySeen, files=5000)),
    "a run that was cut off": ("counts", _lose(Ended)),
    "a run without faults": ("counts", _lose(FaultBegan)),
    "a run without operations": ("counts", _set(Began, duration_s=500.0)),
    "a run in which nothing was compared": ("counts", _lose(JobEnded, 1)),
    "a history without a beginning": ("counts", _lose(Began)),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_promise_is_caught(name: str) -> None:
    checker, breakage = BREAKAGES[name]
    found = judge(breakage(h.good()))
    assert checker in {one.checker for one in found}, found
    told = next(one for one in found if one.checker == checker)
    assert told.what


def test_every_checker_is_shown_to_catch_something() -> None:
    assert {checker for checker, _ in BREAKAGES.values()} == set(CHECKERS)


HARMLESS: dict[str, Breakage] = {
    "a store that was down for a while": _add(_OUTAGE, FaultEnded(at_s=3.0, fault=1)),
    "a request of unknown outcome that had an effect": _add(_UNKNOWN, h.ended("job-2")),
    "a request of unknown outcome that had none": _add(_UNKNOWN),
    "a repeated request that answers with the same job": _add(h.submit("k1", 2.15, 2.18, index=10)),
    "a local read of the past at another node": _add(
        h.read(3.6, 3.7, index=17, state="STARTING", generation=2, restarts=1, node="a")
    ),
    "a node that lost its data and its term": lambda history: _add(
        NodeSeen(at_s=4.0, node="b", answers=True, role="follower", term=1)
    )(
        _insert(FaultEnded, replace(_FAULT, kind="directory-lost", nodes=("b",), detail={}))(
            history
        )
    ),
    "a damaged checkpoint that was found out": lambda history: _add(_FAULT)(
        _set(JobEnded, 1, corrupt={2: "its hash differs"}, checkpoints={2: "differs", 4: ""})(
            history
        )
    ),
    "a stream that ended before the last records came": _set(Streamed, 0, items=h.METRICS[:-1]),
    "a job that was cancelled as asked": lambda history: _set(
        JobEnded, 1, state="CANCELLED", spec_name="victim", log_index=None
    )(
        _add(
            Operation(
                invoked_s=4.0,
                at_s=4.1,
                client="ender",
                node="a",
                kind="cancel",
                outcome=Outcome.UNKNOWN,
                job_id=h.JOB,
            )
        )(history)
    ),
    "a planned change whose old ranks commit once more": lambda history: _set(
        JobEnded, 1, checkpoint_generations={2: 1, 4: 1}
    )(_lose(Incident)(_set(JobSeen, 2, planned=True)(history))),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_allowed_is_no_violation(name: str) -> None:
    found = judge(HARMLESS[name](h.good()))
    allowed = {"counts", "jobs_kept"} if "cancelled" in name else set()
    assert {one.checker for one in found} <= allowed, found


def test_without_faults_a_stream_must_come_to_its_end() -> None:
    calm = [one for one in h.good() if not isinstance(one, FaultBegan | FaultEnded)]
    assert not streams.check(calm, Limits())
    cut = h.changed(calm, Streamed, lambda one: replace(one, items=one.items[:-1]))
    assert "never came" in streams.check(cut, Limits())[0].what


def test_a_slow_machine_gets_more_time() -> None:
    slow = _set(Settled, leader_s=3.5, progress_s={h.JOB: 19.0})(h.good())
    assert len(judge(slow)) == 2
    assert judge(slow, Limits(machine_factor=2.0)) == []


def test_many_violations_of_one_kind_are_counted() -> None:
    left = [Leftover(at_s=1.0, kind="file", what=str(number)) for number in range(40)]
    found = [one for one in judge([*h.good(), *left]) if one.checker == "leftovers"]
    assert len(found) == 26
    assert "15 more" in found[-1].what


# --- memory ------------------------------------------------------------------------------------------------------


def _life(rss_bytes: Callable[[float], float], files: int = 30) -> History:
    return [
        MemorySeen(at_s=at, node="a", pid=1, rss_bytes=int(rss_bytes(at)), files=files, threads=4)
        for at in range(0, 1800, 5)
    ]


def test_memory_that_swings_is_bounded_and_one_that_grows_is_not() -> None:
    mib = 2.0**20
    assert not memory.check(_life(lambda at: (60 + 20 * (at % 35 == 0)) * mib), Limits())
    assert not memory.check(_life(lambda at: (60 + min(at, 50)) * mib), Limits()), "the warm-up"
    (found,) = memory.check(_life(lambda at: (60 + at / 20) * mib), Limits())
    assert "grew by" in found.what


def test_open_files_that_grow_are_a_leak() -> None:
    grown = [
        replace(one, files=30 + int(one.at_s / 10))
        for one in _life(lambda _: 2.0**20)  # type: ignore[type-var]
    ]
    (found,) = memory.check(grown, Limits())
    assert "more files open" in found.what


# --- properties --------------------------------------------------------------------------------------------------


@st.composite
def _clients(draw: st.DrawFn) -> list[Operation]:
    """Operations on a log that grows; each takes effect at one moment between its two times."""
    found = []
    for number in range(draw(st.integers(1, 25))):
        invoked = draw(st.integers(0, 100))
        effect = invoked + draw(st.integers(0, 10))
        returned = effect + draw(st.integers(1, 10))
        lag = draw(st.integers(0, 5))
        fresh = draw(st.booleans())
        one = h.read(
            float(invoked),
            float(returned),
            index=effect if fresh else max(0, effect - lag),
            node=f"n{number}",
            linearizable=fresh,
        )
        found.append(one)
    return found


@given(_clients())
def test_operations_that_take_effect_between_their_times_are_in_order(
    made: list[Operation],
) -> None:
    assert not real_time.check(made, Limits())


@given(_clients(), st.integers(1, 40))
def test_a_read_is_too_old_exactly_if_an_answer_before_it_was_newer(
    made: list[Operation], back: int
) -> None:
    made = [replace(made[0], log_index=max(0, (made[0].log_index or 0) - back)), *made[1:]]
    wrong = [
        one
        for one in made
        if one.linearizable
        and any(
            other.at_s < one.invoked_s and (other.log_index or 0) > (one.log_index or 0)
            for other in made
        )
    ]
    assert len(real_time.check(made, Limits())) == len(wrong)


@st.composite
def _walk(draw: st.DrawFn) -> list[JobSeen]:
    """The life of a job along the table, as nodes that lag show it."""
    state, generation, restarts, index = "QUEUED", 0, 0, 1
    life = [(index, state, generation, restarts)]
    while after := sorted(TRANSITIONS[state]):  # type: ignore[index]
        state = draw(st.sampled_from(after))
        index += draw(st.integers(1, 3))
        generation += state == "STARTING"
        restarts += state == "RECOVERING"
        life.append((index, state, generation, restarts))
        if len(life) > 20:
            break
    looks = draw(st.lists(st.integers(1, index), min_size=1, max_size=20))
    found = []
    for number, look in enumerate(looks):
        _, state, generation, restarts = max(one for one in life if one[0] <= look)
        found.append(
            h.seen(
                float(number),
                index=look,
                state=str(state),
                generation=generation,
                restarts=restarts,
            )
        )
    return found


@given(_walk())
def test_any_looks_at_one_life_agree(looks: list[JobSeen]) -> None:
    assert not one_history.check(looks, Limits())


@given(_walk(), st.sampled_from(("state", "generation", "restarts")))
def test_two_accounts_of_one_look_never_agree(looks: list[JobSeen], field: str) -> None:
    one = looks[0]
    other = replace(one, generation=one.generation + 1)
    if field == "restarts":
        other = replace(one, restarts=one.restarts + 1)
    if field == "state":
        other = replace(one, state="FAILED" if one.state != "FAILED" else "RUNNING")
    assert one_history.check([*looks, other], Limits())


@given(st.data())
def test_a_stream_is_right_exactly_if_each_rank_is_a_beginning(data: st.DataObject) -> None:
    whole = {
        rank: [f"1.{rank}.{step}=0x1p+0" for step in range(1, 1 + data.draw(st.integers(0, 5)))]
        for rank in range(3)
    }
    reference = h.stream(
        "metrics",
        tuple(functools.reduce(operator.iadd, whole.values(), [])),
        "aftermath",
        reference=True,
    )
    got = data.draw(st.lists(st.sampled_from(reference.items or ("1.0.1=0x1p+0",)), max_size=8))
    right = all(
        [item for item in got if item.startswith(f"1.{rank}.")]
        == items[: len([i for i in got if i.startswith(f"1.{rank}.")])]
        for rank, items in whole.items()
    )
    fault = FaultBegan(at_s=1.0, fault=0, kind="x", family="process", nodes=(), detail={})
    history = [fault, h.stream("metrics", tuple(got), "follower"), reference]
    assert bool(streams.check(history, Limits())) is not right


class _Server:
    """Makes jobs of requests; whether it knows a key again is up to the test."""

    def __init__(self, *, remembers: bool) -> None:
        self.jobs: list[str] = []
        self._known: dict[str, str] = {}
        self._remembers = remembers

    def submit(self, key: str) -> str:
        if not (self._remembers and key in self._known):
            self._known[key] = f"job-{len(self.jobs)}"
            self.jobs.append(self._known[key])
        return self._known[key]


_TRIES = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(("acked", "lost answer", "refused"))),
    min_size=1,
    max_size=12,
)


def _played(tries: list[tuple[str, str]], server: _Server) -> History:
    history: History = []
    for number, (key, fate) in enumerate(tries):
        outcome, job_id = Outcome.FAILED, None
        if fate != "refused":
            job_id = server.submit(key)
            outcome = Outcome.OK if fate == "acked" else Outcome.UNKNOWN
        history.append(
            h.submit(key, number, number + 0.5, index=number, job_id=job_id, outcome=outcome)
        )
    return [*history, *(h.ended(job_id) for job_id in server.jobs)]


@given(_TRIES)
def test_retries_under_one_key_are_one_job(tries: list[tuple[str, str]]) -> None:
    assert not jobs_kept.check(_played(tries, _Server(remembers=True)), Limits())


@given(_TRIES)
def test_a_server_that_forgets_keys_is_caught_as_soon_as_it_doubles_a_job(
    tries: list[tuple[str, str]],
) -> None:
    server = _Server(remembers=False)
    history = _played(tries, server)
    doubled = len(server.jobs) > len({key for key, fate in tries if fate != "refused"})
    assert bool(jobs_kept.check(history, Limits())) is doubled


def test_what_was_whole_may_be_committed_after_survivors_went_on_from_it() -> None:
    history = _set(JobEnded, 1, checkpoint_generations={2: 1, 4: 1})(h.good())
    history = _set(Incident, resume_step=4, highest_step=4, steps_lost=0)(history)
    assert not [one for one in judge(history) if one.checker == "fencing"]
