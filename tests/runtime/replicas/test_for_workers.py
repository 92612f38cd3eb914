"""Shards wait until others have them, some at a time; checkpoints are brought, or it is said why not."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from distroml.model import FailureKind
from distroml.reports import ShardFact
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.control import CheckpointHere, NeedCheckpoint
from distroml.runtime.replicas import bringing, for_workers, keeping
from distroml.runtime.replicas.for_workers import MAX_KEPT, MAX_UNDER_WAY, MAX_WAITING
from distroml.runtime.replicas.wire import File, Keep, Message
from tests.runtime.checkpoint.shards import JOB, RUN, write_shards
from tests.runtime.replicas.world import World, flip, saved_at, until, within


async def test_a_shard_is_settled_once_another_node_has_it(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        (fact,) = write_shards(world.store("a"), world_size=1)
        settled = list[str]()
        workers = world.nodes["a"].for_workers
        assert workers.must_secure(JOB)
        workers.secure(JOB, RUN, fact, settled.append)
        assert settled == []
        async with within():
            await until(lambda: settled == [""])
        path = f"{JOB}/run-1/checkpoints/ckpt_step_00000100/{fact.file}"
        assert sum((tmp_path / name / path).exists() for name in "abc") == 2


def shards_at(world: World, name: str, *steps: int) -> list[ShardFact]:
    """Those that the only rank wrote on the disk of a node."""
    store = world.store(name)
    return [write_shards(store, step=step, world_size=1)[0] for step in steps]


async def test_what_lags_behind_without_end_is_given_up_the_newest_last(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        held_back: list[Keep] = []

        def hold_back(sender: str, target: str, message: Message) -> Message | None:
            if isinstance(message, Keep):
                held_back.append(message)
                return None
            return message

        world.network.tamper = hold_back
        settled: dict[int, str] = {}
        facts = shards_at(world, "a", *range(1, MAX_UNDER_WAY + MAX_WAITING + 3))
        for fact in facts:
            world.nodes["a"].for_workers.secure(
                JOB, RUN, fact, partial(settled.__setitem__, fact.step)
            )
        assert sorted(settled) == [MAX_UNDER_WAY + 1, MAX_UNDER_WAY + 2]
        assert all("still to be copied" in problem for problem in settled.values())
        async with within():
            await until(lambda: len(held_back) == MAX_UNDER_WAY)


async def test_what_waits_is_copied_when_its_turn_comes(tmp_path: Path) -> None:
    async with World(tmp_path, "ab") as world:
        settled: list[str] = []
        facts = shards_at(world, "a", *range(1, MAX_UNDER_WAY + MAX_WAITING + 1))
        for fact in facts:
            world.nodes["a"].for_workers.secure(JOB, RUN, fact, settled.append)
        async with within():
            await until(lambda: settled == [""] * len(facts))
        for fact in facts:
            assert world.holders(file_of(fact)) == "ab"


def shared_store(world: World) -> None:
    """The job keeps its checkpoints where all nodes see them."""
    job = world.state.jobs[JOB]
    checkpointing = replace(job.spec.checkpointing, store="file:///shared")
    spec = replace(job.spec, checkpointing=checkpointing)
    world.state = replace(world.state, jobs={JOB: replace(job, spec=spec)})


@pytest.mark.parametrize("store", ["local", "shared"])
async def test_a_shard_counts_once_the_records_up_to_it_are_elsewhere_too(
    tmp_path: Path, store: str
) -> None:
    """Nobody trains its steps again, so nobody could make them anew if this disk were lost."""
    async with World(tmp_path, "ab") as world:
        if store == "shared":
            shared_store(world)
        world.records_shared.clear()
        settled: list[str] = []
        (fact,) = shards_at(world, "a", 1)
        world.nodes["a"].for_workers.secure(JOB, RUN, fact, settled.append)
        async with within():
            if store == "local":
                await until(lambda: world.holders(file_of(fact)) == "ab")
            await asyncio.sleep(0)
            assert settled == []
            world.records_shared.set()
            await until(lambda: settled == [""])
        assert (world.holders(file_of(fact)) == "ab") == (store == "local")


async def test_a_shard_does_not_wait_for_records_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(for_workers, "SHARE_PATIENCE_S", 0.05)
    async with World(tmp_path, "ab") as world:
        world.records_shared.clear()
        settled: list[str] = []
        world.nodes["a"].for_workers.secure(JOB, RUN, *shards_at(world, "a", 1), settled.append)
        async with within():
            await until(lambda: settled == [""])


class TestAnAgentThatComesBack:
    """It hears at once of all shards that its workers wrote, before it knows the log again."""

    async def test_copies_are_made_although_it_knew_no_other_node_at_first(
        self, tmp_path: Path
    ) -> None:
        async with World(tmp_path, "abc") as world:
            world.unaware.add("a")
            settled: list[str] = []
            (fact,) = shards_at(world, "a", 1)
            workers = world.nodes["a"].for_workers
            assert workers.must_secure(JOB), "it takes itself for alone"
            workers.secure(JOB, RUN, fact, settled.append)
            await asyncio.sleep(0)
            assert settled == []
            world.catch_up("a")
            async with within():
                await until(lambda: settled == [""])
            assert len(world.holders(file_of(fact))) == 2

    async def test_what_is_committed_or_passed_is_not_copied_once_more(
        self, tmp_path: Path
    ) -> None:
        """Its files may be gone: nobody can take them, and what is new would wait behind them."""
        async with World(tmp_path, "ab") as world:
            checkpoint, _ = saved_at(world, "a", step=100)
            world.commit(checkpoint)
            world.unaware.add("a")
            facts = shards_at(world, "a", *range(91, 101), 101)
            for fact in facts[:-1]:
                (tmp_path / "a" / file_of(fact).path).unlink()
            settled: dict[int, str] = {}
            for fact in facts:
                world.nodes["a"].for_workers.secure(
                    JOB, RUN, fact, partial(settled.__setitem__, fact.step)
                )
            assert settled == {}
            world.catch_up("a")
            async with within(keeping.PATIENCE_S / 2):
                await until(lambda: settled == {fact.step: "" for fact in facts})
            assert world.holders(file_of(facts[-1])) == "ab"
            assert world.nodes["a"].counts["copies_refused"] == 0

    async def test_what_it_keeps_until_then_is_bounded(self, tmp_path: Path) -> None:
        async with World(tmp_path, "ab") as world:
            world.unaware.add("a")
            settled: list[str] = []
            (fact,) = shards_at(world, "a", 1)
            for _ in range(MAX_KEPT + 2):
                world.nodes["a"].for_workers.secure(JOB, RUN, fact, settled.append)
            assert len(settled) == 2
            assert all(settled), "a shard that was given up counts"

    async def test_shards_of_a_shared_store_count_as_soon_as_it_knows_that(
        self, tmp_path: Path
    ) -> None:
        async with World(tmp_path, "ab") as world:
            shared_store(world)
            world.unaware.add("a")
            settled: list[str] = []
            for fact in shards_at(world, "a", *range(1, MAX_UNDER_WAY + MAX_WAITING + 3)):
                world.nodes["a"].for_workers.secure(JOB, RUN, fact, settled.append)
            assert settled == []
            world.catch_up("a")
            async with within():
                await until(lambda: len(settled) == MAX_UNDER_WAY + MAX_WAITING + 2)
            assert settled == [""] * len(settled)

    async def test_it_calls_no_checkpoint_corrupt_that_nodes_it_does_not_know_may_have(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bringing, "PATIENCE_S", 0.3)
        monkeypatch.setattr(bringing, "COMPLETE_PATIENCE_S", 0.1)
        async with World(tmp_path, "a", learners="l") as world:
            checkpoint, _ = saved_at(world, "l")
            world.network.cut("l")
            world.unaware.add("a")
            answers: list[CheckpointHere] = []
            need = NeedCheckpoint(number=1, checkpoint=checkpoint)
            world.nodes["a"].for_workers.supply(need, answers.append)
            async with within():
                await until(lambda: len(answers) == 1)
            assert answers[0].kind is not FailureKind.CORRUPT_CHECKPOINT
            assert "does not know all others yet" in answers[0].problem


def file_of(fact: ShardFact) -> File:
    return File(
        f"{checkpoint_directory(JOB, RUN, fact.step)}/{fact.file}", fact.sha256, fact.size_bytes
    )


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
