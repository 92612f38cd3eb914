from __future__ import annotations

import threading
from pathlib import Path

from distroml.errors import StoreError
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.checkpoint.store import LocalStore, Stored
from distroml.runtime.checkpoint.writer import MAX_ATTEMPTS
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, STATE, tensor, writer

DIRECTORY = checkpoint_directory(JOB, RUN, 100)


class FailingStore(LocalStore):
    """Fails the first ``failures`` writes."""

    def __init__(self, root: Path, failures: int) -> None:
        super().__init__(root)
        self.failures = failures

    def put_if_absent(self, path, parts) -> Stored:
        if self.failures:
            self.failures -= 1
            raise StoreError("disk on fire")
        return super().put_if_absent(path, parts)


def test_a_shard_becomes_durable(tmp_path) -> None:
    store = LocalStore(tmp_path)
    made, durable, abandoned = writer(store)
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert not abandoned
    (fact,) = durable
    assert (fact.step, fact.cursor, fact.file) == (100, CURSOR, "worker_0.safetensors")
    assert store.size(f"{DIRECTORY}/{fact.file}") == fact.size_bytes
    assert made.durable == (1, 100)


def test_same_bytes_of_an_earlier_generation_are_taken_over(tmp_path) -> None:
    store = LocalStore(tmp_path)
    for generation in (1, 2):
        made, durable, _ = writer(store, generation=generation)
        made.write(100, CURSOR, STATE, {})
        made.wait()
        assert durable[0].file == "worker_0.safetensors"
    assert len(store.list(DIRECTORY)) == 1


def test_other_bytes_of_a_dead_generation_are_stepped_around(tmp_path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent(f"{DIRECTORY}/worker_0.safetensors", [b"an attempt that was cut short"])
    made, durable, abandoned = writer(store, generation=4)
    made.write(100, CURSOR, STATE, {})
    made.wait()
    assert not abandoned
    assert durable[0].file == "worker_0.g4.safetensors"


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

    class Slow(LocalStore):
        def put_if_absent(self, path, parts) -> Stored:
            entered.set()
            assert release.wait(20), "the test never released the store"
            return super().put_if_absent(path, parts)

    made, durable, _ = writer(Slow(tmp_path))
    made.write(100, CURSOR, STATE, {})
    assert entered.wait(20), "the write never started"
    assert made.busy
    assert not durable
    release.set()
    made.wait()
    assert not made.busy
    assert durable


def test_the_host_buffer_is_reused(tmp_path) -> None:
    made, _, _ = writer(LocalStore(tmp_path))
    first = made.buffer(1000)
    assert len(first) == 1000
    assert made.buffer(10).obj is first.obj
    assert made.buffer(2000).obj is not first.obj


def test_an_empty_share_is_a_valid_shard(tmp_path) -> None:
    made, durable, abandoned = writer(LocalStore(tmp_path), rank=1, world_size=2)
    made.write(100, CURSOR, [], None)
    made.wait()
    assert not abandoned
    assert durable[0].file == "worker_1.safetensors"


def test_what_is_written_is_what_was_handed_over(tmp_path) -> None:
    """Values are encoded later, so the caller hands over a copy of its own."""
    store = LocalStore(tmp_path)
    made, durable, _ = writer(store)
    made.write(100, CURSOR, [tensor("model.x", [1.5])], {"lr": 0.25})
    made.wait()
    assert b'\\"lr\\":0.25' in store.read(f"{DIRECTORY}/{durable[0].file}")
