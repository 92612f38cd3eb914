"""The leader makes up for copies that were lost, and for nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from distroml.model import Checkpoint, CheckpointStatus, JobStatus, NodeStatus
from distroml.runtime.replicas import upkeep
from distroml.runtime.replicas.upkeep import Upkeep
from distroml.runtime.replicas.wire import File
from tests.runtime.checkpoint.shards import JOB
from tests.runtime.replicas.world import World, flip, saved_at, within


class Care:
    """A world, the clock of its leader's upkeep, and one checkpoint that is committed."""

    def __init__(self, world: World, writer: str = "a") -> None:
        self.world, self.now_s = world, 1000.0
        self.checkpoint, self.files = saved_at(world, writer)
        world.commit(self.checkpoint)
        self.lead("a" if "a" in world.nodes else writer)

    def lead(self, name: str) -> None:
        self.world.leader = name
        self.upkeep: Upkeep = self.world.nodes[name].upkeep
        self.upkeep._monotonic = lambda: self.now_s

    async def round(self, later_s: float = 0.0) -> None:
        self.now_s += later_s
        async with within():
            await self.upkeep.round()

    @property
    def holders(self) -> list[str]:
        return [self.world.holders(file) for file in self.files]

    @property
    def counts(self) -> list[int]:
        return [len(holders) for holders in self.holders]


async def test_what_only_one_node_has_is_copied_to_another(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        await care.round()
        assert care.counts == [2, 2, 2]
        assert (care.upkeep.lacking, care.upkeep.lost) == (0, 0)
        assert care.upkeep.counts == {"restored": 3, "failed": 0}
        await care.round(upkeep.RECHECK_S * 2)
        assert care.upkeep.counts["restored"] == 3, "what has its copies is left alone"


async def test_copies_of_a_dead_node_are_made_again_once_it_has_been_away_for_long(
    tmp_path: Path,
) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        await care.round()
        first = care.holders
        lost = next(name for name in "bc" if any(name in one for one in first))
        await world.lose(lost)
        await care.round(1.0)
        assert [len(one) for one in care.holders] == [2 - (lost in one) for one in first], (
            "it may be back any moment"
        )
        await care.round(upkeep.PATIENCE_S)
        assert care.counts == [2, 2, 2]


async def test_a_node_that_is_soon_back_costs_nothing(tmp_path: Path) -> None:
    async with World(tmp_path, replicas=3) as world:
        care = Care(world)
        await care.round()
        restored = care.upkeep.counts["restored"]
        await world.stop("b")
        await care.round(upkeep.PATIENCE_S / 2)
        world.start("b")
        await care.round(upkeep.PATIENCE_S / 2)
        assert care.counts == [3, 3, 3]
        assert care.upkeep.counts["restored"] == restored


async def test_a_node_that_comes_and_goes_holds_up_nothing_for_ever(tmp_path: Path) -> None:
    async with World(tmp_path, "abcd") as world:
        care = Care(world)
        for _ in range(4):
            await world.stop("d")
            await care.round(upkeep.PATIENCE_S / 2)
            world.start("d")
            await care.round(0.5)
        await world.stop("d")
        await care.round(0.5)
        assert care.counts == [2, 2, 2]


async def test_what_a_leaving_node_has_is_copied_to_those_that_stay(tmp_path: Path) -> None:
    async with World(tmp_path, replicas=1) as world:
        care = Care(world, "b")
        await care.round()
        at_leader = care.holders
        world.set_status("b", NodeStatus.DRAINING)
        world.set_status("a", NodeStatus.DRAINING)
        await care.round()
        assert ["c" in one for one in care.holders] == [True, True, True], at_leader


@pytest.mark.parametrize("leader", ["b", "c"])
async def test_a_new_leader_knows_all_it_needs_from_asking(tmp_path: Path, leader: str) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        care.lead(leader)
        await care.round()
        assert min(care.counts) == 2
        await world.nodes["a"].upkeep.round()
        assert world.nodes["a"].upkeep.lacking == 0, "who does not lead looks after nothing"


async def test_files_between_learners_go_by_way_of_a_voter(tmp_path: Path) -> None:
    async with World(tmp_path, "a", "lm") as world:
        care = Care(world, "l")
        await care.round()
        assert all("a" in holders for holders in care.holders)


@pytest.mark.parametrize("replicas", [1, 2])
async def test_what_only_learners_have_is_copied_to_a_voter(tmp_path: Path, replicas: int) -> None:
    async with World(tmp_path, "ab", "lm", replicas=replicas) as world:
        care = Care(world, "l")
        for file in care.files:
            store = world.store("m")
            await asyncio.to_thread(
                store.put_if_absent, file.path, [world.store("l").read(file.path)]
            )
        await care.round()
        assert care.upkeep.lacking == 0
        for holders in care.holders:
            assert len(holders) == 3
            assert {"a", "b"} & set(holders)


async def test_a_file_that_nobody_has_is_told_and_the_rest_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        (tmp_path / "a" / care.files[1].path).unlink()
        await care.round()
        assert care.upkeep.lost == 1
        assert care.counts == [2, 0, 2]
        assert care.files[1].path in caplog.text


async def test_a_copy_that_another_one_found_broken_is_made_again(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        await care.round()
        shard: File = care.files[1]
        (other,) = world.holders(shard).replace("a", "")
        flip(tmp_path / other / shard.path, -9)
        await world.nodes[other].doubt(shard)
        assert world.holders(shard) == "a"
        await care.round(upkeep.RECHECK_S * 2)
        assert len(world.holders(shard)) == 2


@pytest.mark.parametrize("why", ["retired", "corrupt", "elsewhere"])
async def test_what_is_not_needed_is_not_copied(tmp_path: Path, why: str) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        changed: dict[str, list[Checkpoint]] = {
            "retired": [],
            "corrupt": [msgspec.structs.replace(care.checkpoint, status=CheckpointStatus.CORRUPT)],
            "elsewhere": [msgspec.structs.replace(care.checkpoint, store="s3://bucket")],
        }
        world.commit(*changed[why])
        await care.round()
        assert care.counts == [1, 1, 1]


async def test_what_a_job_begins_with_is_looked_after_until_it_has_ended(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        care = Care(world)
        job = msgspec.structs.replace(
            world.state.jobs[JOB],
            checkpoints=(),
            initial=care.checkpoint,
            status=JobStatus.COMPLETED,
        )
        world.state = msgspec.structs.replace(world.state, jobs={JOB: job})
        await care.round()
        assert care.counts == [1, 1, 1]
        job = msgspec.structs.replace(job, status=JobStatus.QUEUED)
        world.state = msgspec.structs.replace(world.state, jobs={JOB: job})
        await care.round()
        assert care.counts == [2, 2, 2]
