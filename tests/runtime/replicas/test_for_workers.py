"""Shards wait until others have them, some at a time; checkpoints are brought, or it is said why not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from distroml.model import FailureKind
from distroml.runtime.control import CheckpointHere, NeedCheckpoint
from distroml.runtime.replicas import bringing
from distroml.runtime.replicas.for_workers import MAX_WAITING
from distroml.runtime.replicas.wire import Keep, Message
from tests.runtime.checkpoint.shards import JOB, write_shards
from tests.runtime.replicas.world import World, flip, saved_at, until, within


async def test_a_shard_is_settled_once_another_node_has_it(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        (fact,) = write_shards(world.store("a"), world_size=1)
        job, settled = world.state.jobs[JOB], list[str]()
        workers = world.nodes["a"].for_workers
        assert workers.must_secure(job)
        workers.secure(job, fact, settled.append)
        assert settled == []
        async with within():
            await until(lambda: settled == [""])
        path = f"{JOB}/run-1/checkpoints/ckpt_step_00000100/{fact.file}"
        assert sum((tmp_path / name / path).exists() for name in "abc") == 2


async def test_what_lags_behind_without_end_is_given_up(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        held_back: list[Message] = []

        def hold_back(sender: str, target: str, message: Message) -> Message | None:
            if isinstance(message, Keep):
                held_back.append(message)
                return None
            return message

        world.network.tamper = hold_back
        (fact,) = write_shards(world.store("a"), world_size=1)
        job, settled = world.state.jobs[JOB], list[str]()
        for _ in range(MAX_WAITING):
            world.nodes["a"].for_workers.secure(job, fact, settled.append)
        assert settled == []
        world.nodes["a"].for_workers.secure(job, fact, settled.append)
        assert "still being copied" in settled.pop()
        async with within():
            await until(lambda: len(held_back) == MAX_WAITING)


@pytest.mark.parametrize("whole", [True, False])
async def test_a_worker_hears_whether_its_checkpoint_is_here(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringing, "COMPLETE_PATIENCE_S", 0.1)
    async with World(tmp_path, "ab") as world:
        checkpoint, (_, shard, *_) = saved_at(world, "a")
        if not whole:
            await asyncio.to_thread(flip, tmp_path / "a" / shard.path, -1)
        answers: list[CheckpointHere] = []
        need = NeedCheckpoint(number=3, checkpoint=checkpoint)
        world.nodes["b"].for_workers.supply(need, answers.append)
        async with within():
            await until(lambda: len(answers) == 1)
        (answer,) = answers
        assert answer.number == 3
        assert answer.kind is (FailureKind.ERROR if whole else FailureKind.CORRUPT_CHECKPOINT)
        assert (shard.path in answer.problem) == (not whole)


async def test_only_the_manifest_comes_where_no_more_is_needed(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        checkpoint, (manifest, *_) = saved_at(world, "a")
        answers: list[CheckpointHere] = []
        need = NeedCheckpoint(number=1, checkpoint=checkpoint, manifest_only=True)
        world.nodes["b"].for_workers.supply(need, answers.append)
        async with within():
            await until(lambda: len(answers) == 1)
        assert not answers[0].problem
        assert world.landed == [("b", manifest.path)]
