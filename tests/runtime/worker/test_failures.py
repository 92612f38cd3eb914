"""What a worker says when things go wrong, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from distroml.model import FailureKind
from distroml.reports import WorkerFailure
from tests.runtime.worker.agent_stub import AgentStub, StubWorker
from tests.runtime.worker.test_training import finished, spec_of, user_spec

FIRST = 7
"""The first checkpoint of a run is never skipped because an earlier one is still being written."""


@pytest.fixture(autouse=True)
def _clean_environment(agent: AgentStub) -> None:
    agent.env = {}


def failed(worker: StubWorker) -> WorkerFailure:
    assert worker.exit_status == 1
    assert worker.outcome is None
    assert worker.failure is not None
    return worker.failure


@pytest.mark.parametrize(
    ("entrypoint", "message"),
    [
        ("nowhere_to_be_found:Adapter", "module 'nowhere_to_be_found' is not on this node's"),
        ("os.nowhere:Adapter", "module 'os.nowhere' is not on this node's"),
        ("imports_what_is_missing:A", "imports 'not_installed_anywhere', which is not installed"),
        ("stub_adapters:Missing", "module 'stub_adapters' has no 'Missing'"),
        ("stub_adapters:NOT_A_CLASS", "'NOT_A_CLASS' is not a class derived from distroml.Frame"),
        ("stub_adapters:NotAnAdapter", "'NotAnAdapter' is not a class derived from"),
        ("stub_adapters:NoModel", "class 'NoModel' must define build_model"),
    ],
)
def test_a_wrong_entrypoint_is_named(agent: AgentStub, entrypoint: str, message: str) -> None:
    spec = msgspec.structs.replace(user_spec("Regression"), entrypoint=entrypoint)
    failure = failed(agent.run(spec)[0])
    assert message in failure.error
    assert failure.kind is FailureKind.ERROR
    assert not failure.collateral


def test_the_rank_with_the_bug_is_told_from_its_echoes(agent: AgentStub) -> None:
    workers = agent.start(user_spec("Raises", 3), agent.new_run())
    agent.wait_exit(workers[2:])
    guilty = failed(workers[2])
    assert guilty.error == "ValueError: the user's own bug"
    assert 'raise ValueError("the user' in guilty.traceback
    assert not guilty.collateral
    assert "the user's own bug" in agent.log(workers[2])
    agent.pump(lambda: all(w.parked for w in workers[:2]), "the others to be parked")
    for worker in workers[:2]:
        assert [(one.step, one.has_state) for one in worker.parked] == [(3, True)]
        assert worker.exit_status is None
        agent.kill(worker)


def test_backward_without_dist_is_refused(agent: AgentStub) -> None:
    for worker in agent.run(user_spec("Unweighted", 2)):
        assert "must call dist.backward(loss)" in failed(worker).error


def test_a_metric_that_is_no_number_is_named(agent: AgentStub) -> None:
    (worker,) = agent.run(user_spec("EvaluatesToText"))
    assert "evaluate gave 'grade' = 'good'; a metric is one number" in failed(worker).error


def test_ranks_that_see_other_data_are_named(agent: AgentStub) -> None:
    for worker in agent.run(user_spec("Disagreeing", 2)):
        assert "The dataset of ranks [1] differs from rank 0's" in failed(worker).error


def test_a_flipped_byte_in_a_checkpoint_is_reported_as_such(agent: AgentStub) -> None:
    spec = spec_of(2)
    whole = finished(agent.run(spec))
    checkpoint = agent.commit(whole, FIRST)
    shard = agent.store_dir / checkpoint.directory / "worker_1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    run_id = whole[0].plan.run_id
    workers = agent.run(spec, run_id=run_id, generation=2, checkpoint=checkpoint)
    for worker in workers:
        failure = failed(worker)
        assert failure.kind is FailureKind.CORRUPT_CHECKPOINT
        assert failure.checkpoint_step == FIRST
        assert "worker_1.safetensors" in failure.error
        asked = [(need.checkpoint.step, need.mend) for need in worker.needs]
        assert asked == [(FIRST, False), (FIRST, True)], "another node might have a good copy"


def test_a_broken_copy_that_the_agent_replaces_is_read_again(agent: AgentStub) -> None:
    spec = spec_of(1)
    whole = finished(agent.run(spec))
    checkpoint = agent.commit(whole, FIRST)
    shard = agent.store_dir / checkpoint.directory / "worker_0.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    agent.mending = lambda: shard.write_bytes(good)
    (worker,) = agent.run(spec, run_id=whole[0].plan.run_id, generation=2, checkpoint=checkpoint)
    assert [need.mend for need in worker.needs] == [False, True]
    assert finished([worker])[0].outcome == whole[0].outcome


def test_a_checkpoint_of_another_model_is_refused(agent: AgentStub) -> None:
    whole = finished(agent.run(spec_of(1)))
    checkpoint = agent.commit(whole, FIRST)
    other = spec_of(1, model_options={"hidden": 8})
    (worker,) = agent.run(other, run_id=whole[0].plan.run_id, generation=2, checkpoint=checkpoint)
    assert "does not fit the model" in failed(worker).error


def test_a_store_that_fails_does_not_stop_training(agent: AgentStub) -> None:
    spec = spec_of(1, checkpointing={"every_n_steps": 100})
    run_id = agent.new_run()
    agent.store.put_if_absent(f"job/{run_id}/checkpoints", [b"a file where a directory should be"])
    (worker,) = finished(agent.run(spec, run_id=run_id))
    assert worker.outcome is not None
    assert worker.outcome.checkpoint_step is None
    assert [a.step for a in worker.abandoned] == [22]
    assert "Given up after 5 attempts" in worker.abandoned[0].reason


def test_an_agent_that_comes_back_is_greeted_anew(agent: AgentStub) -> None:
    (worker,) = agent.start(user_spec("Endless", 1, steps=10**9), agent.new_run())
    agent.wait_step(worker, 2)
    before = worker.link
    agent.hang_up(worker)
    agent.pump(lambda: worker.link is not before, "the worker to connect again")
    seen = worker.step
    agent.wait_step(worker, seen + 100)
    agent.stop(worker)
    agent.wait_exit([worker])
    finished([worker])


def test_an_agent_that_does_not_read_does_not_slow_training(agent: AgentStub) -> None:
    """Far more metrics than socket and queue hold; the oldest are dropped, the outcome is not."""
    spec = user_spec("Regression", 1, steps=8_000, checkpointing={"enabled": False})
    (worker,) = agent.start(spec, agent.new_run())
    agent.wait_step(worker, 1)
    assert worker.link is not None
    agent.pause_reading(worker)
    agent.wait_for_log(worker, "worker trained to its last step")
    agent.resume_reading(worker)
    agent.wait_exit([worker])
    finished([worker])
    steps = [m.step for m in worker.metrics]
    assert steps == sorted(steps)
    assert steps[-1] == 8_000


def test_output_of_the_users_code_is_in_the_workers_log(agent: AgentStub) -> None:
    (worker,) = agent.run(user_spec("Prints", 1))
    finished([worker])
    assert "printed by the user" in agent.log(worker)
    assert "stdin ''" in agent.log(worker)


def test_a_log_that_cannot_be_opened_is_a_failed_spawn(agent: AgentStub) -> None:
    plan = msgspec.structs.replace(
        agent.plan(spec_of(1), run_id="no-log"), log_path="/nowhere/at/all.log"
    )
    agent.spawn(plan)
    agent.pump(lambda: bool(agent.spawn_failures), "the spawn to fail")
    failure = agent.spawn_failures.pop()
    assert (failure.run_id, failure.worker) == ("no-log", plan.worker)
    assert "/nowhere/at/all.log" in failure.reason


def test_a_stop_before_the_first_step_trains_none(agent: AgentStub) -> None:
    go = agent.directory / "go"
    agent.env["GO"] = str(go)
    workers = agent.start(user_spec("Held", 2, steps=10**9), agent.new_run())
    agent.pump(lambda: all(w.link is not None for w in workers), "both ranks to say hello")
    agent.stop(workers[1])
    go.touch()
    agent.wait_exit(workers)
    finished(workers)
    assert workers[0].outcome is not None
    assert workers[0].outcome.stopped
    assert workers[0].outcome.step == 0


def test_what_a_worker_started_ends_with_it(agent: AgentStub) -> None:
    """A data loader's process must not outlive a killed worker."""
    (worker,) = agent.start(user_spec("Forks", 1, steps=10**9), agent.new_run())
    agent.wait_step(worker, 1)
    child = int(agent.log(worker).split("child ")[1].split()[0])
    assert Path(f"/proc/{child}").exists()
    agent.kill(worker)
    agent.wait_exit([worker])
    agent.pump(lambda: _gone(child), f"process {child} to end", poll_s=0.02)


def test_the_forkserver_has_one_thread_or_else_no_fork_would_be_safe(agent: AgentStub) -> None:
    (only,) = Path(f"/proc/{agent.process.pid}/task").iterdir()
    assert only.name == str(agent.process.pid) == str(agent.ready_pid)


@pytest.mark.parametrize("how", ["hang up", "kill"])
def test_no_worker_outlives_its_forkserver(
    how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code = f"""
import os, signal, sys, tempfile
from pathlib import Path
from tests.runtime.worker.agent_stub import AgentStub
from tests.runtime.worker.test_training import user_spec
agent = AgentStub(Path(tempfile.mkdtemp(prefix="dml-")))
workers = agent.start(user_spec("Endless", 2, steps=10**9), "run")
agent.wait_step(workers[0], 2)
print(*[w.pid for w in workers], flush=True)
if {how!r} == "kill":
    agent.process.kill()
    agent.process.wait()
else:
    agent.close()
os.read(0, 1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        for pid in pids:
            AgentStub.wait_until(lambda pid=pid: _gone(pid), f"worker {pid} to end")
        process.stdin.write("x")
        process.stdin.close()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_write_that_nobody_reads_does_not_kill(agent: AgentStub) -> None:
    finished(agent.run(user_spec("WritesToAClosedPipe")))


def test_the_library_of_a_store_is_loaded_once_for_all_workers(agent: AgentStub) -> None:
    for store, loaded in (("local", False), ("s3://bucket/x", True), ("local", True)):
        spec = user_spec("TellsWhatIsLoaded", checkpointing={"store": store})
        (worker,) = agent.run(spec)
        assert f"aiobotocore loaded: {loaded}" in failed(worker).error
