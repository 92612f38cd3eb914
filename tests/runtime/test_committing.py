"""The leader's writes to stores that fail, hang or come back: what is tried again, for how long, and what is given up."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distroml.commands import AnyCommand, CommitCheckpoint, Outcome
from distroml.consensus.state import ClusterState
from distroml.errors import StoreError
from distroml.model import Checkpoint
from distroml.reports import ShardFact
from distroml.runtime import committing
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.interface import MissingFile, Stored
from distroml.runtime.checkpoint.stores.opening import Stores
from distroml.runtime.committing import Committer
from distroml.runtime.decisions import WriteManifest
from tests.builders import checkpoint
from tests.consensus.live import until
from tests.runtime.checkpoint.shards import JOB, RUN, write_shards

KEY = (JOB, 1, 100)


class Flaky(FileStore):
    """A store of which the next calls fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.failures: dict[str, list[Exception]] = {"read": [], "put_if_absent": []}

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        self._fail("read")
        return super().read(path, offset, length)

    def put_if_absent(self, path: str, parts: object) -> Stored:
        self._fail("put_if_absent")
        return super().put_if_absent(path, parts)  # type: ignore[arg-type]

    def _fail(self, call: str) -> None:
        if self.failures[call]:
            raise self.failures[call].pop(0)


class World:
    """A committer, and a leader that decides the same again as long as that is not under way, as the reconciler does."""

    def __init__(self, root: Path) -> None:
        self.store = Flaky(root)
        self.leads = True
        self.last = False
        self.deleting = False
        self.now_s = 0.0
        self.attempts = 0
        self.proposed: list[AnyCommand] = []
        self.answer = Outcome(1)
        self.shards: tuple[ShardFact, ...] = ()
        self.committer = Committer(
            Stores(self.store),
            state=ClusterState,
            propose=self._propose,
            done=self.decide,
            is_deleting=self._is_deleting,
            monotonic=lambda: self.now_s,
        )

    def _is_deleting(self, directory: str) -> bool:
        assert directory == checkpoint_directory(JOB, RUN, 100)
        return self.deleting

    async def _propose(self, command: AnyCommand, timeout_s: float) -> Outcome:
        self.proposed.append(command)
        return self.answer

    @property
    def committed(self) -> bool:
        return bool(self.proposed)

    def saved(self) -> World:
        self.shards = tuple(write_shards(self.store))
        return self

    def decide(self) -> None:
        if self.leads and not self.committed and KEY not in self.committer.failures:
            self.attempts += 1
            self.committer.commit(
                WriteManifest(
                    job_id=JOB,
                    run_id=RUN,
                    generation=1,
                    step=100,
                    shards=self.shards,
                    last=self.last,
                )
            )

    async def given_up(self) -> str:
        await until(lambda: KEY in self.committer.failures, "the committer to give up")
        return self.committer.failures[KEY]


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(committing, "RETRY_PAUSE_S", 0.0)
    world = World(tmp_path).saved()
    yield world
    world.leads = False
    await world.committer.stop()


@pytest.mark.parametrize("call", ["read", "put_if_absent"])
@pytest.mark.parametrize(
    "error", [StoreError("stale handle"), MissingFile("no holder answers"), OSError("no space")]
)
async def test_a_fault_that_passes_costs_no_checkpoint(
    world: World, call: str, error: Exception
) -> None:
    world.store.failures[call] = [error, error, error]
    world.decide()
    await until(lambda: world.committed, "the commit")
    assert isinstance(world.proposed[0], CommitCheckpoint)
    assert world.committer.failures == {}


@pytest.mark.parametrize(
    ("last", "patience_s"), [(False, committing.PATIENCE_S), (True, committing.LAST_PATIENCE_S)]
)
async def test_a_fault_that_stays_is_given_up_after_a_while(
    world: World, last: bool, patience_s: float
) -> None:
    """Later where there is no next checkpoint to hope for."""
    world.last = last
    world.store.failures["read"] = [StoreError("gone")] * 1_000_000
    world.decide()
    await until(lambda: world.attempts > 3, "some attempts")
    world.now_s += patience_s - 1
    attempts = world.attempts
    await until(lambda: world.attempts > attempts + 3, "attempts until the patience is over")
    assert world.committer.failures == {}
    world.now_s += 1
    assert "gone" in await world.given_up()
    assert not world.committed


async def test_nothing_is_committed_while_older_files_of_the_same_step_are_being_deleted(
    world: World,
) -> None:
    """A shard with the same bytes as one of them may be that very file."""
    world.deleting = True
    world.decide()
    await until(lambda: world.attempts > 3, "some attempts")
    assert not world.committed
    world.deleting = False
    await until(lambda: world.committed, "the commit")


async def test_jobs_of_a_store_that_hangs_hold_up_no_other(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def write(store: object, *, store_name: str, **_: object) -> Checkpoint:
        if store_name != "local":
            release.wait(30)
        return checkpoint(100)

    monkeypatch.setattr(committing, "write_manifest", write)
    try:
        for number in range(3 * committing.STORE_THREADS):
            world.committer.commit(
                WriteManifest(
                    job_id=f"hung-{number}",
                    run_id=RUN,
                    generation=1,
                    step=100,
                    shards=world.shards,
                    store=f"file://{tmp_path}",
                )
            )
        world.decide()
        await until(lambda: world.committed, "the commit of the job with a healthy store")
    finally:
        release.set()


async def test_a_store_that_never_answers_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(committing, "WRITE_LIMIT_S", 0.01)
    monkeypatch.setattr(committing, "PATIENCE_S", 0.0)
    monkeypatch.setattr(committing, "write_manifest", lambda *_, **__: release.wait(30))
    try:
        world.decide()
        assert "has not answered" in await world.given_up()
    finally:
        release.set()


async def test_shards_that_do_not_fit_together_are_given_up_at_once(world: World) -> None:
    world.shards = world.shards[:1]
    world.decide()
    assert "do not fit together" in await world.given_up()
    assert world.attempts == 1


async def test_a_refused_commit_is_given_up_at_once(world: World) -> None:
    world.answer = Outcome(1, "conflict", "behind")
    world.decide()
    assert "behind" in await world.given_up()
    assert world.attempts == 1


async def test_who_leads_no_more_does_not_try_again(world: World) -> None:
    world.store.failures["read"] = [StoreError("gone")] * 1_000_000
    world.decide()
    await until(lambda: world.attempts > 3, "some attempts")
    world.leads = False
    world.committer.forget_failures()
    await until(lambda: not world.committer.writing, "the attempt to end")
    assert world.committer.failures == {}
    world.now_s += 2 * committing.LAST_PATIENCE_S
    world.store.failures["read"] = [StoreError("gone")]
    world.leads = True
    world.decide()
    await until(lambda: world.committed, "another try, after what was long ago")


def test_pauses_between_attempts_grow_to_a_limit() -> None:
    pauses = [committing.pause_s(failures) for failures in range(1, 40)]
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses == sorted(pauses)
    assert max(pauses) == committing.RETRY_LIMIT_S
