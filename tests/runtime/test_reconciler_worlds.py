"""Whole lives of jobs under random faults: whatever happens, they end rightly (see ``sim_world``)."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from distroml.model import JobStatus
from distroml.spec import Checkpointing, Resources
from tests.runtime.sim_workers import digest_at
from tests.runtime.sim_world import World

NODES = {"a": 2, "b": 2, "c": 2}
STEPS = 30
MAX_TICKS = 3000

_names = st.sampled_from(sorted(NODES))
_index = st.integers(0, 9)
_faults = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 25)),
    st.tuples(st.just("crash_worker"), _index),
    st.tuples(st.just("fail_worker"), _index),
    st.tuples(st.just("take_down"), _names),
    st.tuples(st.just("bring_up"), _names),
    st.tuples(st.just("mute"), _names),
    st.tuples(st.just("unmute"), _names),
    st.tuples(st.just("lag"), _names, st.integers(1, 20)),
    st.tuples(st.just("disk_full"), _names),
    st.tuples(st.just("corrupt_newest")),
    st.tuples(st.just("holders_leave")),
    st.tuples(st.just("manifests_fail")),
    st.tuples(st.just("depose")),
    st.tuples(st.just("stop_process"), _index),
    st.tuples(st.just("livelock"), _index),
    st.tuples(st.just("drain"), _names),
    st.tuples(st.just("undrain"), _names),
    st.tuples(st.just("shut_down"), _names),
    st.tuples(st.just("crash_agent"), _names, st.integers(1, 90)),
    st.tuples(st.just("haunt"), st.integers(1, 40)),
    st.tuples(
        st.just("submit"),
        st.integers(1, 6),
        st.integers(-1, 1),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    st.tuples(st.just("stop"), _index),
    st.tuples(st.just("cancel"), _index),
)


def _inflict(world: World, fault: tuple[object, ...]) -> None:
    name, *args = fault
    match name, args:
        case "mute", [str(node)]:
            world.nodes[node].muted = True
        case "unmute", [str(node)]:
            world.nodes[node].muted = False
        case "lag", [str(node), int(ticks)]:
            world.nodes[node].lag_ticks = ticks
        case "disk_full", [str(node)]:
            world.nodes[node].disk_full = True
        case "manifests_fail", _:
            world.manifests_fail = True
        case "holders_leave", _:
            world.holders_away = True
        case "corrupt_newest", _:
            world.corrupt |= {
                (job.job_id, newest.step)
                for job in world.state.active_jobs()
                if (newest := job.newest_checkpoint())
            }
        case "submit", [int(workers), int(priority), int(fewer), int(spares)]:
            _submit(world, workers, priority, fewer=fewer, spares=spares)
        case "undrain", [str(node)]:
            world.drain(node, undo=True)
        case "stop", [int(index)]:
            world.stop(index)
        case "cancel", [int(index)]:
            world.cancel(index)
        case _:
            getattr(world, str(name))(*args)


def _submit(
    world: World, workers: int, priority: int = 0, *, fewer: int = 0, spares: int = 0
) -> None:
    number = len(world.state.jobs) + 1
    world.submit(
        f"job-{number}",
        resources=Resources(
            workers=workers, min_workers=max(1, workers - fewer) if fewer else None, spares=spares
        ),
        priority=priority,
        steps=STEPS,
        max_restarts=3,
        checkpointing=Checkpointing(enabled=number % 3 != 0, every_n_steps=6),
    )


def _check_end(world: World) -> None:
    for job in world.state.jobs.values():
        if job.status is JobStatus.COMPLETED:
            assert job.result is not None
            assert job.result.state_digest == digest_at(job.job_id, STEPS)
            assert job.result.step == STEPS
        elif job.status is JobStatus.FAILED:
            told = "gave up after 3 restarts without progress: generation "
            assert job.reason.startswith(told), job.reason
            assert "; the first time: generation " in job.reason
            assert job.strikes == 3
            assert job.incidents[-1].generation == job.generation_number
        else:
            assert job.status is JobStatus.CANCELLED
            assert job.job_id in world.ended_by_request, job.reason
            if job.result is not None:
                step = job.result.step
                assert job.result.state_digest == digest_at(job.job_id, step)


@settings(max_examples=120, deadline=None)
@given(st.lists(_faults, max_size=40))
@example(
    [
        ("drain", "b"),
        ("cancel", 0),
        ("submit", 3, 0, 1, 0),
        ("run", 1),
        ("run", 1),
        ("drain", "a"),
    ]
)
def test_every_job_ends_rightly_whatever_happens(faults: list[tuple[object, ...]]) -> None:
    world = World(NODES)
    _submit(world, 4)
    for fault in faults:
        _inflict(world, fault)
        world.tick()
    world.heal()
    world.run_until_over(MAX_TICKS)
    _check_end(world)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), _index), max_size=3))
def test_up_to_max_restarts_failures_never_fail_a_job(crashes: list[tuple[int, int]]) -> None:
    world = World(NODES)
    _submit(world, 4)
    for pause, index in crashes:
        world.run(pause)
        world.crash_worker(index)
    world.run_until_over(MAX_TICKS)
    assert world.state.jobs["job-1"].status is JobStatus.COMPLETED
    _check_end(world)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 25), st.lists(st.tuples(_index, st.integers(0, 3)), min_size=2, max_size=6))
@example(11, [(1, 1), (9, 0)])
def test_ranks_that_die_one_after_another_do_nothing_twice_that_is_committed(
    begin: int, deaths: list[tuple[int, int]]
) -> None:
    """The coordinator takes the last ones for survivors, and a checkpoint may be committed meanwhile."""
    world = World(NODES)
    _submit(world, 2)
    world.run(begin)
    for index, pause in deaths:
        world.crash_worker(index)
        world.run(pause)
    world.run(40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=6))
def test_leader_changes_never_disturb_a_job(pauses: list[int]) -> None:
    world = World(NODES)
    _submit(world, 4)
    for pause in pauses:
        world.run(pause)
        world.depose()
    world.run_until_over(MAX_TICKS)
    job = world.state.jobs["job-1"]
    assert (job.status, job.restarts, job.generation_number) == (JobStatus.COMPLETED, 0, 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), _names, st.integers(1, 40)), max_size=3))
def test_an_agent_that_comes_back_in_time_finds_its_workers_and_training_never_noticed(
    crashes: list[tuple[int, str, int]],
) -> None:
    world = World(NODES)
    _submit(world, 4)
    world.run_until("job-1", JobStatus.RUNNING)
    for pause, name, ticks in crashes:
        world.run(pause)
        if not any(sim.agent_back_tick for sim in world.nodes.values()):
            world.crash_agent(name, ticks)
    world.run_until_over(MAX_TICKS)
    job = world.state.jobs["job-1"]
    assert (job.status, job.restarts, job.incidents) == (JobStatus.COMPLETED, 0, ()), job.incidents
