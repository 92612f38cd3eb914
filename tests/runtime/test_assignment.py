"""Which process is which rank: every process has exactly one fate, and who has the state keeps its rank."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from distroml import commands as c
from distroml.model import Culprit, JobStatus, Member
from distroml.reports import WorkerPhase
from distroml.runtime.assignment import Duties, Process, duties, next_join, ranks_here, saves_here
from tests.builders import Log, fail, form, members, node, submit

_phases = st.sampled_from(
    [WorkerPhase.SPAWNING, WorkerPhase.CONNECTING, WorkerPhase.TRAINING, WorkerPhase.PARKED]
)


@st.composite
def _processes(draw: st.DrawFn) -> list[Process]:
    made = []
    for worker in range(1, draw(st.integers(0, 6)) + 1):
        told = draw(st.integers(0, 3))
        alive = draw(st.booleans())
        made.append(
            Process(
                worker=worker,
                told=told,
                rank=draw(st.integers(0, 4)),
                joined=draw(st.integers(0, told)),
                ranks=draw(st.dictionaries(st.integers(0, told), st.integers(0, 4), max_size=2)),
                phase=draw(_phases),
                alive=alive,
                usable=alive and draw(st.booleans()),
            )
        )
    return made


_places = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)


@st.composite
def _logs(draw: st.DrawFn) -> Log:
    """A job that went through up to three generations, with failures and planned changes between them."""
    log = Log()
    log.ok(node("a", slots=4))
    log.ok(node("b", slots=4))
    log.ok(submit("job", workers=4, max_restarts=100))
    log.ok(form("job", 1, members(*draw(_places))))
    log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
    for number in (2, 3):
        how = draw(st.sampled_from(["nothing", "failure", "recovery", "change"]))
        if how == "nothing" or log.job("job").status is JobStatus.RECOVERING:
            break
        where = members(*draw(_places))
        if how == "change":
            before = {(m.node, m.rank) for m in log.job("job").at_work.members}
            joining = tuple(m.rank for m in where if (m.node, m.rank) not in before)
            log.ok(form("job", number, where, planned=True, joining=joining))
            continue
        guilty = draw(st.lists(st.integers(1, 6), unique=True))
        log.ok(fail("job", number - 1, culprits=tuple(Culprit("a", one) for one in guilty)))
        if how == "recovery":
            spares = tuple(Member(9, 0, name, 1) for name in draw(st.sampled_from(["", "a", "ab"])))
            log.ok(form("job", number, where, spares=spares))
            log.ok(c.MarkRunning(job_id="job", generation=number, total_steps=100))
    return log


def share(log: Log, processes: Sequence[Process], name: str = "a") -> Duties:
    return duties(log.state, name, 1, {"run-job": processes}).get("run-job", Duties())


@given(_logs(), _processes(), st.randoms())
def test_every_process_has_one_fate_and_every_rank_at_most_one_process(
    log: Log, processes: list[Process], random: object
) -> None:
    job = log.job("job")
    given_out = share(log, processes)
    ranks = [worker for worker in given_out.ranks.values() if worker is not None]
    spares = [worker for worker in given_out.spares if worker is not None]
    fates = [*ranks, *spares, *given_out.aborted, *given_out.retired]
    assert len(fates) == len(set(fates))
    left = {one.worker: one for one in processes if one.worker not in fates}
    outgoing, recovers = job.outgoing, job.status is JobStatus.RECOVERING
    assert all(
        (outgoing and one.was_in(outgoing.number)) or (recovers and not one.alive)
        for one in left.values()
    )
    if job.status is JobStatus.RECOVERING:
        assert given_out.ranks == {}
    else:
        mine = {m.rank for m in job.generation.members if m.node == "a"}
        assert set(given_out.ranks) == mine
    shuffled = list(processes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = share(log, shuffled)
    assert again.ranks == given_out.ranks
    assert set(again.retired) == set(given_out.retired)
    assert set(again.aborted) == set(given_out.aborted)


@given(_logs(), _processes())
def test_nobody_who_is_to_blame_or_past_use_is_told_to_join(
    log: Log, processes: list[Process]
) -> None:
    job = log.job("job")
    by_worker = {one.worker: one for one in processes}
    given_out = share(log, processes)
    assert all(by_worker[worker].usable for worker in given_out.aborted)
    assert not any(job.is_to_blame("a", worker) for worker in given_out.aborted)
    since = job.at_work.number if job.generation.planned else job.generation_number
    for rank, worker in given_out.ranks.items():
        if worker is None:
            continue
        one = by_worker[worker]
        assert one.usable or one.told >= since, "a dead one keeps only the rank that it had"
        if not job.generation.planned and 0 < one.told < job.generation_number:
            assert not job.is_to_blame("a", one.worker)
        if one.usable:
            join = next_join(job, rank, one)
            assert (join.generation, join.rank) == (job.generation_number, rank)
            assert not join.at_boundary or job.outgoing is not None


@given(_logs(), _processes())
def test_what_is_told_is_stable(log: Log, processes: list[Process]) -> None:
    """Once every process did as it was told, the next look tells nobody anything else."""
    job = log.job("job")
    given_out = share(log, processes)
    now_by_worker = {worker: rank for rank, worker in given_out.ranks.items()}
    after = [
        Process(
            worker=one.worker,
            told=job.generation_number if one.usable else one.told,
            rank=now_by_worker[one.worker] if one.usable else one.rank,
            joined=one.joined,
            ranks=one.ranks,
            phase=one.phase,
            alive=one.alive,
            usable=one.usable,
        )
        if one.worker in now_by_worker
        else one
        for one in processes
        if one.worker not in given_out.retired
    ]
    assert share(log, after).ranks == given_out.ranks


def test_survivors_take_their_own_ranks_before_others_are_given_them() -> None:
    log = Log()
    log.ok(node("a", slots=4))
    log.ok(submit("job", workers=4))
    log.ok(form("job", 1, members("a", "a", "a", "a")))
    log.ok(fail("job", 1, collateral=(1, 2, 3)))
    log.ok(form("job", 2, members("a", "a", "a", "a")))
    training = [
        Process(worker=10 + rank, told=1, rank=rank, joined=1, phase=WorkerPhase.PARKED)
        for rank in (3, 2, 1)
    ]
    spare = Process(worker=7, told=0, rank=0, joined=0, phase=WorkerPhase.SPARE)
    assert share(log, [*training, spare]).ranks == {0: 7, 1: 11, 2: 12, 3: 13}
    assert share(log, training).ranks == {0: None, 1: 11, 2: 12, 3: 13}
    assert ranks_here(log.state, "a", 1) == 4
    assert duties(log.state, "a", 2, {"run-job": training}) == {}, "that incarnation is not known"


def test_a_change_that_is_undone_leaves_everybody_the_rank_that_they_train_as() -> None:
    log = Log()
    for name, slots in (("a", 2), ("b", 3), ("c", 1)):
        log.ok(node(name, slots=slots))
    log.ok(submit("job", workers=5))
    log.ok(form("job", 1, members("a", "a", "b", "b", "b")))
    log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
    log.ok(form("job", 2, members("b", "c", "b", "b"), planned=True, joining=(1,)))

    def on_b(told: int, last_rank: int) -> list[Process]:
        return [
            Process(
                worker=worker,
                told=told,
                rank=last_rank if worker == 4 else worker,
                joined=1,
                ranks={1: worker},
                phase=WorkerPhase.TRAINING,
            )
            for worker in (2, 3, 4)
        ]

    assert share(log, on_b(1, 4), "b").ranks == {0: 4, 2: 2, 3: 3}
    log.ok(form("job", 3, members("a", "a", "b", "b", "b"), planned=True))
    told_again = share(log, on_b(2, 0), "b")
    assert (told_again.ranks, told_again.retired) == ({2: 2, 3: 3, 4: 4}, ())
    assert share(log, on_b(3, 4), "b") == told_again


def test_one_without_a_rank_is_kept_when_its_change_is_replaced_by_another() -> None:
    log = Log()
    log.ok(node("a", slots=4))
    log.ok(submit("job", workers=3))
    log.ok(form("job", 1, members("a", "a", "a")))
    log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
    log.ok(form("job", 2, members("a", "a"), planned=True))
    log.ok(form("job", 3, members("a"), planned=True))
    training = [
        Process(
            worker=10 + rank,
            told=min(2, 3 - rank),
            rank=rank,
            joined=1,
            ranks={1: rank},
            phase=WorkerPhase.TRAINING,
        )
        for rank in range(3)
    ]
    assert share(log, training) == Duties(ranks={0: 10})


def test_a_node_knows_that_its_ranks_save_their_state_before_they_end() -> None:
    log = Log()
    log.ok(node("a", slots=4))
    log.ok(submit("job", workers=1))
    log.ok(form("job", 1, members("a")))
    log.ok(c.MarkRunning(job_id="job", generation=1, total_steps=100))
    assert not saves_here(log.state, "a", 1)
    log.ok(c.VacateGeneration(job_id="job", generation=1, reason="it leaves"))
    assert saves_here(log.state, "a", 1)
    assert not saves_here(log.state, "a", 2)
