"""Checkpoints whose unchanged tensors stay where they are."""

from __future__ import annotations

import array
from pathlib import Path

import msgspec
import pytest

from distroml.errors import CorruptCheckpoint, StoreError
from distroml.model import Checkpoint
from distroml.runtime.checkpoint.assembly import Base
from distroml.runtime.checkpoint.commit import write_manifest
from distroml.runtime.checkpoint.manifest import base_for, checkpoint_directory
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.shard_file import Codec, TensorBytes
from distroml.runtime.checkpoint.stores.file import FileStore
from tests.runtime.checkpoint.shards import JOB, RUN, STATE, committed, tensor, verify, write_shards


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def base_of(store: FileStore, checkpoint: Checkpoint, step: int) -> Base:
    return base_for(JOB, RUN, step, checkpoint, read_manifest(store, checkpoint))


def after(
    store: FileStore,
    earlier: Checkpoint,
    step: int,
    state: list[TensorBytes],
    world_size: int = 2,
    codec: Codec = "none",
) -> Checkpoint:
    """The checkpoint of ``step``, which may refer to the earlier one."""
    return committed(
        store, step, world_size, state=state, codec=codec, base=base_of(store, earlier, step)
    )


def contents(store: FileStore, checkpoint: Checkpoint) -> dict[str, tuple[object, ...]]:
    manifest = read_manifest(store, checkpoint)
    return {
        t.name: (t.dtype, t.shape, bytes(t.data)) for t in read_tensors(store, checkpoint, manifest)
    }


def of(state: list[TensorBytes]) -> dict[str, tuple[object, ...]]:
    return {t.name: (t.dtype, t.shape, bytes(t.data)) for t in state}


def changed(state: list[TensorBytes], name: str) -> list[TensorBytes]:
    """``state`` after a step that changed one tensor."""
    return [
        msgspec.structs.replace(
            t, data=memoryview(array.array("f", [9.0] * (len(t.data) // 4))).cast("B")
        )
        if t.name == name
        else t
        for t in state
    ]


def test_only_what_changed_is_written(store: FileStore) -> None:
    first = committed(store)
    state = changed(STATE, "model.bias")
    second = after(store, first, 200, state)
    assert contents(store, second) == of(state)
    assert second.refers_to == (first.directory,)
    manifest = read_manifest(store, second)
    here = {t.name for t in manifest.tensors if "/" not in t.file and t.length}
    assert here == {"model.bias"}
    assert first.refers_to == ()


def test_a_reference_leads_to_the_file_itself_never_to_another_reference(store: FileStore) -> None:
    first = committed(store)
    second = after(store, first, 200, changed(STATE, "model.bias"))
    state = changed(changed(STATE, "model.bias"), "model.weight")
    third = after(store, second, 300, state)
    assert contents(store, third) == of(state)
    assert third.refers_to == (first.directory, second.directory)


def test_ranks_of_another_number_find_what_others_wrote(store: FileStore) -> None:
    first = committed(store, world_size=3)
    second = after(store, first, 200, STATE, world_size=1)
    assert contents(store, second) == of(STATE)
    assert second.shards == 1
    assert not any(t.length for t in read_manifest(store, second).tensors if "/" not in t.file)


def test_a_frozen_backbone_costs_less_than_a_tenth(store: FileStore) -> None:
    backbone = [tensor(f"model.layer{n}", [float(n)] * 50_000) for n in range(20)]
    first = committed(store, state=[*backbone, tensor("model.head", [1.0] * 2_000)])
    second = after(store, first, 200, [*backbone, tensor("model.head", [2.0] * 2_000)])
    assert second.size_bytes <= 0.1 * first.size_bytes
    verify(store, second)


def test_compressed_tensors_are_referred_to_as_well(store: FileStore) -> None:
    state = [tensor("model.a", [0.5] * 20_000), tensor("model.b", [0.25] * 20_000)]
    first = committed(store, state=state, codec="zstd", base={})
    second = after(store, first, 200, changed(state, "model.b"), codec="zstd")
    assert contents(store, second) == of(changed(state, "model.b"))
    assert second.refers_to == (first.directory,)


def test_a_compressed_tensor_whose_content_is_unknown_is_written_again(store: FileStore) -> None:
    state = [tensor("model.a", [0.5] * 20_000)]
    first = committed(store, state=state, codec="zstd")
    assert base_of(store, first, 200) == {}


def test_other_runs_and_later_steps_are_never_referred_to(store: FileStore) -> None:
    checkpoint = committed(store)
    manifest = read_manifest(store, checkpoint)
    assert base_for(JOB, "run-2", 200, checkpoint, manifest) == {}
    assert base_for(JOB, RUN, 100, checkpoint, manifest) == {}
    assert base_for(JOB, RUN, 101, checkpoint, manifest)


def _named(record, **changes):
    return {record.name: msgspec.structs.replace(record, **changes)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: _named(r, offset=r.offset + 8), "does not have it there"),
        (lambda r: _named(r, file="ckpt_step_00000100/worker_9.safetensors"), "no file"),
        (
            lambda r: _named(r, file="ckpt_step_00000200/worker_0.safetensors"),
            "not earlier|no file",
        ),
        (lambda r: _named(r, file="../../x/worker_0.safetensors"), "not a path|not a usable"),
    ],
    ids=["other place", "no such file", "same step", "outside"],
)
def test_references_to_what_is_not_there_are_not_committed(
    store: FileStore, change, message: str
) -> None:
    base = base_of(store, committed(store), 200)
    facts = write_shards(store, 200, 1, base=base | change(base["model.weight"]))
    with pytest.raises(StoreError, match=message):
        write_manifest(store, job_id=JOB, run_id=RUN, generation=1, shards=facts, committed_at=0.0)


def test_a_damaged_file_of_the_earlier_checkpoint_is_named(store: FileStore) -> None:
    first = committed(store)
    second = after(store, first, 200, changed(STATE, "model.bias"))
    manifest = read_manifest(store, second)
    record = next(t for t in manifest.tensors if t.name == "model.weight")
    path = store.root / checkpoint_directory(JOB, RUN, 200) / ".." / record.file
    data = bytearray(path.read_bytes())
    data[record.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=f"{record.file} .bytes {record.offset} to"):
        list(read_tensors(store, second, manifest))
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{record.file} is missing"):
        list(read_tensors(store, second, manifest))
