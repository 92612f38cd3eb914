from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.reports import ShardFact
from distroml.runtime.checkpoint.manifest import (
    Manifest,
    ReferredRecord,
    checkpoint_directory,
    compose,
    decode_manifest,
    encode_manifest,
    partition,
)
from distroml.runtime.checkpoint.shard_file import ShardHeader, parse_safetensors_header
from distroml.runtime.checkpoint.stores.file import FileStore
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, STATE, write_shards

sizes = st.dictionaries(st.text(max_size=8), st.integers(0, 10**9), max_size=40)


@settings(deadline=None)
@given(sizes=sizes, world_size=st.integers(1, 16))
def test_partition_gives_each_tensor_to_one_rank_evenly(
    sizes: dict[str, int], world_size: int
) -> None:
    shares = partition(sizes, world_size)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= sum(loads) / world_size + max(sizes.values(), default=0)


@settings(deadline=None)
@given(sizes=sizes, world_size=st.integers(1, 16))
def test_partition_does_not_depend_on_the_order_of_names(
    sizes: dict[str, int], world_size: int
) -> None:
    backwards = dict(reversed(sizes.items()))
    assert partition(sizes, world_size) == partition(backwards, world_size)


@pytest.fixture
def parts(tmp_path) -> tuple[list[ShardFact], dict[str, ShardHeader]]:
    store = FileStore(tmp_path)
    facts = write_shards(store, world_size=2)
    directory = checkpoint_directory(JOB, RUN, 100)
    return facts, {
        f.file: parse_safetensors_header(store.read(f"{directory}/{f.file}")) for f in facts
    }


def test_manifest_names_everything(parts) -> None:
    facts, headers = parts
    manifest = compose(3, facts, headers)
    assert (manifest.generation, manifest.step, manifest.epoch) == (3, 100, CURSOR.epoch)
    assert manifest.cursor == CURSOR
    assert manifest.world_size == len(manifest.shards) == 2
    assert manifest.has_optimizer
    assert manifest.values == {"lr": 0.1}
    assert [t.name for t in manifest.tensors] == sorted(t.name for t in STATE)
    weight = next(t for t in manifest.tensors if t.name == "model.weight")
    assert (weight.dtype, weight.shape, weight.length) == ("F32", (2, 3), 24)


def test_same_shards_give_the_same_bytes_in_any_order(parts) -> None:
    facts, headers = parts
    data = encode_manifest(compose(3, facts, headers))
    assert encode_manifest(compose(3, facts[::-1], dict(reversed(headers.items())))) == data
    assert encode_manifest(decode_manifest(data)) == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[:1], r"ranks 0 to 1 are needed, there are \[0\]"),
        (lambda f: [f[0], f[0]], r"there are \[0, 0\]"),
        (lambda f: [], "no shards"),
        (lambda f: [f[0], msgspec.structs.replace(f[1], step=7)], "reported as rank 1, step 7"),
        (lambda f: [f[0], msgspec.structs.replace(f[1], size_bytes=1)], "1 were reported"),
    ],
    ids=["missing", "twice", "none", "other step", "other size"],
)
def test_shards_that_do_not_fit_are_refused(parts, change, message: str) -> None:
    facts, headers = parts
    with pytest.raises(ValueError, match=message):
        compose(1, change(facts), headers)


def test_shards_of_different_steps_are_refused(parts, tmp_path) -> None:
    facts, headers = parts
    store = FileStore(tmp_path / "other")
    other = write_shards(store, step=200, world_size=2)
    directory = checkpoint_directory(JOB, RUN, 200)
    headers[other[1].file] = parse_safetensors_header(store.read(f"{directory}/{other[1].file}"))
    with pytest.raises(ValueError, match="has step 200, rank 0's shard has 100"):
        compose(1, [facts[0], other[1]], headers)


def _with_tensor(manifest: Manifest, **changes: Any) -> Manifest:
    first, *others = manifest.tensors
    tensors = (msgspec.structs.replace(first, **changes), *others)
    return msgspec.structs.replace(manifest, tensors=tensors)


def _packed(
    manifest: Manifest, shape: tuple[int, ...], length: int, frames: tuple[int, ...]
) -> Manifest:
    return _with_tensor(manifest, codec="zstd", shape=shape, length=length, frames=frames)


def _with_file(manifest: Manifest, which: str, **changes: Any) -> Manifest:
    first, *others = getattr(manifest, which)
    return msgspec.structs.replace(
        manifest, **{which: (msgspec.structs.replace(first, **changes), *others)}
    )


def _referring(manifest: Manifest, file: str) -> Manifest:
    told = msgspec.structs.asdict(manifest.shards[0]) | {"file": file}
    changed = msgspec.structs.replace(manifest, referred=(ReferredRecord(**told),))
    return _with_tensor(changed, file=file)


def _overlapping(manifest: Manifest) -> Manifest:
    """The second tensor of a file begins one byte before the end of the first."""
    ordered = sorted((t for t in manifest.tensors if t.length), key=lambda t: (t.file, t.offset))
    first, second = next((a, b) for a, b in pairwise(ordered) if a.file == b.file)
    moved = msgspec.structs.replace(second, offset=first.offset + first.length - 1)
    tensors = tuple(moved if t is second else t for t in manifest.tensors)
    return msgspec.structs.replace(manifest, tensors=tensors)


def test_a_deeply_nested_manifest_is_refused() -> None:
    depth = 100_000
    for data in (b"[" * depth, b'{"format":3,"values":' + b'{"a":' * depth):
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_manifest(data)


def test_manifests_of_the_former_format_are_refused_by_its_number(parts) -> None:
    data = encode_manifest(compose(1, *parts)).replace(b'"format": 3', b'"format": 2')
    with pytest.raises(ValueError, match="format 2 is not known; this version reads 3"):
        decode_manifest(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: msgspec.structs.replace(m, format=9),
            "format 9 is not known; this version reads 3",
        ),
        (lambda m: msgspec.structs.replace(m, shards=m.shards[:1] * 2), "a shard file twice"),
        (lambda m: msgspec.structs.replace(m, shards=m.shards[:1]), "outside of its file"),
        (lambda m: msgspec.structs.replace(m, tensors=m.tensors[:1] * 2), "twice"),
        (lambda m: _with_tensor(m, shape=(-2, -3)), "decoded: Expected `int` >= 0"),
        (lambda m: _with_tensor(m, shape=(3, 3)), "has a wrong size or type"),
        (lambda m: _with_tensor(m, dtype="X9"), "has a wrong size or type"),
        (lambda m: _with_tensor(m, length=4), "has a wrong size or type"),
        (lambda m: _with_tensor(m, offset=0), "outside of its file"),
        (lambda m: _with_tensor(m, offset=2**61), "outside of its file"),
        (lambda m: _with_tensor(m, shape=(2**61, 2**61)), "has a wrong size or type"),
        (lambda m: _with_tensor(m, blake3=()), "has 0 hashes for 8 bytes"),
        (lambda m: _with_tensor(m, blake3=("x",)), "decoded"),
        (lambda m: _with_tensor(m, name=""), "decoded"),
        (lambda m: _with_tensor(m, file="../../other/worker_0.safetensors"), "outside of its file"),
        (lambda m: _with_tensor(m, frames=(8,)), "has a wrong size or type"),
        (lambda m: _with_tensor(m, codec="lz4"), "decoded"),
        (lambda m: _packed(m, (2**40,), 30, (30,)), "do not add up"),
        (lambda m: _packed(m, (2**22,), 30, (30,)), "claims 16777216 bytes in a frame of 30"),
        (lambda m: _packed(m, (2,), 30, (10, 20)), "do not add up"),
        (lambda m: _with_file(m, "shards", file="../worker_0.safetensors"), "decoded"),
        (lambda m: _with_file(m, "shards", file="/etc/passwd"), "decoded"),
        (lambda m: _with_file(m, "shards", size_bytes=-1), "decoded"),
        (lambda m: _with_file(m, "shards", size_bytes=10), "outside of its file"),
        (lambda m: _referring(m, "ckpt_step_00000100/worker_0.safetensors"), "not earlier than"),
        (lambda m: _referring(m, "ckpt_step_00000200/worker_0.safetensors"), "not earlier than"),
        (lambda m: _referring(m, "../ckpt_step_00000001/worker_0.safetensors"), "decoded"),
        (lambda m: _referring(m, "worker_7.safetensors"), "decoded"),
        (_overlapping, "overlaps another one"),
    ],
)
def test_inconsistent_manifests_are_refused(parts, change, message: str) -> None:
    manifest: Manifest = change(compose(1, *parts))
    with pytest.raises(ValueError, match=message):
        decode_manifest(encode_manifest(manifest))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="decoded"):
        decode_manifest(data)
