"""Real workers on GPUs; each test says how many it needs. What a host without any can tell is in ``test_device``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distroml.spec import JobSpec
from tests.runtime.worker.agent_stub import AgentStub
from tests.runtime.worker.test_in_place_recovery import MODELS, Run, same, series
from tests.runtime.worker.test_training import finished, resume_from, spec_of

GPUS = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: NCCL takes one rank per GPU")


def on_gpus(workers: int, **changes: Any) -> JobSpec:
    return spec_of(workers, distributed={"backend": "nccl"}, **changes)


@one_gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_ends_in_the_same_bits(agent: AgentStub, model: str) -> None:
    spec = on_gpus(1, steps=22, **MODELS[model])
    whole = finished(agent.run(spec))
    loss = whole[0].series("loss")
    assert loss[22] < loss[1]
    resume_from(agent, spec, whole, agent.commit(whole, 7))


@one_gpu
def test_a_killed_worker_leaves_its_gpu_to_the_next(agent: AgentStub) -> None:
    for _ in range(2):
        (worker,) = agent.start(on_gpus(1, steps=100_000), agent.new_run())
        agent.wait_step(worker, 10)
        agent.kill(worker)
        agent.wait_exit([worker])


@two_gpus
@pytest.mark.parametrize("reduction", ["deterministic", "fast"])
def test_ranks_on_gpus_end_with_the_same_state(agent: AgentStub, reduction: str) -> None:
    spec = spec_of(2, distributed={"backend": "nccl", "reduction": reduction})
    finished(agent.run(spec))


@two_gpus
@pytest.mark.parametrize("model", MODELS)
def test_a_killed_rank_changes_no_bit_and_survivors_stay(agent: AgentStub, model: str) -> None:
    spec = on_gpus(2, steps=3000, checkpointing={"every_n_steps": 10_000}, **MODELS[model])
    undisturbed = Run(agent, spec)
    expected = undisturbed.outcome()
    disturbed = Run(agent, spec)
    survivor = disturbed.ranks[0]
    disturbed.train_to(50)
    disturbed.lose(1)
    same(disturbed.outcome(), expected)
    assert disturbed.ranks[0] is survivor
    assert series(disturbed.everybody) == series(undisturbed.everybody)


@two_gpus
def test_a_rank_that_hangs_lets_its_partner_go(agent: AgentStub) -> None:
    run = Run(agent, on_gpus(2, steps=3000))
    run.train_to(50)
    run.hang(1)
    run.meet()
    run.outcome()


@two_gpus
def test_one_gpu_gives_the_bits_of_two(agent: AgentStub) -> None:
    spec = on_gpus(2, steps=50)
    same(Run(agent, spec, world_size=1).outcome(), Run(agent, spec).outcome())
