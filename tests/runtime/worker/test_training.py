"""Real forked workers over loopback: the same bits whatever happens in between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distroml.model import Checkpoint
from distroml.reports import WorkerPhase
from distroml.runtime.control import MAX_METRIC_NAMES, Committed, Save
from distroml.runtime.worker.snapshot import read_checkpoint
from distroml.spec import JobSpec, convert_spec
from tests.runtime.worker.agent_stub import AgentStub, StubWorker


def spec_of(workers: int = 1, **changes: Any) -> JobSpec:
    document: dict[str, Any] = {
        "resources": {"workers": workers},
        "hyperparameters": {"batch_size": 16, "epochs": 2, "lr": 0.01},
        "checkpointing": {"every_n_steps": 7},
        "dataset_options": {"samples": 170, "features": 9, "classes": 3},
        "model_options": {"hidden": 16},
    }
    return convert_spec(document | changes)


ENTRYPOINT: dict[str, Any] = {"dataset_options": {}, "model_options": {}}


def user_spec(name: str, workers: int = 1, **changes: Any) -> JobSpec:
    return spec_of(workers, entrypoint=f"stub_adapters:{name}", **ENTRYPOINT, **changes)


@pytest.fixture(autouse=True)
def _clean_environment(agent: AgentStub) -> None:
    agent.env = {}


def finished(workers: list[StubWorker]) -> list[StubWorker]:
    for worker in workers:
        assert worker.failure is None, worker.failure
        assert worker.exit_status == 0
        assert worker.outcome is not None
    assert len({w.outcome.state_digest for w in workers if w.outcome}) == 1
    return workers


def test_phases_metrics_and_outcome(agent: AgentStub) -> None:
    workers = finished(agent.run(spec_of(2)))
    for worker in workers:
        assert [phase for phase, _ in worker.phases] == [
            WorkerPhase.CONNECTING,
            WorkerPhase.RESTORING,
            WorkerPhase.TRAINING,
            WorkerPhase.FINISHING,
        ]
        assert worker.step == worker.total_steps == 22
    first, second = workers
    assert second.metrics == []
    assert sorted(first.series("loss")) == list(range(1, 23))
    assert sorted(first.series("accuracy")) == [11, 22]
    assert set(first.metrics[0].values) == {"loss", "lr", "step_time", "throughput"}
    assert [m.epoch for m in first.metrics if "loss" in m.values] == [0] * 11 + [1] * 11
    outcome = first.outcome
    assert outcome is not None
    assert (outcome.step, outcome.epoch, outcome.stopped) == (22, 1, False)
    assert outcome.checkpoint_step == 22
    assert set(outcome.metrics) == {"loss", "accuracy", "eval_loss"}
    # Those between are left out where the disk is still busy with that before.
    assert {7, 22} <= {s.step for s in first.shards} <= {7, 14, 21, 22}


def test_numbers_of_any_kind_are_metrics(agent: AgentStub) -> None:
    (first, _) = finished(agent.run(user_spec("EvaluatesInNumpy", 2, steps=3)))
    assert first.series("score") == {3: 0.5}
    assert first.series("worst") == {3: 2.0}
    assert first.series("norm_000") == dict.fromkeys((1, 2, 3), 0.25)
    assert set(first.series("throughput")) == {1, 2, 3}
    assert {len(record.values) for record in first.metrics} == {MAX_METRIC_NAMES, 2}


def test_the_agent_is_told_of_an_evaluation_while_it_lasts(
    agent: AgentStub, tmp_path: Path
) -> None:
    agent.env = {"GO": str(tmp_path / "go")}
    spec = user_spec("EvaluatesForLong", 2, steps=5)  # of three in an epoch
    workers = agent.start(spec, agent.new_run())
    agent.pump(lambda: all(w.evaluating for w in workers), "the ranks to evaluate")
    assert {w.step for w in workers} == {3}
    (tmp_path / "go").touch()
    agent.wait_exit(workers)
    finished(workers)
    assert not any(w.evaluating for w in workers)


def test_training_learns(agent: AgentStub) -> None:
    spec = spec_of(
        2,
        hyperparameters={"batch_size": 64, "epochs": 2, "lr": 0.003},
        dataset_options={"samples": 4000},
        model_options={},
        checkpointing={"enabled": False},
    )
    (first, _) = finished(agent.run(spec))
    loss = first.series("loss")
    assert loss[len(loss)] < 0.6 * loss[1]
    assert first.series("accuracy")[len(loss)] > 0.6
    assert first.outcome is not None
    assert first.outcome.checkpoint_step is None
    assert first.shards == []


RESUMED = {
    "mlp": spec_of,
    "cnn, uneven": lambda w: spec_of(
        w,
        model="cnn",
        model_options={"channels": 4, "dropout": 0.3},
        hyperparameters={"batch_size": 21, "epochs": 2, "optimizer": "adamw", "weight_decay": 0.1},
        dataset_options={"samples": 107, "features": 16, "classes": 3},
        checkpointing={"every_n_steps": 3},
    ),
    "sgd": lambda w: spec_of(
        w, hyperparameters={"batch_size": 16, "epochs": 2, "optimizer": "sgd", "momentum": 0.9}
    ),
    "transformer": lambda w: spec_of(
        w,
        model="transformer",
        dataset="text",
        model_options={"layers": 1, "heads": 2, "width": 16, "context": 16, "dropout": 0.1},
        dataset_options={"max_bytes": 4096},
        steps=12,
    ),
    "user's, every generator": lambda w: user_spec(
        "Normalised", w, checkpointing={"every_n_steps": 4}
    ),
    "user's scheduler": lambda w: user_spec(
        "Scheduled", w, steps=17, checkpointing={"every_n_steps": 7}
    ),
    "compressed": lambda w: spec_of(w, checkpointing={"every_n_steps": 7, "compression": "zstd"}),
    "user's data loader": lambda w: user_spec("Loaded", w, checkpointing={"every_n_steps": 5}),
}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("make", RESUMED.values(), ids=list(RESUMED))
def test_a_resumed_run_ends_in_the_same_bits(agent: AgentStub, make: Any, world_size: int) -> None:
    spec = make(world_size)
    whole = finished(agent.run(spec))
    every = spec.checkpointing.every_n_steps
    resume_from(agent, spec, whole, agent.commit(whole, every))


def resume_from(
    agent: AgentStub, spec: JobSpec, whole: list[StubWorker], checkpoint: Checkpoint
) -> None:
    resumed = finished(
        agent.run(spec, run_id=whole[0].plan.run_id, generation=2, checkpoint=checkpoint)
    )
    expected, got = whole[0].outcome, resumed[0].outcome
    assert expected is not None
    assert got is not None
    assert got.state_digest == expected.state_digest
    assert got.metrics == expected.metrics
    for name in ("loss", "accuracy", "eval_loss", "perplexity", "noise"):
        before, after = whole[0].series(name), resumed[0].series(name)
        assert after == {s: v for s, v in before.items() if s > checkpoint.step}, name
    # the same bytes were there already: nothing was written twice
    files = agent.store.list(checkpoint.directory.rpartition("/")[0])
    shards = [file.replace(".g2.", ".") for file in files if file.endswith(".safetensors")]
    assert len(set(shards)) == len(shards)


def test_a_killed_run_resumes_from_its_last_commit(agent: AgentStub) -> None:
    spec = spec_of(3, hyperparameters={"batch_size": 16, "epochs": 8, "lr": 0.01})
    whole = finished(agent.run(spec))
    broken = agent.start(spec, agent.new_run())
    agent.wait_step(broken[0], 30)
    agent.kill(broken[1])
    agent.wait_exit([broken[1]])
    assert broken[1].exit_status == -9
    for survivor in (broken[0], broken[2]):
        agent.kill_if_alive(survivor)
    agent.wait_exit(broken)
    for survivor in (broken[0], broken[2]):
        assert survivor.failure is None or survivor.failure.collateral
    durable = ({shard.step for shard in worker.shards} for worker in broken)
    checkpoint = agent.commit(broken, max(set.intersection(*durable)))
    resume_from(agent, spec, whole, checkpoint)


def test_fast_reduction_trains_too(agent: AgentStub) -> None:
    workers = finished(agent.run(spec_of(3, distributed={"reduction": "fast"})))
    loss = workers[0].series("loss")
    assert loss[22] < loss[1]


def test_world_sizes_agree_up_to_rounding(agent: AgentStub) -> None:
    """170 samples in batches of 16 leave a last batch of 10; 4 ranks hold 3, 3, 2, 2 of it."""
    losses = [finished(agent.run(spec_of(w)))[0].series("loss") for w in (1, 2, 4)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)


def test_ranks_without_samples_change_nothing(agent: AgentStub) -> None:
    """33 samples in batches of 16: the last batch has one sample for four ranks."""
    agent.env["SAMPLES"] = "33"
    alone, four = (finished(agent.run(user_spec("Regression", w)))[0] for w in (1, 4))
    assert four.series("loss") == pytest.approx(alone.series("loss"), rel=1e-4)
    assert sorted(four.series("loss")) == list(range(1, 7))


def test_empty_ranks_keep_statistics_equal(agent: AgentStub) -> None:
    """BatchNorm where the last batch has a sample for one rank only: all end in the same state."""
    spec = spec_of(
        4,
        model="cnn",
        model_options={"channels": 2},
        dataset_options={"samples": 33, "features": 16, "classes": 3},
    )
    finished(agent.run(spec))


def test_the_scheduler_moves_once_per_step_on_any_number_of_ranks(agent: AgentStub) -> None:
    spec = user_spec("Scheduled", 2, steps=17, resources={"workers": 2, "min_workers": 1})
    alone, pair = (finished(agent.run(spec, world_size=ranks))[0].series("lr") for ranks in (1, 2))
    assert alone == pair
    assert alone[1] == pytest.approx(0.001)
    assert alone[6] == pytest.approx(0.01)
    assert alone[17] == pytest.approx(0.01 / 4)


DELTA: dict[str, Any] = {"delta": True, "compression": "zstd"}


def test_a_resumed_run_refers_to_the_checkpoint_that_it_came_from(agent: AgentStub) -> None:
    spec = user_spec("Frozen", 2, steps=12, checkpointing={"every_n_steps": 4, **DELTA})
    whole = finished(agent.run(spec))
    first = agent.commit(whole, 4)
    resumed = finished(agent.run(spec, run_id=whole[0].plan.run_id, generation=2, checkpoint=first))
    second = agent.commit(resumed, 8)
    assert second.refers_to == (first.directory,)
    assert second.size_bytes < 0.1 * first.size_bytes
    again = finished(agent.run(spec, run_id=whole[0].plan.run_id, generation=3, checkpoint=second))
    assert again[0].outcome == whole[0].outcome


def test_a_worker_refers_to_what_the_agent_says_is_committed(agent: AgentStub) -> None:
    spec = user_spec("Frozen", steps=1_000_000_000, checkpointing={"every_n_steps": 5, **DELTA})
    (worker,) = agent.start(spec, agent.new_run())
    agent.pump(lambda: bool(worker.shards), "a shard")
    first = agent.commit([worker], worker.shards[0].step)
    agent.send(worker, Committed(checkpoint=first))
    agent.stop(worker)
    agent.wait_exit([worker])
    (ended,) = finished([worker])
    assert ended.outcome is not None
    last = agent.commit([worker], ended.outcome.step)
    assert last.refers_to == (first.directory,)


def test_a_plain_sequence_is_a_dataset(agent: AgentStub) -> None:
    finished(agent.run(user_spec("Single", 2)))


@pytest.mark.parametrize("who", [0, 2])
def test_stop_ends_all_ranks_at_one_boundary_with_a_checkpoint(agent: AgentStub, who: int) -> None:
    spec = user_spec("Endless", 3, steps=1_000_000_000)
    workers = agent.start(spec, agent.new_run())
    agent.wait_step(workers[0], 3)
    agent.stop(workers[who])
    agent.wait_exit(workers)
    finished(workers)
    outcomes = [w.outcome for w in workers if w.outcome]
    assert len({o.step for o in outcomes}) == 1
    assert all(o.stopped for o in outcomes)
    step = outcomes[0].step
    assert {o.checkpoint_step for o in outcomes} == {step}
    checkpoint = agent.commit(workers, step)
    manifest, blob = read_checkpoint(agent.store, checkpoint)
    assert manifest.step == step
    assert set(blob.tensors) == {
        "model.weight",
        "model.bias",
        *(
            f"optimizer.{p}.{s}"
            for p in ("weight", "bias")
            for s in ("step", "exp_avg", "exp_avg_sq")
        ),
    }


def test_a_request_to_save_is_answered_once_at_one_boundary(agent: AgentStub) -> None:
    spec = user_spec("Endless", 3, steps=1_000_000_000, checkpointing={"every_n_steps": 10**9})
    workers = agent.start(spec, agent.new_run())
    agent.wait_step(workers[0], 3)
    for number, worker in enumerate(workers):  # one after the other, and the first one twice
        for _ in range(1 + (number == 0)):
            agent.send(worker, Save(generation=1, request=1))
        agent.wait_step(workers[0], workers[0].step + 2)
    agent.pump(lambda: all(len(w.shards) == 1 for w in workers), "all to have saved")
    for worker in workers:
        agent.send(worker, Save(generation=0, request=9))  # of a generation that is over
    agent.wait_step(workers[0], workers[0].step + 5)
    for worker in workers:
        agent.send(worker, Save(generation=1, request=3))
    agent.pump(lambda: all(len(w.shards) == 2 for w in workers), "all to have saved again")
    agent.stop(workers[0])
    agent.wait_exit(workers)
    finished(workers)
    saved = [[(s.step, s.save_request) for s in w.shards] for w in workers]
    assert saved[0] == saved[1] == saved[2]
    assert [request for _, request in saved[0]] == [1, 3, 3], "the final one answers as well"


def test_each_step_is_saved_where_the_disk_keeps_up(agent: AgentStub) -> None:
    """Whether it does is asked as late as all ranks can still hear of it."""
    spec = user_spec("WaitsForItsDisk", 2, steps=8, checkpointing={"every_n_steps": 1})
    for worker in finished(agent.run(spec)):
        assert [shard.step for shard in worker.shards] == list(range(1, 9))
        assert worker.abandoned == []


def test_no_rank_saves_a_step_for_which_another_has_no_time(
    agent: AgentStub, tmp_path: Path
) -> None:
    agent.env = {"GO": str(tmp_path / "go")}
    spec = user_spec("SavesSlowly", 2, steps=1_000_000_000, checkpointing={"every_n_steps": 1})
    workers = agent.start(spec, agent.new_run())
    agent.wait_step(workers[0], 20)
    slow = workers[1]
    assert [[shard.step for shard in worker.shards] for worker in workers] == [[1], []]
    told = [(one.step, one.reason) for one in slow.abandoned]
    assert told == [(2, "rank 1: that of step 1 is still being written")], "once for all of them"
    (tmp_path / "go").touch()
    agent.pump(lambda: all(len(w.shards) >= 3 for w in workers), "both to save again")
    agent.stop(workers[0])
    agent.wait_exit(workers)
    finished(workers)
    first, second = [[shard.step for shard in worker.shards] for worker in workers]
    assert first == second


def test_a_run_begins_with_another_jobs_checkpoint(agent: AgentStub) -> None:
    """Some steps in one job and the rest in another end in the same bits as all in one."""
    spec = spec_of(2)
    whole = finished(agent.run(spec))
    checkpoint = agent.commit(whole, 7)
    other = agent.run(
        spec,
        checkpoint=msgspec.structs.replace(
            checkpoint, directory=_copied(agent, checkpoint.directory, "other-job")
        ),
    )
    went_on = finished(other)
    expected, got = whole[0].outcome, went_on[0].outcome
    assert expected is not None
    assert got is not None
    assert got.state_digest == expected.state_digest
    steps = [shard.step for shard in went_on[0].shards]
    # Those between are left out where the disk is still busy with that before.
    assert (steps[0], steps[-1]) == (7, 22), "its own copy of step 7 too"


def test_weights_alone_begin_at_step_0(agent: AgentStub) -> None:
    spec = spec_of(2)
    whole = finished(agent.run(spec))
    checkpoint = agent.commit(whole, 22)
    moved = msgspec.structs.replace(
        checkpoint, directory=_copied(agent, checkpoint.directory, "other-job")
    )
    workers = [
        agent.spawn(
            agent.plan(
                spec,
                "run-w",
                msgspec.structs.replace(agent.join(rank, 2, 1, moved), weights_only=True),
            )
        )
        for rank in range(2)
    ]
    agent.wait_exit(workers)
    (first, _) = finished(workers)
    loss, before = first.series("loss"), whole[0].series("loss")
    assert sorted(loss) == list(range(1, 23))
    assert loss[1] < 0.9 * before[1], "it knows what the other job learned"


def test_a_checkpoint_of_another_model_is_refused_by_name(agent: AgentStub) -> None:
    whole = finished(agent.run(spec_of(1)))
    checkpoint = agent.commit(whole, 7)
    moved = msgspec.structs.replace(
        checkpoint, directory=_copied(agent, checkpoint.directory, "other-job")
    )
    wider = spec_of(1, model_options={"hidden": 17})
    (worker,) = agent.run(wider, checkpoint=moved)
    assert worker.failure is not None
    for part in ("does not fit this job's model", "float32[16, 9]", "float32[17, 9]", "model."):
        assert part in worker.failure.error


def _copied(agent: AgentStub, directory: str, job: str) -> str:
    """The same files as if another job had written them."""
    target = "/".join((job, *directory.split("/")[1:]))
    shutil.copytree(agent.store_dir / directory, agent.store_dir / target)
    return target


def test_a_run_that_was_already_done_ends_at_once(agent: AgentStub) -> None:
    spec = spec_of(2)
    whole = finished(agent.run(spec))
    checkpoint = agent.commit(whole, 22)
    again = finished(
        agent.run(spec, run_id=whole[0].plan.run_id, generation=2, checkpoint=checkpoint)
    )
    assert again[0].outcome == whole[0].outcome
    assert again[0].shards == []


def test_a_resume_can_change_the_number_of_ranks(agent: AgentStub) -> None:
    whole = finished(agent.run(spec_of(3)))
    checkpoint = agent.commit(whole, 7)
    run_id = whole[0].plan.run_id
    resumed = finished(
        agent.run(spec_of(3), run_id=run_id, generation=2, checkpoint=checkpoint, world_size=2)
    )
    expected = {s: v for s, v in whole[0].series("loss").items() if s > 7}
    assert resumed[0].series("loss") == pytest.approx(expected, rel=1e-3)
