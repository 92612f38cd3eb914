"""What checkpoints ask of a store, of every kind of store."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from distroml.errors import StoreError
from distroml.runtime.checkpoint.commit import publish_latest, write_manifest
from distroml.runtime.checkpoint.examination import survey, verify
from distroml.runtime.checkpoint.reader import read_manifest, read_tensors
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.fsspec_store import FsspecStore
from distroml.runtime.checkpoint.stores.interface import (
    CheckpointStore,
    MissingFile,
    StagingStore,
)
from distroml.store_urls import StoreUrl
from tests.runtime.checkpoint.conftest import s3_store
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, copied, tensor, writer

KINDS = ("file", "s3", "memory", "fsspec-file")


def _fsspec(protocol: str, place: str) -> FsspecStore:
    options = {"auto_mkdir": True} if protocol == "file" else {}
    files = fsspec.filesystem(protocol, **options)
    files.mkdirs(place, exist_ok=True)
    return FsspecStore(StoreUrl("gs", place, "prefix"), lambda: files)


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "s3":
        request.getfixturevalue("aws")
        return s3_store(request.getfixturevalue("s3_server"))
    if request.param == "file":
        return FileStore(tmp_path / "store")
    if request.param == "memory":
        return _fsspec("memory", f"bucket-{secrets.token_hex(4)}")
    return _fsspec("file", str(tmp_path))


def test_put_joins_parts_and_tells_size_and_hash(store: CheckpointStore) -> None:
    stored = store.put_if_absent("a/b/c.bin", [b"one", memoryview(b"two"), b""])
    assert stored.created
    assert stored.size_bytes == 6
    assert stored.sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert store.read("a/b/c.bin") == b"onetwo"


def test_put_never_overwrites(store: CheckpointStore) -> None:
    first = store.put_if_absent("x", [b"first"])
    second = store.put_if_absent("x", [b"second"])
    assert not second.created
    assert (second.size_bytes, second.sha256) == (first.size_bytes, first.sha256)
    assert store.read("x") == b"first"


def test_of_many_writers_at_once_one_wins(store: CheckpointStore) -> None:
    ready = threading.Barrier(8)

    def write(number: int) -> tuple[bytes, Any]:
        content = str(number).encode() * 1000
        ready.wait(20)
        return content, store.put_if_absent("contested", [content])

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(write, range(8)))
    winners = [content for content, stored in outcomes if stored.created]
    assert len(winners) == 1
    there = store.read("contested")
    assert there == winners[0]
    if not isinstance(store, FsspecStore):  # its stand-ins show a file before it is whole
        assert {stored.sha256 for _, stored in outcomes} == {hashlib.sha256(there).hexdigest()}


def test_ranges(store: CheckpointStore) -> None:
    store.put_if_absent("x", [bytes(range(100))])
    store.put_if_absent("empty", [])
    assert store.read("x", 10, 3) == bytes([10, 11, 12])
    assert store.read("x", 98, 10) == bytes([98, 99])
    assert store.read("x", 95) == bytes(range(95, 100))
    assert store.read("x", 100, 5) == store.read("x", 3, 0) == store.read("empty") == b""
    target = bytearray(4)
    assert store.read_into("x", memoryview(target), 97) == 3
    assert target == bytes([97, 98, 99, 0])
    assert store.read_into("empty", memoryview(target)) == 0
    assert store.size("x") == 100
    assert store.size("empty") == 0


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a//b", "", "a/..", "a\0b", "/", ".."]
)
def test_paths_outside_are_refused(store: CheckpointStore, path: str) -> None:
    for action in (
        lambda: store.put_if_absent(path, [b"x"]),
        lambda: store.put_latest(path, b"x"),
        lambda: store.delete(path),
        lambda: store.read(path),
        lambda: store.size(path),
    ):
        with pytest.raises(StoreError, match="not a path inside"):
            action()


def test_missing_files_are_told_apart(store: CheckpointStore) -> None:
    actions: tuple[Callable[[str], object], ...] = (
        store.read,
        store.size,
        lambda path: store.read(path, 5, 5),
        lambda path: store.read(path, 0, 0),
        lambda path: store.read_into(path, memoryview(bytearray(5))),
    )
    for action in actions:
        with pytest.raises(MissingFile, match="no file 'a/b'"):
            action("a/b")
    assert store.list("a") == store.list("") == []
    store.delete("a/b")


def test_list_and_delete(store: CheckpointStore) -> None:
    paths = ["r/one/m", "r/one/w", "r/one-more/m", "r/two/m", "s"]
    for path in paths:
        store.put_if_absent(path, [b"x"])
    assert store.list("") == sorted(paths)
    assert store.list("r/one") == ["r/one/m", "r/one/w"]
    store.delete("r/one")
    store.delete("r/two/m")
    assert store.list("") == ["r/one-more/m", "s"]


def test_names_of_people_survive(store: CheckpointStore) -> None:
    paths = ["r/with space", "r/per%cent", "r/plus+", "r/ümläut", "r/a=b&c"]
    for path in paths:
        store.put_if_absent(path, [path.encode()])
    assert store.list("r") == sorted(paths)
    assert [store.read(path) for path in paths] == [path.encode() for path in paths]
    store.delete("r")
    assert store.list("r") == []


def test_latest_is_replaced_whole(store: CheckpointStore) -> None:
    store.put_latest("r/LATEST", b"long old text")
    store.put_latest("r/LATEST", b"new")
    assert store.read("r/LATEST") == b"new"
    assert store.list("r") == ["r/LATEST"]


def test_health_leaves_nothing_that_is_listed(store: CheckpointStore) -> None:
    store.health()
    store.put_if_absent("x", [b"1"])
    store.health()
    assert store.list("") == ["x"]


def test_large_files_come_back(store: CheckpointStore, small_parts: int) -> None:
    content = os.urandom(2 * small_parts + 12_345)
    stored = store.put_if_absent("large", [content[:100], memoryview(content)[100:]])
    assert stored.created
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    again = store.put_if_absent("large", [content])
    assert (again.created, again.sha256) == (False, stored.sha256)
    assert store.read("large") == content
    assert (
        store.read("large", small_parts - 7, small_parts + 14)
        == (content[small_parts - 7 : 2 * small_parts + 7])
    )
    target = bytearray(len(content) + 100)
    assert store.read_into("large", memoryview(target)) == len(content)
    assert target[: len(content)] == content


@pytest.mark.parametrize("size_mib", [0, 1, 11])
def test_a_file_may_be_staged_in_any_order(
    store: CheckpointStore, small_parts: int, size_mib: int
) -> None:
    if not isinstance(store, StagingStore):
        pytest.skip("takes files as a whole")
    content = os.urandom(size_mib * 1024 * 1024 + 7 * bool(size_mib))
    cuts = list(range(0, len(content), 700_000))
    for name, expected in (("d/one", True), ("d/two", True), ("d/one", False)):
        with store.stage(name, len(content)) as staged:
            with ThreadPoolExecutor(2) as threads:
                list(
                    threads.map(lambda b: staged.write(b, content[b : b + 700_000]), reversed(cuts))
                )
            staged.sync()
            assert store.list("d") == (["d/one"] if name == "d/two" else store.list("d"))
            assert staged.publish() is expected
    assert store.list("d") == ["d/one", "d/two"]
    assert store.read("d/one") == store.read("d/two") == content
    with store.stage("d/three", len(content)) as staged:
        for begin in cuts:
            staged.write(begin, content[begin : begin + 700_000])
    assert store.list("d") == ["d/one", "d/two"]
    assert store.remove_orphans("d", time.time() + 10, 0.0) == 0


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("base", [None, {}], ids=["whole", "delta"])
def test_a_checkpoint_is_written_committed_found_and_read(
    store: CheckpointStore, codec: Any, base: Any
) -> None:
    tensors = [tensor("model.a", [1.0, 2.0]), tensor("model.b", [float(n) for n in range(700_000)])]
    made, durable, abandoned = writer(store, codec=codec, base=base)
    for _ in range(2):  # the second time its shard is there already
        made.write(100, CURSOR, [copied(one) for one in tensors], {"x": 1})
        made.wait()
    assert not abandoned
    assert durable[0] == durable[1]
    written = [
        write_manifest(
            store, job_id=JOB, run_id=RUN, generation=1, shards=durable[:1], committed_at=1.0
        )
        for _ in range(2)
    ]
    assert written[0] == written[1]
    publish_latest(store, written[0])
    (check, *rest) = verify(store, written[0], [], lambda: False)
    assert [one.problem for one in (check, *rest)] == ["", ""]
    found = survey(store, "local", thorough=True, stopped=lambda: False)
    assert found.unusable == ()
    assert found.found[0].checkpoint.manifest_sha256 == written[0].manifest_sha256
    manifest = read_manifest(store, written[0])
    read = {one.name: bytes(one.data) for one in read_tensors(store, written[0], manifest)}
    assert read == {one.name: bytes(one.data) for one in tensors}
