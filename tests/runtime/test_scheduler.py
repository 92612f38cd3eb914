"""The scheduler: whole gangs, in order, spread, and never a slot twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distroml import commands as c
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime.scheduler import (
    Host,
    Request,
    assigned_places,
    describe,
    leftover_workers,
    place,
    possible_workers,
    schedule,
)
from tests.builders import Log, form, members, node, running, submit


def host(name: str, free: int, slots: int | None = None, *, ready: bool = True) -> Host:
    slots = free if slots is None else slots
    return Host(node=name, incarnation=1, slots=slots, free=free, ready=ready)


def request(
    job_id: str, workers: int, *, index: int = 0, priority: int = 0, **fields: object
) -> Request:
    return Request(
        job_id=job_id,
        workers=workers,
        priority=priority,
        submit_index=index,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("workers", "hosts", "spread"),
    [
        (4, [host("a", 2), host("b", 2)], "4 workers on a(2), b(2)"),
        (4, [host("c", 4), host("a", 4), host("b", 4)], "4 workers on a(2), b(1), c(1)"),
        (4, [host("a", 1), host("b", 3)], "4 workers on b(3), a(1)"),
        (3, [host("a", 2), host("b", 4)], "3 workers on b(2), a(1)"),
        (1, [host("b", 4), host("a", 4)], "1 worker on a(1)"),
        (2, [host("a", 0), host("b", 2), host("c", -1)], "2 workers on b(2)"),
    ],
)
def test_a_gang_is_spread_over_the_nodes(workers: int, hosts: list[Host], spread: str) -> None:
    placed = place(request("job", workers), hosts)
    assert placed is not None
    assert describe(placed) == spread


def test_ranks_of_a_node_are_adjacent() -> None:
    placed = place(request("job", 5), [host("a", 3), host("b", 3)])
    assert placed is not None
    assert [(m.rank, m.local_rank, m.node) for m in placed] == [
        (0, 0, "a"),
        (1, 1, "a"),
        (2, 2, "a"),
        (3, 0, "b"),
        (4, 1, "b"),
    ]


def test_all_ranks_or_none() -> None:
    plan = schedule([request("job", 4)], [host("a", 2, 4), host("b", 0, 2)])
    assert plan.placements == {}
    assert plan.waiting == {"job": "needs 4 slots, 2 free of 6"}


def test_a_large_job_at_the_head_is_not_overtaken() -> None:
    queue = [request("large", 4, index=1), request("small", 1, index=2)]
    plan = schedule(queue, [host("a", 2, 4)])
    assert plan.placements == {}
    assert plan.waiting["small"] == "needs 1 slot, 2 free of 4; ahead of it: large"


def test_a_job_larger_than_the_cluster_does_not_block_the_others() -> None:
    queue = [request("huge", 100, index=1), request("small", 1, index=2)]
    plan = schedule(queue, [host("a", 2)])
    assert list(plan.placements) == ["small"]
    assert "more than the nodes that are alive offer" in plan.waiting["huge"]


def test_a_job_keeps_its_place_while_a_lost_node_may_return() -> None:
    queue = [request("large", 4, index=1), request("small", 1, index=2)]
    assert schedule(queue, [host("a", 2)], returning_slots=2).placements == {}
    assert list(schedule(queue, [host("a", 2)]).placements) == ["small"]


def test_priority_then_recovery_then_submission() -> None:
    queue = [
        request("late", 1, index=9),
        request("early", 1, index=1),
        request("recovering", 1, index=5, recovering=True),
        request("urgent", 1, index=7, priority=3),
    ]
    plan = schedule(queue, [host("a", 4)])
    assert list(plan.placements) == ["urgent", "recovering", "early", "late"]


def test_a_job_in_backoff_keeps_its_slots_without_blocking_the_rest() -> None:
    queue = [
        request("failed", 2, index=1, recovering=True, held="restart in 0.4 s"),
        request("first", 2, index=2),
        request("second", 1, index=3),
    ]
    plan = schedule(queue, [host("a", 4)])
    assert list(plan.placements) == ["first"]
    assert plan.waiting["failed"] == "restart in 0.4 s"
    assert plan.waiting["second"] == "needs 1 slot, 0 free of 4"


def test_a_recovering_job_prefers_warm_nodes_if_they_suffice() -> None:
    hosts = [host("a", 4, ready=False), host("b", 2)]
    warm = place(request("job", 2, recovering=True), hosts)
    large = place(request("job", 3, recovering=True), hosts)
    assert warm is not None
    assert large is not None
    assert describe(warm) == "2 workers on b(2)"
    assert describe(large) == "3 workers on a(2), b(1)"


_hosts = st.lists(
    st.builds(
        Host,
        node=st.sampled_from("abcdefg"),
        incarnation=st.just(1),
        slots=st.integers(0, 8),
        free=st.integers(-2, 8),
        ready=st.booleans(),
    ).filter(lambda h: h.free <= h.slots),
    unique_by=lambda h: h.node,
)
_requests = st.lists(
    st.builds(
        Request,
        job_id=st.text("xyz0123456789", min_size=1, max_size=5),
        workers=st.integers(1, 12),
        priority=st.integers(-2, 2),
        submit_index=st.integers(0, 20),
        recovering=st.booleans(),
        held=st.sampled_from(["", "", "restart in 1.0 s"]),
    ),
    unique_by=lambda r: r.job_id,
    max_size=12,
)


@given(_requests, _hosts)
def test_no_slot_is_given_twice_and_every_job_gets_an_answer(
    requests: list[Request], hosts: list[Host]
) -> None:
    plan = schedule(requests, hosts)
    given_out = Counter(m.node for placed in plan.placements.values() for m in placed)
    free = {h.node: max(0, h.free) for h in hosts}
    assert all(count <= free[name] for name, count in given_out.items())
    assert set(plan.placements) | set(plan.waiting) == {r.job_id for r in requests}
    assert not set(plan.placements) & set(plan.waiting)
    sizes = {r.job_id: r.workers for r in requests}
    assert all(len(placed) == sizes[job] for job, placed in plan.placements.items())


@given(_requests, _hosts, st.randoms())
def test_the_order_of_the_input_does_not_matter(
    requests: list[Request], hosts: list[Host], random: object
) -> None:
    shuffled, moved = list(requests), list(hosts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    random.shuffle(moved)  # type: ignore[attr-defined]
    assert schedule(requests, hosts) == schedule(shuffled, moved)


@given(_requests, _hosts)
def test_nothing_overtakes_a_job_that_could_fit(requests: list[Request], hosts: list[Host]) -> None:
    """Whoever starts would start too if all behind it were gone; and nobody starts past a waiting head."""
    plan = schedule(requests, hosts)
    total = sum(h.slots for h in hosts)
    order = sorted(
        requests, key=lambda r: (-r.priority, not r.recovering, r.submit_index, r.job_id)
    )
    blocked = False
    for one in order:
        if blocked:
            assert one.job_id in plan.waiting
        waits = one.job_id in plan.waiting and plan.waiting[one.job_id] != one.held
        blocked = blocked or (waits and one.workers <= total)


@given(st.integers(1, 24), _hosts)
def test_counts_differ_by_one_unless_a_node_is_full(workers: int, hosts: list[Host]) -> None:
    placed = place(request("job", workers), hosts)
    if placed is None:
        assert sum(max(0, h.free) for h in hosts) < workers
        return
    counts = Counter(m.node for m in placed)
    open_hosts = [h.node for h in hosts if h.free > counts[h.node]]
    if open_hosts:
        assert max(counts.values()) - min(counts[name] for name in open_hosts) <= 1
    by_node: dict[str, list[int]] = {}
    for member in placed:
        assert member.local_rank == len(by_node.setdefault(member.node, []))
        by_node[member.node].append(member.rank)
    assert all(ranks == list(range(ranks[0], ranks[-1] + 1)) for ranks in by_node.values())


# --- slots that are taken without an assignment ---


def worker(rank: int, generation: int = 1, **fields: object) -> WorkerFact:
    values = {"phase": WorkerPhase.TRAINING, "pid": 100 + rank} | fields
    return WorkerFact(
        job_id="job-1",
        run_id="run-job-1",
        generation=generation,
        rank=rank,
        **values,  # type: ignore[arg-type]
    )


def report(*workers: WorkerFact, applied_index: int = 10**6) -> NodeReport:
    return NodeReport(
        node="a",
        incarnation=1,
        sequence=1,
        at=0.0,
        slots=4,
        workers=workers,
        applied_index=applied_index,
    )


def test_processes_of_ended_generations_hold_their_slots_until_they_are_gone() -> None:
    jobs = running(Log()).state.jobs
    assert leftover_workers(report(worker(0)), assigned_places(jobs.values())) == 0
    assert (
        leftover_workers(report(worker(0), worker(0, generation=0)), assigned_places(jobs.values()))
        == 1
    )
    assert leftover_workers(report(worker(1)), assigned_places(jobs.values())) == 1, (
        "rank 1 belongs to node b"
    )
    assert (
        leftover_workers(
            report(worker(0, generation=0, exit_code=-9)), assigned_places(jobs.values())
        )
        == 0
    )
    dead = worker(0, generation=0, phase=WorkerPhase.FAILED, pid=None)
    assert leftover_workers(report(dead), assigned_places(jobs.values())) == 0, (
        "it was never spawned"
    )


def test_processes_of_finished_and_forgotten_jobs_are_counted() -> None:
    log = running(Log())
    log.ok(c.CancelJob(job_id="job-1", reason="cancelled"))
    assert leftover_workers(report(worker(0)), assigned_places(log.state.jobs.values())) == 1
    log.ok(c.RemoveJob(job_id="job-1"))
    assert leftover_workers(report(worker(0)), assigned_places(log.state.jobs.values())) == 1


def test_a_start_that_the_agent_may_still_carry_out_is_counted() -> None:
    log = Log()
    log.ok(node("a"))
    log.ok(submit(workers=2))
    log.ok(form("job-1", 1, members("a", "a")))
    formed = log.state.index
    log.ok(c.CancelJob(job_id="job-1", reason="cancelled"))
    released = {"job-1": log.state.index}
    for seen, expected in [
        (report(applied_index=formed), 2),
        (report(worker(0), applied_index=formed), 1),
        (report(applied_index=log.state.index), 0),
    ]:
        assert possible_workers(seen, released, log.state.jobs) == expected
