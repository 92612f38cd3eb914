from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from msgspec.structs import replace

from distroml.errors import CorruptCheckpoint, StoreError
from distroml.runtime.checkpoint import manifest as manifest_format
from distroml.runtime.checkpoint import reader, shard_check, shard_file
from distroml.runtime.checkpoint.commit import publish_latest, write_manifest
from distroml.runtime.checkpoint.reader import read_into, read_manifest, read_tensors
from distroml.runtime.checkpoint.stores.file import FileStore
from tests.runtime.checkpoint.shards import JOB, RUN, STATE, committed, tensor, write_shards


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def commit(store: FileStore, facts, generation: int = 1):
    return write_manifest(
        store, job_id=JOB, run_id=RUN, generation=generation, shards=facts, committed_at=1.0
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_what_was_written_comes_back(store: FileStore, world_size: int) -> None:
    checkpoint = committed(store, world_size=world_size)
    assert checkpoint.shards == world_size
    manifest = read_manifest(store, checkpoint)
    pieces = list(read_tensors(store, checkpoint, manifest))
    found = {piece.name: (piece.dtype, piece.shape, bytes(piece.data)) for piece in pieces}
    assert found == {t.name: (t.dtype, t.shape, bytes(t.data)) for t in STATE}


def test_chosen_tensors_are_read_to_where_they_belong(store: FileStore) -> None:
    checkpoint = committed(store)
    target = memoryview(bytearray(24))
    read_into(store, checkpoint, read_manifest(store, checkpoint), {"model.weight": target})
    assert bytes(target) == bytes(STATE[0].data)


@pytest.mark.parametrize("piece_bytes", [8, 16])
def test_tensors_of_several_pieces_come_back(
    store: FileStore, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "PIECE_BYTES", piece_bytes)
    for joined in (1, 24, 1000):
        monkeypatch.setattr(reader, "JOINED_BYTES", joined)
        monkeypatch.setattr(reader, "WINDOW_BYTES", joined)
        checkpoint = committed(store, step=joined)
        manifest = read_manifest(store, checkpoint)
        found = {p.name: bytes(p.data) for p in read_tensors(store, checkpoint, manifest)}
        assert found == {t.name: bytes(t.data) for t in STATE}
        weight = next(t for t in manifest.tensors if t.name == "model.weight")
        assert len(weight.blake3) == -(-24 // piece_bytes)


@pytest.mark.parametrize("likely_bytes", [8, 100, 1 << 20])
def test_headers_are_read_whole_whatever_their_length(
    store: FileStore, likely_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = committed(store, world_size=3)
    monkeypatch.setattr(shard_check, "LIKELY_BYTES", likely_bytes)
    assert commit(store, write_shards(store, world_size=3)) == replace(plain, committed_at=1.0)


def test_the_headers_of_all_shards_are_read_side_by_side(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other they would take a far store's time once for each rank."""
    facts = write_shards(store, world_size=4)
    all_four = threading.Barrier(len(facts))
    read = FileStore.read

    def meet_first(self: FileStore, path: str, *place: int) -> bytes:
        all_four.wait(timeout=20)
        return read(self, path, *place)

    monkeypatch.setattr(FileStore, "read", meet_first)
    assert commit(store, facts).shards == 4


def test_commit_can_be_repeated(store: FileStore) -> None:
    facts = write_shards(store)
    assert commit(store, facts) == commit(store, facts[::-1])
    files = store.list(commit(store, facts).directory)
    assert [f.rpartition("/")[2] for f in files] == [
        "manifest.json",
        "worker_0.safetensors",
        "worker_1.safetensors",
    ]


def test_a_manifest_of_a_dead_generation_is_stepped_around(store: FileStore) -> None:
    first = commit(store, write_shards(store, generation=1), generation=1)
    second = commit(store, write_shards(store, generation=2), generation=2)
    assert (first.manifest, second.manifest) == ("manifest.json", "manifest.g2.json")
    for checkpoint in (first, second):
        assert read_manifest(store, checkpoint).generation == checkpoint.generation


def test_on_disks_of_their_own_each_generation_has_its_manifest(store: FileStore) -> None:
    for generation, name in ((3, "manifest.g3.json"), (1, "manifest.json")):
        shards = write_shards(store, generation=generation)
        made = write_manifest(
            store, job_id=JOB, run_id=RUN, generation=generation, shards=shards, committed_at=1.0,
            scattered=True,
        )  # fmt: skip
        assert made.manifest == name


def test_size_covers_all_files(store: FileStore) -> None:
    checkpoint = committed(store)
    files = store.list(checkpoint.directory)
    assert checkpoint.size_bytes == sum(store.size(file) for file in files)


def test_latest_points_at_the_checkpoint(store: FileStore) -> None:
    checkpoint = committed(store)
    publish_latest(store, checkpoint)
    latest = json.loads(store.read(f"{JOB}/{RUN}/checkpoints/LATEST"))
    assert latest["directory"] == "ckpt_step_00000100"
    assert latest["manifest_sha256"] == checkpoint.manifest_sha256


def test_incomplete_checkpoints_are_not_committed(store: FileStore) -> None:
    facts = write_shards(store)
    with pytest.raises(StoreError, match="ranks 0 to 1 are needed"):
        commit(store, facts[:1])
    with pytest.raises(StoreError, match="without shards"):
        commit(store, [])
    (store.root / JOB / RUN / "checkpoints/ckpt_step_00000100" / facts[1].file).unlink()
    with pytest.raises(StoreError, match="no file"):
        commit(store, facts)


def shard_path(store: FileStore, checkpoint, file: str) -> Path:
    return store.root / checkpoint.directory / file


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [9, 200, -1], ids=["header", "metadata", "data"])
@pytest.mark.parametrize("file", ["worker_0.safetensors", "manifest.json"])
def test_one_flipped_bit_anywhere_is_found(store: FileStore, file: str, at: int) -> None:
    checkpoint = committed(store)
    path = shard_path(store, checkpoint, file)
    whole = path.read_bytes()
    flip_byte(path, at)
    with pytest.raises(CorruptCheckpoint) as caught:
        list(read_tensors(store, checkpoint, read_manifest(store, checkpoint)))
    error = caught.value
    assert file in error.detail
    place = re.search(r"bytes (\d+) to (\d+)", error.detail)
    assert place is not None
    begin, end = map(int, place.groups())
    assert begin <= at % len(whole) < end
    assert error.extra["offset"] == begin
    in_a_piece = file != "manifest.json" and at == -1
    assert error.extra["hash"] == ("BLAKE3" if in_a_piece else "SHA-256")
    by = blake3 if in_a_piece else hashlib.sha256
    for data, told in ((whole, "expected_hash"), (path.read_bytes(), "actual_hash")):
        digest = by(data[begin:end]).hexdigest()
        assert error.extra[told] == digest
        assert digest in error.detail
    assert error.extra["checkpoint_step"] == 100


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"has \d+ bytes instead of \d+"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"has \d+ bytes instead of \d+"),
    ],
    ids=["missing", "short", "long"],
)
def test_a_damaged_shard_is_named(store: FileStore, damage, message: str) -> None:
    checkpoint = committed(store)
    damage(shard_path(store, checkpoint, "worker_1.safetensors"))
    with pytest.raises(CorruptCheckpoint, match=f"worker_1.safetensors {message}"):
        list(read_tensors(store, checkpoint, read_manifest(store, checkpoint)))


def test_a_missing_manifest_is_corrupt(store: FileStore) -> None:
    checkpoint = committed(store)
    shard_path(store, checkpoint, "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"manifest.json is missing"):
        read_manifest(store, checkpoint)


def test_a_manifest_of_another_step_is_refused(store: FileStore) -> None:
    checkpoint = msgspec.structs.replace(committed(store), step=101)
    with pytest.raises(CorruptCheckpoint, match="is of step 100, not 101"):
        read_manifest(store, checkpoint)


def test_one_of_another_version_is_not_corrupt(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = committed(store)
    monkeypatch.setattr(manifest_format, "FORMAT", 4)
    with pytest.raises(StoreError, match=r"manifest\.json is of another version") as caught:
        read_manifest(store, checkpoint)
    assert not isinstance(caught.value, CorruptCheckpoint)
    assert "format 3 is not known; this version reads 4" in caught.value.detail


def test_a_tensor_in_two_shards_is_refused(store: FileStore) -> None:
    from tests.runtime.checkpoint.shards import CURSOR, writer

    facts = []
    for rank in (0, 1):
        made, durable, _ = writer(store, rank, 2)
        made.write(100, CURSOR, [tensor("model.same", [1.0])], None)
        made.wait()
        facts += durable
    with pytest.raises(StoreError, match=r"'model\.same' is in two shards"):
        commit(store, facts)


def test_the_coordinators_side_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; import distroml.runtime.checkpoint.commit, distroml.runtime.checkpoint.reader, "
        "distroml.runtime.checkpoint.writer, distroml.runtime.data.order, distroml.runtime.control; "
        "bad = {'torch', 'numpy', 'safetensors', 'asyncio'} & set(sys.modules); "
        "sys.exit(f'imports {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
