from __future__ import annotations

import threading
from pathlib import Path

import pytest

from distroml.errors import StoreError
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.checkpoint.shard_check import damage
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.writer import MAX_ATTEMPTS
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, STATE, copied, tensor, writer

DIRECTORY = checkpoint_directory(JOB, RUN, 100)


class FailingStore(FileStore):
    """Fails the first ``failures`` writes."""

    def __init__(self, root: Path, failures: int) -> None:
        super().__init__(root)
        self.failures = failures

    def stage(self, path, size_bytes):
        if self.failures:
            self.failures -= 1
            raise StoreError("disk on fire")
        return super().stage(path, size_bytes)


def test_a_shard_becomes_durable(tmp_path) -> None:
    store = FileStore(tmp_path)
    made, durable, abandoned = writer(store)
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert not abandoned
    (fact,) = durable
    assert (fact.step, fact.cursor, fact.file) == (100, CURSOR, "worker_0.safetensors")
    assert store.size(f"{DIRECTORY}/{fact.file}") == fact.size_bytes
    assert made.durable == (1, 100)


def test_same_bytes_of_an_earlier_generation_are_taken_over(tmp_path) -> None:
    store = FileStore(tmp_path)
    for generation in (1, 2):
        made, durable, _ = writer(store, generation=generation)
        made.write(100, CURSOR, STATE, {})
        made.wait()
        assert durable[0].file == "worker_0.safetensors"
    assert len(store.list(DIRECTORY)) == 1


def test_other_bytes_of_a_dead_generation_are_stepped_around(tmp_path) -> None:
    store = FileStore(tmp_path)
    store.put_if_absent(f"{DIRECTORY}/worker_0.safetensors", [b"an attempt that was cut short"])
    made, durable, abandoned = writer(store, generation=4)
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert not abandoned
    assert durable[0].file == "worker_0.g4.safetensors"


def test_on_disks_of_their_own_only_the_first_generation_has_the_plain_names(tmp_path) -> None:
    """Another node may have given the plain name to other bytes, and nobody here could see that."""
    store = FileStore(tmp_path)
    for generation, name in ((3, "worker_0.g3.safetensors"), (1, "worker_0.safetensors")):
        made, durable, _ = writer(store, generation=generation, scattered=True)
        made.write(100, CURSOR, [copied(t) for t in STATE], {})
        made.wait()
        assert durable[0].file == name
    made, durable, _ = writer(store, generation=4, scattered=True)
    made.write(100, CURSOR, [copied(t) for t in STATE], {})
    made.wait()
    assert durable[0].file == "worker_0.safetensors", "it is here with these bytes"


def test_failures_are_retried_with_growing_waits(tmp_path) -> None:
    waits: list[float] = []
    made, durable, abandoned = writer(FailingStore(tmp_path, 3), waits=waits)
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert durable
    assert not abandoned
    assert len(waits) == 3
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]


def test_a_shard_that_cannot_be_written_is_abandoned_and_the_next_one_works(tmp_path) -> None:
    made, durable, abandoned = writer(FailingStore(tmp_path, MAX_ATTEMPTS))
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert not durable
    ((step, reason),) = abandoned
    assert step == 100
    assert "disk on fire" in reason
    assert "after 5 attempts" in reason
    made.write(200, CURSOR, STATE, {})
    made.wait()
    assert [fact.step for fact in durable] == [200]


def test_writing_happens_behind_the_callers_back(tmp_path) -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(FileStore):
        def stage(self, path, size_bytes):
            entered.set()
            assert release.wait(20), "the test never released the store"
            return super().stage(path, size_bytes)

    made, durable, _ = writer(Slow(tmp_path))
    made.write(100, CURSOR, STATE, {})
    assert entered.wait(20), "the write never started"
    assert made.busy
    assert not durable
    release.set()
    made.wait()
    assert not made.busy
    assert durable


class OneGo:
    """A store that takes a file only as a whole, as object stores do."""

    def __init__(self, root: Path) -> None:
        inner = FileStore(root)
        for name in ("put_if_absent", "read", "read_into", "size", "list", "delete"):
            setattr(self, name, getattr(inner, name))


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("base", [None, {}], ids=["whole", "delta"])
def test_stores_that_take_files_at_once_hold_the_same_bytes(tmp_path, codec, base) -> None:
    files = []
    large = tensor("model.large", [float(n % 7) for n in range(600_000)])
    for store in (FileStore(tmp_path / "staged"), OneGo(tmp_path / "whole")):
        for _ in range(2):  # the second time it is there already
            made, durable, abandoned = writer(store, codec=codec, base=base)
            made.write(100, CURSOR, [copied(t) for t in (*STATE, large)], {})
            made.wait()
            assert not abandoned
            (fact,) = durable
            assert fact.file == "worker_0.safetensors"
            path = f"{DIRECTORY}/{fact.file}"
            assert damage(store, path, fact.sha256) == ""
        files.append(store.read(path))
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d[:-1], "bytes instead of"),
        (lambda d: d + b"x", "bytes instead of"),
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "have BLAKE3"),
        (lambda d: d.replace(b'"rank\\":0', b'"rank\\":1'), "its header has SHA-256"),
        (lambda d: b"x" * 8 + d[8:], "not a usable shard"),
        (lambda d: b"", "not a usable shard"),
    ],
)
def test_damage_of_a_shard_is_told_without_its_manifest(tmp_path, spoil, message: str) -> None:
    store = FileStore(tmp_path)
    made, durable, _ = writer(store)
    made.write(100, CURSOR, STATE, {})
    made.wait()
    path = tmp_path / DIRECTORY / durable[0].file
    whole = path.read_bytes()
    assert spoil(whole) != whole
    path.write_bytes(spoil(whole))
    assert message in damage(store, f"{DIRECTORY}/{durable[0].file}", durable[0].sha256)


def test_room_made_ahead_is_what_the_next_shard_uses(tmp_path) -> None:
    made, durable, _ = writer(FileStore(tmp_path))
    made.make_room(64 * 1024 * 1024)
    buffer = made.buffer(1000)  # while it may still be touched
    buffer[:] = b"x" * 1000
    made.make_room(10)
    assert bytes(made.buffer(1000)) == b"x" * 1000
    assert len(made.buffer(64 * 1024 * 1024)) == 64 * 1024 * 1024
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert durable


def test_the_host_buffer_is_reused(tmp_path) -> None:
    made, _, _ = writer(FileStore(tmp_path))
    first = made.buffer(1000)
    assert len(first) == 1000
    assert made.buffer(10).obj is first.obj
    assert made.buffer(2000).obj is not first.obj


def test_an_empty_share_is_a_valid_shard(tmp_path) -> None:
    made, durable, abandoned = writer(FileStore(tmp_path), rank=1, world_size=2)
    made.write(100, CURSOR, [], None)
    made.wait()
    assert not abandoned
    assert durable[0].file == "worker_1.safetensors"


def test_what_is_written_is_what_was_handed_over(tmp_path) -> None:
    """Values are encoded later, so the caller hands over a copy of its own."""
    store = FileStore(tmp_path)
    made, durable, _ = writer(store)
    made.write(100, CURSOR, [tensor("model.x", [1.5])], {"lr": 0.25})
    made.wait()
    assert b'\\"lr\\":0.25' in store.read(f"{DIRECTORY}/{durable[0].file}")
