"""The collector against a real directory: what goes, what stays, what a failing store and a crash leave for later."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from distroml import commands as c
from distroml.errors import StoreError, Unavailable
from distroml.model import JobStatus
from distroml.runtime import collecting
from distroml.runtime.checkpoint.stores.file import TEMPORARY_PREFIX, FileStore
from distroml.runtime.checkpoint.stores.interface import ORPHAN_AGE_S, CheckpointStore
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.collecting import Collector
from distroml.spec import Checkpointing
from tests.builders import Log, checkpoint, commit, running
from tests.consensus.live import until

RUN = "job-1/run-job-1/checkpoints"
NFS = "file:///nfs"


class Shared(Stores):
    """This node's directory, and the stores that a test puts in its place under other names."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.others: dict[str, FileStore] = {}

    def of(self, name: str) -> CheckpointStore:
        return self.others.get(name) or super().of(name)


class Faulty(FileStore):
    """A store that answers as the test says."""

    def __init__(self, root: Path, answer: Callable[[str], list[str]]) -> None:
        super().__init__(root)
        self.answer = answer
        self.asked: list[str] = []

    def list(self, directory: str) -> list[str]:
        self.asked.append(directory.partition("/")[0])
        return self.answer(directory)


def until_set(release: threading.Event) -> Callable[[str], list[str]]:
    def hangs(directory: str) -> list[str]:
        release.wait(30)
        return []

    return hangs


class World:
    """One node's collector, its store, and a clock that the test moves."""

    def __init__(self, root: Path, grace_s: float = 60.0) -> None:
        self.log = running(Log())
        self.root, self.grace_s = root, grace_s
        self.store = FileStore(root)
        self.stores = Shared(root)
        self.now_s = 1000.0
        self.leads = True
        self.confirmed = 0
        self.unavailable = False
        self.collector = self.new()

    def new(self) -> Collector:
        return Collector(
            self.stores,
            state=lambda: self.log.state,
            leads=lambda: self.leads,
            confirm=self.confirm,
            grace_s=self.grace_s,
            monotonic=lambda: self.now_s,
        )

    async def confirm(self) -> None:
        if self.unavailable:
            raise Unavailable("no leader")
        self.confirmed += 1

    def ended(self, store: str, *job_ids: str) -> None:
        """Jobs that used another store and are over."""
        job = self.log.job()
        spec = replace(job.spec, checkpointing=Checkpointing(store=store))
        jobs = {
            job_id: replace(job, job_id=job_id, spec=spec, status=JobStatus.COMPLETED)
            for job_id in job_ids
        }
        self.log.state = replace(self.log.state, jobs={**jobs, **self.log.state.jobs})

    def write(self, *steps: int) -> None:
        for step in steps:
            self.store.put_if_absent(f"{checkpoint(step).directory}/worker_0.safetensors", [b"x"])

    def save(self, *steps: int) -> None:
        self.write(*steps)
        for step in steps:
            self.log.ok(commit(step))

    @property
    def steps(self) -> list[int]:
        return sorted(
            int(path.name.rpartition("_")[2]) for path in (self.root / RUN).glob("ckpt_*")
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def retire(*steps: int) -> c.RetireCheckpoints:
    return c.RetireCheckpoints(job_id="job-1", steps=steps, reason="r")


async def test_files_of_retired_checkpoints_go_and_all_others_stay(world: World) -> None:
    world.save(10, 20, 30)
    world.write(40)
    (world.root / RUN / "LATEST").write_text("{}")
    (world.root / "strange" / "run" / "checkpoints" / "ckpt_step_00000010").mkdir(parents=True)
    world.log.ok(retire(10, 20))
    await world.collector.round()
    assert world.steps == [30, 40]
    assert (world.root / RUN / "LATEST").exists()
    assert (world.root / "strange").exists(), "it is of no job that is known"
    assert world.collector.counts["deleted"] == 2


async def test_a_run_is_looked_at_again_only_when_its_job_has_changed(world: World) -> None:
    world.save(10, 20)
    await world.collector.round()
    await world.collector.round()
    assert world.confirmed == 1
    world.log.ok(retire(10))
    await world.collector.round()
    assert (world.confirmed, world.steps) == (2, [20])


async def test_a_copy_that_comes_after_its_directory_was_deleted_goes_too(world: World) -> None:
    world.save(10, 20)
    world.log.ok(retire(10))
    await world.collector.round()
    assert world.steps == [20]
    world.write(10)
    await world.collector.round()
    assert world.steps == [10, 20], "nobody has said that something came"
    world.collector.landed(f"{checkpoint(10).directory}/worker_0.safetensors")
    world.unavailable = True
    await world.collector.round()
    assert world.steps == [10, 20]
    world.unavailable = False
    await world.collector.round()
    assert world.steps == [20]
    before = world.confirmed
    await world.collector.round()
    assert world.confirmed == before


async def test_what_lands_during_a_look_is_looked_at_once_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save(10, 20)
    world.log.ok(retire(10))
    delete = FileStore.delete

    def lands_behind(store: FileStore, path: str) -> None:
        delete(store, path)
        world.write(10)
        world.collector.landed(f"{checkpoint(10).directory}/worker_0.safetensors")

    monkeypatch.setattr(FileStore, "delete", lands_behind)
    await world.collector.round()
    assert world.steps == [10, 20]
    monkeypatch.setattr(FileStore, "delete", delete)
    await world.collector.round()
    assert world.steps == [20]


async def test_nothing_is_deleted_by_a_state_that_may_be_old(world: World) -> None:
    world.save(10, 20)
    world.log.ok(retire(10))
    world.unavailable = True
    await world.collector.round()
    assert world.steps == [10, 20]
    world.unavailable = False
    await world.collector.round()
    assert world.steps == [20]


@pytest.mark.parametrize("lost", ["quorum", "lead"])
async def test_whoever_was_cut_off_deletes_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """By then a successor may have let the run come back to these steps, and have committed them."""
    shared = f"file://{world.root}"
    world.log = running(Log(), checkpointing=Checkpointing(store=shared))
    world.save(10, 20, 30, 40)
    world.log.ok(retire(10, 20, 30))
    delete = FileStore.delete

    def takes_long(store: FileStore, path: str) -> None:
        delete(store, path)
        world.now_s += 10
        if lost == "quorum":
            world.unavailable = True
        else:
            world.leads = False

    monkeypatch.setattr(FileStore, "delete", takes_long)
    await world.collector.round()
    assert world.steps == [20, 30, 40]
    assert world.collector.counts == {"deleted": 1, "failed": 0}
    monkeypatch.setattr(FileStore, "delete", delete)
    world.unavailable, world.leads = False, True
    await world.collector.round()
    assert world.steps == [40]


async def test_quick_deletions_share_a_confirmation(world: World) -> None:
    world.save(10, 20, 30, 40)
    world.log.ok(retire(10, 20, 30))
    await world.collector.round()
    assert (world.confirmed, world.steps) == (1, [40])


async def test_what_was_never_whole_goes_a_grace_after_the_end(world: World) -> None:
    world.save(10)
    world.write(20)
    world.log.ok(c.CancelJob(job_id="job-1", reason="r"))
    await world.collector.round()
    world.now_s += world.grace_s - 1
    await world.collector.round()
    assert world.steps == [10, 20]
    world.now_s += world.grace_s
    await world.collector.round()
    assert world.steps == [10]


@pytest.mark.parametrize("kind", ["file", "local"])
async def test_what_writers_left_unfinished_goes_with_the_end_of_the_run(
    world: World, kind: str
) -> None:
    """In a store that all share; in ``local`` it may be on its way from another node, and has to be old."""
    store = f"file://{world.root}" if kind == "file" else kind
    world.log = running(Log(), checkpointing=Checkpointing(store=store))
    world.save(10)
    unfinished = world.root / checkpoint(10).directory / f"{TEMPORARY_PREFIX}1-abc"
    unfinished.write_bytes(b"half")
    await world.collector.round()
    assert unfinished.exists(), "its writer may be at it"
    world.log.ok(c.CancelJob(job_id="job-1", reason="r"))
    await world.collector.round()
    assert unfinished.exists() is (kind == "local")
    if kind == "local":
        os.utime(unfinished, (0, 0))
        await world.collector.round()
        assert unfinished.exists(), "nothing has changed"
        world.now_s += ORPHAN_AGE_S
        await world.collector.round()
        assert not unfinished.exists()
    assert world.steps == [10]
    world.now_s += 10 * ORPHAN_AGE_S
    confirmed = world.confirmed
    await world.collector.round()
    assert world.confirmed == confirmed, "all is seen to"


async def test_a_removed_checkpoint_of_a_finished_job_goes_at_once(world: World) -> None:
    world.save(10, 20)
    world.log.ok(c.CancelJob(job_id="job-1", reason="r"))
    world.log.ok(c.RemoveCheckpoint(job_id="job-1", step=20))
    await world.collector.round()
    assert world.steps == [10]


async def test_a_store_that_fails_is_tried_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save(10, 20, 30)
    world.log.ok(retire(10, 20))
    deleted: list[str] = []
    delete = FileStore.delete

    def fails_at_the_second(store: FileStore, path: str) -> None:
        deleted.append(path)
        if len(deleted) == 2:
            raise StoreError("the disk is gone")
        delete(store, path)

    monkeypatch.setattr(FileStore, "delete", fails_at_the_second)
    await world.collector.round()
    await world.collector.round()
    assert (world.steps, len(deleted)) == ([20, 30], 2)
    world.now_s += collecting.RETRY_S
    await world.collector.round()
    assert world.steps == [30]


async def test_a_store_that_hangs_keeps_no_other_waiting(world: World) -> None:
    release = threading.Event()
    hung = world.stores.others[NFS] = Faulty(world.root, until_set(release))
    world.ended(NFS, "old")
    world.save(10, 20)
    world.log.ok(retire(10))
    first = asyncio.create_task(world.collector.round())
    try:
        await until(
            lambda: world.steps == [20] and LOCAL not in world.collector._at_work,
            "the local round to end",
        )
        world.save(30)
        world.log.ok(retire(20))
        await world.collector.round()
        assert world.steps == [30]
        assert hung.asked == ["old"], "its round goes on"
    finally:
        release.set()
        await first


async def test_a_call_that_hangs_is_not_waited_for_nor_repeated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "CALL_LIMIT_S", 0.01)
    release = threading.Event()
    hung = world.stores.others[NFS] = Faulty(world.root, until_set(release))
    world.ended(NFS, "old")
    try:
        await world.collector.round()
        assert world.collector.counts["failed"] == 1
        world.now_s += collecting.RETRY_S
        await world.collector.round()
        assert hung.asked == ["old"]
    finally:
        release.set()
    await until(lambda: not world.collector._threads.busy(NFS), "the store to answer")
    monkeypatch.setattr(collecting, "CALL_LIMIT_S", 10.0)
    await world.collector.round()
    assert hung.asked == ["old", "old"]


async def test_nothing_is_deleted_behind_a_call_that_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time that the store answers, what is garbage now may be needed again."""
    monkeypatch.setattr(collecting, "CALL_LIMIT_S", 1.0)
    release = threading.Event()
    answers = [["old/run-job-1/checkpoints/ckpt_step_00000001/x"], []]

    def hangs_at_the_second(directory: str) -> list[str]:
        if len(store.asked) > 1:
            release.wait(30)
        return answers.pop(0)

    deleted: list[str] = []
    store = world.stores.others[NFS] = Faulty(world.root, hangs_at_the_second)
    monkeypatch.setattr(store, "delete", deleted.append)
    monkeypatch.setattr(world, "grace_s", 0.0)
    world.collector = world.new()
    world.ended(NFS, "old", "older")
    looking = asyncio.create_task(world.collector.round())
    try:
        await until(lambda: world.collector.counts["failed"] > 0, "the listing to be given up")
    finally:
        release.set()
    await looking
    await until(lambda: not world.collector._threads.busy(NFS), "the store to answer")
    assert (store.asked, deleted) == (["old", "older"], [])


async def test_it_tells_what_is_being_deleted_also_when_it_waits_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "CALL_LIMIT_S", 1.0)
    release = threading.Event()
    delete = FileStore.delete

    def hangs(store: FileStore, path: str) -> None:
        release.wait(30)
        delete(store, path)

    monkeypatch.setattr(FileStore, "delete", hangs)
    world.save(10, 20)
    world.log.ok(retire(10))
    try:
        await world.collector.round()
        assert world.collector.is_deleting(checkpoint(10).directory)
        assert not world.collector.is_deleting(checkpoint(20).directory)
    finally:
        release.set()
    await until(lambda: not world.collector.is_deleting(checkpoint(10).directory), "the end of it")
    assert world.steps == [20]


async def test_a_store_that_is_gone_is_asked_once_and_less_and_less_often(world: World) -> None:
    def gone(_: str) -> list[str]:
        raise StoreError("nobody answers there")

    dead = world.stores.others["s3://gone/x"] = Faulty(world.root, gone)
    world.ended("s3://gone/x", *(f"old-{number}" for number in range(64)))
    for asked in range(1, 5):
        await world.collector.round()
        await world.collector.round()
        assert len(dead.asked) == asked
        world.now_s += collecting.RETRY_S * 2 ** (asked - 1)
    assert len(set(dead.asked)) == 4, "each time about another job"
    dead.answer = lambda _: []
    await world.collector.round()
    assert len(dead.asked) == 4 + 64


async def test_a_job_that_cannot_be_listed_keeps_no_other_of_its_store_waiting(
    world: World,
) -> None:
    def answer(directory: str) -> list[str]:
        if directory.startswith("old-1/"):
            raise StoreError("not allowed")
        return []

    store = world.stores.others["s3://there/x"] = Faulty(world.root, answer)
    world.ended("s3://there/x", "old-0", "old-1", "old-2")
    for _ in range(3):
        await world.collector.round()
        world.now_s += collecting.RETRY_S
    assert store.asked.count("old-0") == 1
    assert store.asked.count("old-2") == 1


async def test_what_a_crash_interrupts_is_done_by_the_next_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save(10, 20, 30)
    world.log.ok(retire(10, 20))
    monkeypatch.setattr(collecting, "DELETIONS_PER_ROUND", 1)
    await world.collector.round()
    assert world.steps == [20, 30]
    world.collector = world.new()
    await world.collector.round()
    assert world.steps == [30]


async def test_the_rate_is_bounded_and_the_rest_follows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save(*range(1, 8))
    world.log.ok(retire(*range(1, 7)))
    monkeypatch.setattr(collecting, "DELETIONS_PER_ROUND", 2)
    for left in (5, 3, 1):
        await world.collector.round()
        assert len(world.steps) == left


async def test_stores_that_all_share_are_the_leaders(world: World) -> None:
    world.save(10, 20)
    job = world.log.job()
    spec = replace(job.spec, checkpointing=replace(job.spec.checkpointing, store="elsewhere"))
    world.log.state = replace(world.log.state, jobs={"job-1": replace(job, spec=spec)})
    world.leads = False
    await world.collector.round()
    assert world.collector.counts["failed"] == 0, "a follower did not even ask"
