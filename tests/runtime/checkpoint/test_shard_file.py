from __future__ import annotations

import subprocess
import sys

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from distroml.runtime.checkpoint.shard_file import (
    LENGTH,
    ShardNote,
    TensorBytes,
    cuts,
    encode_header,
    header_length,
    parse_safetensors_header,
)
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, STATE, tensor


def digests(data: memoryview) -> tuple[str, ...]:
    return tuple(blake3(data[begin:end]).hexdigest() for begin, end in cuts(len(data)))


def note(tensors: list[TensorBytes], **changes: object) -> ShardNote:
    fields: dict[str, object] = {
        "job_id": JOB,
        "run_id": RUN,
        "step": 100,
        "cursor": CURSOR,
        "rank": 0,
        "world_size": 1,
        "strategy": "data_parallel",
        "backend": "gloo",
        "digests": {t.name: digests(t.data) for t in tensors},
    }
    return ShardNote(**{**fields, **changes})  # type: ignore[arg-type]


def encoded(tensors: list[TensorBytes], **changes: object) -> bytes:
    return encode_header(tensors, note(tensors, **changes)) + b"".join(t.data for t in tensors)


def test_a_header_says_where_each_tensor_is() -> None:
    data = encoded(STATE)
    header = parse_safetensors_header(data)
    assert header.file_bytes == len(data)
    assert header.note.cursor == CURSOR
    found = {p.name: data[p.offset : p.offset + p.length] for p in header.tensors}
    assert found == {t.name: bytes(t.data) for t in STATE}


def test_the_safetensors_library_reads_our_shards(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors")
    file = tmp_path / "worker_0.safetensors"
    file.write_bytes(encoded(STATE))
    with safetensors.safe_open(file, "numpy") as shard:
        assert set(shard.keys()) == {t.name for t in STATE}
        assert shard.get_tensor("model.weight").tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:4], "only 4 bytes"),
        (lambda d: d[:40], "the header is cut"),
        (lambda d: LENGTH.pack(1 << 40) + d[8:], "its header claims"),
        (lambda d: d[:8] + b"[" + d[9:], "not that of a shard"),
        (lambda d: d.replace(b'"F32"', b'"F64"'), "wrong size, type or place"),
        (lambda d: d.replace(b'"data_offsets":[0,24]', b'"data_offsets":[8,32]'), "wrong size"),
        (lambda d: d.replace(b'"distroml"', b'"someone1"'), "not that of a shard"),
    ],
)
def test_damaged_headers_are_refused(damage, message: str) -> None:
    data = damage(encoded(STATE))
    with pytest.raises(ValueError, match=message):
        parse_safetensors_header(data)


def test_unknown_formats_and_missing_digests_are_refused() -> None:
    with pytest.raises(ValueError, match="shard format 2 is not known"):
        parse_safetensors_header(encoded(STATE, format=2))
    with pytest.raises(ValueError, match="do not name the same tensors"):
        parse_safetensors_header(encoded(STATE, digests={}))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_not_crashed_on(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_safetensors_header(LENGTH.pack(len(data)) + data)


def test_header_is_aligned_and_small_reads_suffice() -> None:
    data = encode_header([tensor("x", [1.0])], note([tensor("x", [1.0])]))
    assert len(data) % 64 == 0
    assert header_length(data[:8]) == len(data)


READ_SIDE_BY_SIDE = """
import importlib, sys, threading
from distroml.runtime.checkpoint import shard_file
sys.setswitchinterval(1e-6)
data = sys.stdin.buffer.read()
for _ in range(100):
    fresh = importlib.reload(shard_file)
    ready = threading.Barrier(4)
    def read():
        ready.wait()
        fresh.parse_safetensors_header(data)
    readers = [threading.Thread(target=read) for _ in range(4)]
    for one in readers: one.start()
    for one in readers: one.join()
"""


def test_threads_may_be_the_first_to_read_headers_all_at_once() -> None:
    """As in a commit. Types that msgspec first met in several threads had crashed the process."""
    data = encode_header([tensor("x", [1.0])], note([tensor("x", [1.0])]))
    script = [sys.executable, "-c", READ_SIDE_BY_SIDE]
    assert subprocess.run(script, input=data, timeout=60, check=False).returncode == 0
