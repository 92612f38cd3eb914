"""Verification, survey and export against real files, whole and damaged."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace
from safetensors import safe_open

from distroml.checkpoint_files import MAX_AT_ONCE, CheckpointFiles
from distroml.errors import Conflict, CorruptCheckpoint, StoreError, TooManyRequests
from distroml.runtime.checkpoint import examination
from distroml.runtime.checkpoint.commit import metric_of, publish_latest, write_manifest
from distroml.runtime.checkpoint.examination import Stop, survey, verify
from distroml.runtime.checkpoint.plain_file import write_plain
from distroml.runtime.checkpoint.reader import read_manifest
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.opening import Stores
from tests.runtime.checkpoint.shards import JOB, RUN, STATE, committed, tensor, write_shards


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def never() -> bool:
    return False


def damage(store: FileStore, path: str, at: int = -1) -> None:
    file = store.root / path
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


class TestVerify:
    def test_a_whole_one_has_no_problem(self, store: FileStore) -> None:
        checks = verify(store, committed(store), (), never)
        assert [check.problem for check in checks] == ["", "", ""]
        assert all(check.size_bytes > 0 for check in checks)

    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "have BLAKE3"),
        ],
    )
    def test_each_file_is_judged_by_itself(self, store: FileStore, harm, said: str) -> None:
        checkpoint = committed(store)
        harm(store.root / checkpoint.directory / "worker_1.safetensors")
        problems = {
            c.path.rpartition("/")[2]: c.problem for c in verify(store, checkpoint, (), never)
        }
        assert said in problems.pop("worker_1.safetensors")
        assert set(problems.values()) == {""}

    def test_a_damaged_manifest_is_named(self, store: FileStore) -> None:
        checkpoint = committed(store)
        damage(store, f"{checkpoint.directory}/{checkpoint.manifest}")
        (check,) = verify(store, checkpoint, (), never)
        assert "committed was" in check.problem

    def test_what_it_refers_to_counts(self, store: FileStore) -> None:
        base, delta = committed(store, 100), committed(store, 200)
        delta = replace(delta, refers_to=(base.directory,))
        damage(store, f"{base.directory}/worker_0.safetensors")
        bad = [c.path for c in verify(store, delta, (base,), never) if c.problem]
        assert bad == [f"{base.directory}/worker_0.safetensors"]
        bad = [c.problem for c in verify(store, delta, (), never) if c.problem]
        assert "not listed" in bad[0]

    def test_it_stops_when_nobody_waits(self, store: FileStore) -> None:
        checkpoint = committed(store)
        with pytest.raises(Stop):
            verify(store, checkpoint, (), lambda: True)


class TestSurvey:
    def test_what_was_committed_is_found_as_it_was(self, store: FileStore) -> None:
        made = [committed(store, step) for step in (100, 200)]
        found = survey(store, "local", thorough=True, stopped=never)
        assert found.unusable == ()
        assert [one.job_id for one in found.found] == [JOB, JOB]
        for one, was in zip(found.found, made, strict=True):
            assert replace(one.checkpoint, committed_at=was.committed_at) == was

    def test_of_several_manifests_latest_says_which_and_else_the_newest(
        self, store: FileStore
    ) -> None:
        first, second = (
            write_manifest(
                store,
                job_id=JOB,
                run_id=RUN,
                generation=generation,
                shards=write_shards(store, generation=generation),
                committed_at=0.0,
            )
            for generation in (1, 2)
        )
        assert first.manifest != second.manifest
        (found,) = survey(store, "local", thorough=False, stopped=never).found
        assert found.checkpoint.manifest_sha256 == second.manifest_sha256
        publish_latest(store, first)
        (found,) = survey(store, "local", thorough=False, stopped=never).found
        assert found.checkpoint.manifest_sha256 == first.manifest_sha256

    def test_what_is_not_whole_is_told_and_left_out(self, store: FileStore) -> None:
        good, short, wrong = (committed(store, step) for step in (100, 200, 300))
        (store.root / short.directory / "worker_0.safetensors").unlink()
        damage(store, f"{wrong.directory}/worker_0.safetensors")
        write_shards(store, 400)
        for thorough, left in ((False, [100, 300]), (True, [100])):
            found = survey(store, "local", thorough=thorough, stopped=never)
            assert [one.checkpoint.step for one in found.found] == left
        reasons = [one.reason for one in found.unusable]
        for part, reason in zip(("is missing", "have BLAKE3", "never whole"), reasons, strict=True):
            assert part in reason
        assert good.step == 100

    def test_a_manifest_in_the_wrong_place_is_refused(self, store: FileStore) -> None:
        checkpoint = committed(store)
        source = store.root / checkpoint.directory
        for place in ("job-2/run-1/checkpoints/ckpt_step_00000100", "evil/../x"):
            if ".." not in place:
                target = store.root / place
                target.parent.mkdir(parents=True)
                source.rename(target)
        (one,) = survey(store, "local", thorough=False, stopped=never).unusable
        assert "is of job job-1" in one.reason

    def test_hostile_manifests_do_not_stop_it(self, store: FileStore) -> None:
        committed(store, 100)
        for number, content in enumerate((b"", b"[" * 5000, b"\xff", b'{"format": 1}')):
            store.put_if_absent(
                f"{JOB}/{RUN}/checkpoints/ckpt_step_0000020{number}/manifest.json", [content]
            )
        store.put_if_absent("not/a/checkpoint/manifest.json", [b"{}"])
        (store.root / JOB / RUN / "checkpoints" / "LATEST").write_bytes(b"\xff[")
        found = survey(store, "local", thorough=False, stopped=never)
        assert (len(found.found), len(found.unusable)) == (1, 4)

    def test_too_many_are_refused(self, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(examination, "MAX_FOUND", 1)
        for step in (100, 200):
            committed(store, step)
        with pytest.raises(StoreError, match="limit"):
            survey(store, "local", thorough=False, stopped=never)

    def test_an_empty_store_has_nothing(self, store: FileStore) -> None:
        assert survey(store, "local", thorough=True, stopped=never).found == ()


class TestPlainFile:
    def test_any_tool_reads_the_weights_under_their_own_names(
        self, store: FileStore, tmp_path: Path
    ) -> None:
        target = tmp_path / "model.safetensors"
        size = write_plain(store, committed(store, world_size=3), target, everything=False)
        assert size == target.stat().st_size
        with safe_open(target, "numpy") as file:
            assert sorted(file.keys()) == ["bias", "empty", "weight"]
            assert file.get_tensor("weight").tolist() == [[1, 2, 3], [4, 5, 6]]
            assert file.metadata()["step"] == "100"

    def test_with_everything_the_optimizer_is_there_too(
        self, store: FileStore, tmp_path: Path
    ) -> None:
        target = tmp_path / "all.safetensors"
        write_plain(store, committed(store), target, everything=True)
        with safe_open(target, "numpy") as file:
            assert file.get_tensor("optimizer.weight.exp_avg").tolist() == [[0.5] * 3] * 2

    def test_names_that_would_meet_are_refused(self, store: FileStore, tmp_path: Path) -> None:
        state = [tensor("model.optimizer.a", [1]), tensor("optimizer.a", [2])]
        facts = write_shards(store, state=state)
        checkpoint = write_manifest(
            store, job_id=JOB, run_id=RUN, generation=1, shards=facts, committed_at=0.0
        )
        with pytest.raises(Conflict):
            write_plain(store, checkpoint, tmp_path / "x", everything=True)
        write_plain(store, checkpoint, tmp_path / "x", everything=False)


class TestNode:
    @pytest.fixture
    def files(self, store: FileStore, tmp_path: Path) -> CheckpointFiles:
        return CheckpointFiles(Stores(store.root), tmp_path / "exports")

    async def test_an_export_is_there_for_as_long_as_it_is_read(
        self, files: CheckpointFiles, store: FileStore, tmp_path: Path
    ) -> None:
        async with files.export(committed(store), everything=False) as path:
            assert path.stat().st_size > 0
        assert list((tmp_path / "exports").iterdir()) == []

    async def test_a_corrupt_one_is_not_exported(
        self, files: CheckpointFiles, store: FileStore, tmp_path: Path
    ) -> None:
        checkpoint = committed(store)
        damage(store, f"{checkpoint.directory}/worker_0.safetensors")
        with pytest.raises(CorruptCheckpoint):
            async with files.export(checkpoint, everything=False):
                raise AssertionError("it was exported")
        assert list((tmp_path / "exports").iterdir()) == []

    async def test_leftovers_of_a_crash_go(self, files: CheckpointFiles, tmp_path: Path) -> None:
        (tmp_path / "exports").mkdir()
        (tmp_path / "exports" / "x.safetensors").write_bytes(b"half")
        files.remove_leftovers()
        assert list((tmp_path / "exports").iterdir()) == []

    async def test_more_than_a_few_at_once_are_refused(
        self, files: CheckpointFiles, store: FileStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import asyncio

        checkpoint = committed(store)
        free = threading.Event()
        read = FileStore.read

        def waits(store: FileStore, *arguments, **options):
            assert free.wait(30)
            return read(store, *arguments, **options)

        monkeypatch.setattr(FileStore, "read", waits)
        busy = [asyncio.create_task(files.verify(checkpoint, ())) for _ in range(MAX_AT_ONCE)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests):
            await files.verify(checkpoint, ())
        free.set()
        for checks in await asyncio.gather(*busy):
            assert not any(check.problem for check in checks)


def test_the_metric_of_the_spec_is_in_the_record(store: FileStore) -> None:
    for value, expected in ((0.5, 0.5), (None, None), ("high", None), (True, None), (3, 3.0)):
        facts = write_shards(store, step=100 + len(store.list("")), world_size=1)
        path = f"{JOB}/{RUN}/checkpoints/ckpt_step_{facts[0].step:08d}"
        made = write_manifest(
            store,
            job_id=JOB,
            run_id=RUN,
            generation=1,
            shards=facts,
            committed_at=0.0,
            best_metric="acc",
        )
        manifest = read_manifest(store, made)
        assert made.metric is None, "the state has none"
        changed = replace(manifest, values={"metrics": {"acc": value}})
        assert metric_of(changed, "acc") == expected
        assert json.loads((store.root / path / made.manifest).read_bytes())["step"] == made.step
    assert STATE
