"""Tensors that are stored compressed, where that makes them smaller."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.errors import CorruptCheckpoint
from distroml.runtime.checkpoint import shard_file
from distroml.runtime.checkpoint.codec import compress, decompress_into
from distroml.runtime.checkpoint.manifest import encode_manifest
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.shard_file import TensorBytes
from distroml.runtime.checkpoint.stores.file import FileStore
from tests.runtime.checkpoint.shards import committed, tensor


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


NOISE = TensorBytes("model.noise", "U8", (4096,), memoryview(random.Random(1).randbytes(4096)))
SMOOTH = tensor("model.smooth", [1.0 + n / 4096 for n in range(4096)])


@settings(deadline=None)
@given(
    data=st.binary(min_size=1, max_size=64),
    times=st.integers(1, 50),
    item=st.sampled_from([1, 2, 4, 8]),
)
def test_what_is_compressed_comes_back(data: bytes, times: int, item: int) -> None:
    whole = data * times * item
    target = memoryview(bytearray(len(whole)))
    decompress_into(target, memoryview(compress(memoryview(whole), item)), item)
    assert bytes(target) == whole


def test_sorting_bytes_by_place_makes_floats_smaller() -> None:
    assert len(compress(SMOOTH.data, 4)) < 0.7 * len(compress(SMOOTH.data, 1))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "."),
        (b"not a frame", "."),
        (zstandard.ZstdCompressor().compress(b"x" * 100), "of 100 bytes instead of 8"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b"12345678"), "instead of 8"),
        (zstandard.ZstdCompressor().compress(b"12345678") + b"more", "cannot be decompressed"),
        (zstandard.ZstdCompressor().compress(b"12345678")[:-2], "cannot be decompressed"),
    ],
    ids=["empty", "other", "too much", "unknown size", "followed", "cut"],
)
def test_frames_of_another_size_are_refused_before_they_are_unpacked(
    frame: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decompress_into(memoryview(bytearray(8)), memoryview(frame), 4)


@pytest.mark.parametrize("piece_bytes", [64, 4096, 1 << 24])
def test_only_tensors_that_become_smaller_are_compressed(
    store: FileStore, piece_bytes: int, monkeypatch
) -> None:
    monkeypatch.setattr(shard_file, "PIECE_BYTES", piece_bytes)
    state = [NOISE, SMOOTH, tensor("model.empty", []), tensor("model.zeros", [0.0] * 50_000)]
    checkpoint = committed(store, state=state, codec="zstd")
    manifest = read_manifest(store, checkpoint)
    codecs = {t.name: t.codec for t in manifest.tensors}
    assert (codecs["model.noise"], codecs["model.empty"]) == ("none", "none")
    assert codecs["model.zeros"] == "zstd"
    assert codecs["model.smooth"] == "zstd"
    found = {
        t.name: (t.dtype, t.shape, bytes(t.data)) for t in read_tensors(store, checkpoint, manifest)
    }
    assert found == {t.name: (t.dtype, t.shape, bytes(t.data)) for t in state}


def test_other_tools_see_a_compressed_tensor_as_bytes(store: FileStore) -> None:
    safetensors = pytest.importorskip("safetensors")
    checkpoint = committed(store, world_size=1, state=[SMOOTH], codec="zstd")
    with safetensors.safe_open(
        store.root / checkpoint.directory / "worker_0.safetensors", "numpy"
    ) as file:
        seen = file.get_tensor("model.smooth")
    (record,) = read_manifest(store, checkpoint).tensors
    assert (str(seen.dtype), seen.shape) == ("uint8", (record.length,))
    assert record.length < SMOOTH.size_bytes


def test_a_flipped_bit_in_a_frame_is_found_by_its_hash(store: FileStore) -> None:
    checkpoint = committed(store, world_size=1, state=[SMOOTH], codec="zstd")
    manifest = read_manifest(store, checkpoint)
    path = store.root / checkpoint.directory / "worker_0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="has BLAKE3"):
        list(read_tensors(store, checkpoint, manifest))


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    manifests = set()
    for name in ("one", "two"):
        store = FileStore(tmp_path / name)
        checkpoint = committed(store, state=[SMOOTH, NOISE], codec="zstd")
        manifests.add(encode_manifest(read_manifest(store, checkpoint)))
    assert len(manifests) == 1
