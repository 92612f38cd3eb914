"""Real workers that lose ranks, in place: survivors stay, no completed step is redone, the bits at the end are the same."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from distroml.reports import WorkerOutcome, WorkerPhase
from distroml.runtime.control import Vacate
from distroml.spec import JobSpec
from tests.runtime.worker.agent_stub import AgentStub, StubWorker
from tests.runtime.worker.test_failures import FIRST
from tests.runtime.worker.test_training import finished, spec_of, user_spec

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "model_options": {"hidden": 32}},
    "cnn": {"model": "cnn", "model_options": {"channels": 4, "dropout": 0.2}},
    "transformer": {
        "model": "transformer",
        "model_options": {"layers": 1, "heads": 2, "width": 16, "context": 8, "dropout": 0.1},
        "dataset": "text",
        "dataset_options": {"max_bytes": 4096},
    },
}
SCHEDULES_PER_MODEL = 7
LAST_FAULT_STEP = 60
STEPS = {"mlp": 600, "cnn": 200, "transformer": 150}
"""Far more than that, as many as a second or so takes: a change that is planned waits for new processes while the others
train on, and what comes of changes while ranks finish is the coordinator's to decide."""


def spec(model: str) -> JobSpec:
    return spec_of(
        4,
        steps=STEPS[model],
        checkpointing={"every_n_steps": 1000},
        hyperparameters={"batch_size": 22, "epochs": 2, "lr": 0.01},
        **MODELS[model],
    )


def series(workers: list[StubWorker]) -> dict[int, float]:
    """The loss of each step, by whichever rank told it; told twice, it must be the same."""
    told: dict[int, float] = {}
    for worker in workers:
        for step, loss in worker.series("loss").items():
            assert told.setdefault(step, loss) == loss, f"step {step} had two losses"
    return told


class Run:
    """One run and the processes that were part of it."""

    def __init__(self, agent: AgentStub, spec: JobSpec, world_size: int | None = None) -> None:
        self.agent, self.spec = agent, spec
        self.run_id = agent.new_run()
        self.generation = 1
        self.ranks = agent.start(spec, self.run_id, world_size=world_size)
        self.everybody = list(self.ranks)

    def train_to(self, step: int) -> None:
        self.agent.wait_step(self.ranks[0], step)

    def meet(self) -> None:
        """Until each rank has told that it has the state: one that is killed tells nothing more."""
        marks = [worker.marks for worker in self.ranks]
        self.agent.pump(
            lambda: all(
                (own := one.get(self.generation)) is not None and own.resume_step is not None
                for one in marks
            ),
            "all ranks to have met",
        )

    def next(self, members: list[StubWorker | None], *, at_boundary: bool = False) -> None:
        if at_boundary:
            self.meet()  # the coordinator plans no change either before all ranks have begun
        self.generation += 1
        self.ranks = self.agent.form(
            self.spec, self.run_id, members, self.generation, at_boundary=at_boundary
        )
        self.everybody += [worker for worker in self.ranks if worker not in self.everybody]

    def lose(self, *ranks: int, replace: bool = True) -> None:
        """Kill ranks; the survivors go on, with new processes in place of the dead ones or without."""
        victims = [self.ranks[rank] for rank in ranks]
        self.agent.kill(*victims)
        self.agent.wait_exit(victims)
        survivors = [worker for worker in self.ranks if worker not in victims]
        self.agent.abort(survivors, self.generation)
        members = [None if worker in victims else worker for worker in self.ranks]
        self.next(members if replace else [member for member in members if member])

    def hang(self, rank: int) -> None:
        """Stop a rank; the others are told to leave, and go on with a new process in its place."""
        stopped = self.ranks[rank]
        self.agent.pump(lambda: stopped.pid is not None, "the worker to be forked")
        assert stopped.pid is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        survivors = [worker for worker in self.ranks if worker is not stopped]
        self.agent.abort(survivors, self.generation)
        self.next([None if worker is stopped else worker for worker in self.ranks])
        os.kill(stopped.pid, signal.SIGKILL)

    def outcome(self) -> WorkerOutcome:
        self.agent.wait_exit(self.ranks)
        finished(self.ranks)
        assert self.ranks[0].outcome is not None
        return self.ranks[0].outcome

    def resume_steps(self) -> list[int | None]:
        marks = self.ranks[0].marks
        return [marks[generation].resume_step for generation in sorted(marks)]


def same(first: WorkerOutcome, second: WorkerOutcome) -> None:
    assert first.step == second.step
    assert first.state_digest == second.state_digest
    assert first.sample_digest == second.sample_digest
    assert first.metrics == second.metrics


@pytest.fixture(scope="module")
def undisturbed(agent: AgentStub) -> dict[str, tuple[WorkerOutcome, dict[int, float]]]:
    agent.env = {}
    found = {}
    for model in MODELS:
        run = Run(agent, spec(model))
        found[model] = (run.outcome(), series(run.everybody))
    return found


@pytest.mark.parametrize("seed", range(SCHEDULES_PER_MODEL))
@pytest.mark.parametrize("model", MODELS)
def test_random_faults_change_nothing(
    agent: AgentStub, undisturbed: Any, model: str, seed: int
) -> None:
    rng = random.Random(f"{model} {seed}")
    run = Run(agent, spec(model))
    for step in sorted(rng.sample(range(1, LAST_FAULT_STEP), 3)):
        run.train_to(step)
        _do_something(run, rng)
    outcome = run.outcome()
    expected, losses = undisturbed[model]
    same(outcome, expected)
    assert series(run.everybody) == losses


def _do_something(run: Run, rng: random.Random) -> None:
    """One random fault or change; some rank survives it."""
    world = len(run.ranks)
    victims = rng.sample(range(world), rng.randint(1, max(1, world - 1)))
    if world < 4 and rng.random() < 0.5:
        run.next([*run.ranks, *[None] * rng.randint(1, 4 - world)], at_boundary=True)
    elif world == 1:
        return
    elif rng.random() < 0.2:
        run.hang(victims[0])
    elif rng.random() < 0.3:
        run.lose(*victims[:1])
        run.lose(rng.randrange(world))  # while the next generation forms
    else:
        run.lose(*victims, replace=rng.random() < 0.6)


@pytest.mark.parametrize("model", MODELS)
def test_killed_ranks_are_replaced_and_nothing_changes(
    agent: AgentStub, undisturbed: Any, model: str
) -> None:
    rng = random.Random(model)
    run = Run(agent, spec(model))
    for number, victims in enumerate([(1,), (0,), (2, 3), (0, 1, 2)]):
        wanted = 8 + 10 * number + rng.randrange(5)
        # However far they came before the loss was noticed here.
        run.train_to(max(wanted, run.ranks[0].step + 1))
        run.meet()
        run.lose(*victims)
    outcome = run.outcome()
    expected, losses = undisturbed[model]
    same(outcome, expected)
    told = series(run.everybody)
    assert told == {step: losses[step] for step in told}
    assert sorted(told) == sorted(losses), "a step's loss was told by nobody"
    parked = [(worker, one) for worker in run.everybody for one in worker.parked]
    # One that had not yet entered the generation that failed has nothing to leave.
    assert 0 < len(parked) <= 3 + 3 + 2 + 1
    for worker, one in parked:
        left, following = worker.marks.get(one.generation), worker.marks.get(one.generation + 1)
        had_a_state = left is not None and left.resume_step is not None
        if had_a_state and following is not None:
            assert following.resume_step is not None
            assert one.step <= following.resume_step <= one.step + 1, (
                "a completed step is done again"
            )


@pytest.mark.parametrize("model", MODELS)
def test_the_world_shrinks_and_grows_and_nothing_changes(
    agent: AgentStub, undisturbed: Any, model: str
) -> None:
    run = Run(agent, spec(model))
    run.train_to(7)
    run.lose(2, replace=False)
    run.train_to(15)
    run.lose(0, replace=False)
    run.train_to(22)
    run.lose(1, replace=False)
    run.train_to(30)
    grown_at = run.ranks[0].step
    run.next([run.ranks[0], None, None], at_boundary=True)
    run.train_to(grown_at + 8)
    run.next([*run.ranks, None], at_boundary=True)
    same(run.outcome(), undisturbed[model][0])
    assert series(run.everybody) == undisturbed[model][1]


def test_ranks_that_find_nobody_with_the_steps_to_go_on_from_go_back_to_no_checkpoint(
    agent: AgentStub,
) -> None:
    """What the generation before had whole may be committed any moment: the coordinator thinks that they need it no more."""
    spec = spec_of(2)
    whole = finished(agent.run(spec))
    checkpoint = agent.commit(whole, FIRST)
    run_id = agent.new_run()
    new = [None, None]
    ranks = agent.form(spec, run_id, new, 1, checkpoint=checkpoint, resume_step=FIRST + 1)
    agent.pump(lambda: all(worker.parked for worker in ranks), "both ranks to leave")
    parked = [one for worker in ranks for one in worker.parked]
    assert [(one.step, one.has_state) for one in parked] == [(FIRST, False)] * 2
    assert any(
        one.bereft and f"no rank has the {FIRST + 1} steps" in one.reason for one in parked
    ), parked
    agent.form(spec, run_id, ranks, 2, checkpoint=checkpoint, resume_step=FIRST)
    agent.wait_exit(ranks)
    outcome, expected = finished(ranks)[0].outcome, whole[0].outcome
    assert outcome is not None
    assert expected is not None
    same(outcome, expected)


def test_a_survivor_goes_on_although_another_had_one_step_more(
    agent: AgentStub, undisturbed: Any
) -> None:
    """It was in the generation before, so nothing that is whole there lies beyond what it has."""
    run = Run(agent, spec("mlp"), world_size=2)
    run.train_to(10)
    agent.kill(run.ranks[1])
    agent.wait_exit(run.ranks[1:])
    agent.abort(run.ranks[:1], 1)
    run.ranks = agent.form(run.spec, run.run_id, [run.ranks[0], None], 2, resume_step=10_000)
    same(run.outcome(), undisturbed["mlp"][0])


def test_a_smaller_world_from_the_start(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec("cnn"), world_size=3)
    same(run.outcome(), undisturbed["cnn"][0])


def test_a_planned_change_costs_no_step(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec("mlp"), world_size=2)
    run.train_to(10)
    run.next([*run.ranks, None, None], at_boundary=True)
    same(run.outcome(), undisturbed["mlp"][0])
    for worker in run.ranks[:2]:
        assert [one.step for one in worker.parked] == [worker.marks[2].resume_step]


def test_only_the_source_packs_its_state(agent: AgentStub) -> None:
    run = Run(agent, user_spec("TellsOfPacking", 3, steps=2000, checkpointing={"enabled": False}))
    run.train_to(10)
    run.lose(1)
    last = run.outcome().step
    told = [line for worker in run.everybody for line in agent.log(worker).splitlines()]
    packed = [line for line in told if "packs" in line and line != f"packs step {last}"]
    assert len(packed) == 2, "one for all who began, one for the new rank"
    assert packed[0] == "packs step 0"


def test_a_stopped_rank_does_not_hold_the_others(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec("mlp"))
    run.train_to(10)
    run.hang(2)
    same(run.outcome(), undisturbed["mlp"][0])


def test_a_socket_that_is_shut_down_under_a_write_does_not_end_a_worker(agent: AgentStub) -> None:
    run = Run(agent, spec("mlp"), world_size=2)
    run.train_to(1)
    for worker in run.ranks:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        ignored = int(status.split("SigIgn:")[1].split()[0], 16)
        assert ignored & 1 << (signal.SIGPIPE - 1)
    run.outcome()


def test_orders_of_an_older_generation_change_nothing(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec("mlp"))
    run.train_to(10)
    run.lose(1)
    run.train_to(20)
    agent.abort(run.ranks, 1)
    agent.send(run.ranks[0], agent.join(3, 4, 1))
    same(run.outcome(), undisturbed["mlp"][0])


def test_a_generation_that_fails_while_it_forms(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec("mlp"))
    run.train_to(10)
    run.lose(1)
    run.lose(1)
    run.lose(2)
    same(run.outcome(), undisturbed["mlp"][0])


def test_a_spare_is_prepared_and_waits(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec("mlp"))
    spare = agent.spawn(agent.plan(run.spec, run.run_id))
    agent.pump(
        lambda: any(phase is WorkerPhase.SPARE for phase, _ in spare.phases), "a prepared spare"
    )
    run.train_to(10)
    agent.kill(run.ranks[1])
    agent.wait_exit([run.ranks[1]])
    run.next([run.ranks[0], spare, *run.ranks[2:]])
    same(run.outcome(), undisturbed["mlp"][0])


def test_who_came_last_can_tell_of_the_whole_run(agent: AgentStub, undisturbed: Any) -> None:
    """Whoever was there before may have died before its last words were heard."""
    run = Run(agent, spec("mlp"), world_size=2)
    run.train_to(10)
    run.lose(0)
    newcomer = run.ranks[0]
    run.meet()
    run.lose(1)
    run.outcome()
    assert series([newcomer]) == undisturbed["mlp"][1]


def test_without_survivors_the_checkpoint_is_read(agent: AgentStub, undisturbed: Any) -> None:
    run = Run(agent, spec_of(4, **spec_document("mlp", every_n_steps=10)))
    run.train_to(10)
    agent.pump(
        lambda: all(any(s.step == 10 for s in w.shards) for w in run.ranks), "the checkpoint"
    )
    checkpoint = agent.commit(run.ranks, 10)
    for worker in run.ranks:
        agent.kill(worker)
    agent.wait_exit(run.ranks)
    run.generation += 1
    run.ranks = agent.start(run.spec, run.run_id, generation=2, checkpoint=checkpoint)
    same(run.outcome(), undisturbed["mlp"][0])
    assert run.ranks[0].marks[2].source == "checkpoint of step 10"


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_that_leave_save_their_state_and_others_go_on_with_it(
    agent: AgentStub, undisturbed: Any, world_size: int, saves: bool
) -> None:
    document = spec_document("mlp", every_n_steps=10) | {"checkpointing": {"enabled": saves}}
    run = Run(agent, spec_of(4, **document), world_size=world_size)
    run.train_to(25)
    agent.vacate(run.ranks[0])
    left = run.outcome()
    assert left.stopped
    assert left.checkpoint_step == left.step < STEPS["mlp"]
    agent.pump(lambda: all(worker.shards for worker in run.ranks), "their shards")
    checkpoint = agent.commit(run.ranks, left.step)
    run.ranks = agent.start(run.spec, run.run_id, generation=2, checkpoint=checkpoint)
    run.everybody += run.ranks
    same(run.outcome(), undisturbed["mlp"][0])
    assert series(run.everybody) == undisturbed["mlp"][1]
    assert run.ranks[0].marks[2].source == f"checkpoint of step {left.step}"


def test_an_order_to_leave_an_older_generation_changes_nothing(
    agent: AgentStub, undisturbed: Any
) -> None:
    run = Run(agent, spec("mlp"), world_size=2)
    run.train_to(10)
    run.lose(1)
    agent.send(run.ranks[0], Vacate(generation=1))
    same(run.outcome(), undisturbed["mlp"][0])


def spec_document(model: str, every_n_steps: int) -> dict[str, Any]:
    return {
        "steps": STEPS[model],
        "checkpointing": {"every_n_steps": every_n_steps},
        "hyperparameters": {"batch_size": 22, "epochs": 2, "lr": 0.01},
        **MODELS[model],
    }
