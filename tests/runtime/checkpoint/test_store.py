from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from distroml.errors import StoreError
from distroml.runtime.checkpoint.store import TEMPORARY_PREFIX, LocalStore, MissingFile


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_put_joins_parts_and_tells_size_and_hash(store: LocalStore) -> None:
    stored = store.put_if_absent("a/b/c.bin", [b"one", memoryview(b"two"), b""])
    assert stored.created
    assert stored.size_bytes == 6
    assert stored.sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert store.read("a/b/c.bin") == b"onetwo"


def test_put_never_overwrites(store: LocalStore) -> None:
    first = store.put_if_absent("x", [b"first"])
    second = store.put_if_absent("x", [b"second"])
    assert not second.created
    assert (second.size_bytes, second.sha256) == (first.size_bytes, first.sha256)
    assert store.read("x") == b"first"


def test_of_two_writers_at_once_one_wins(store: LocalStore, monkeypatch) -> None:
    """The other one appears between our check and our link."""
    link = os.link

    def late(source, target) -> None:
        Path(target).write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    stored = store.put_if_absent("x", [b"ours"])
    assert not stored.created
    assert stored.sha256 == hashlib.sha256(b"theirs").hexdigest()


def test_a_failed_write_leaves_nothing(store: LocalStore, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (store.root / "d").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write 'd/x': No space left on device"):
        store.put_if_absent("d/x", [b"data"])
    assert list((store.root / "d").iterdir()) == []


def test_ranges(store: LocalStore) -> None:
    store.put_if_absent("x", [bytes(range(100))])
    assert store.read("x", 10, 3) == bytes([10, 11, 12])
    assert store.read("x", 98, 10) == bytes([98, 99])
    target = bytearray(4)
    assert store.read_into("x", memoryview(target), 97) == 3
    assert target == bytes([97, 98, 99, 0])
    assert store.size("x") == 100


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a//b", "", "a/..", "a\0b", "/", ".."]
)
def test_paths_outside_are_refused(store: LocalStore, path: str) -> None:
    with pytest.raises(StoreError, match="not a path inside"):
        store.put_if_absent(path, [b"x"])
    with pytest.raises(StoreError, match="not a path inside"):
        store.delete(path)


def test_missing_files_are_told_apart(store: LocalStore) -> None:
    for action in (store.read, store.size):
        with pytest.raises(MissingFile, match="no file 'a/b'"):
            action("a/b")
    assert store.list("a") == []
    store.delete("a/b")


def test_list_and_delete(store: LocalStore) -> None:
    for path in ("r/one/m", "r/one/w", "r/two/m"):
        store.put_if_absent(path, [b"x"])
    assert store.list("r") == ["r/one/m", "r/one/w", "r/two/m"]
    store.delete("r/one")
    store.delete("r/two/m")
    assert store.list("r") == []


def test_latest_is_replaced_whole(store: LocalStore) -> None:
    store.put_latest("r/LATEST", b"long old text")
    store.put_latest("r/LATEST", b"new")
    assert store.read("r/LATEST") == b"new"
    assert store.list("r") == ["r/LATEST"]


def test_orphans_are_removed_once_old(store: LocalStore) -> None:
    store.put_if_absent("r/x", [b"x"])
    orphan = store.root / "r" / f"{TEMPORARY_PREFIX}1-abc"
    orphan.write_bytes(b"half")
    written = orphan.stat().st_mtime
    assert store.list("r") == ["r/x"]
    assert store.remove_orphans("r", now=written + 10, min_age_s=60) == 0
    assert store.remove_orphans("r", now=written + 60, min_age_s=60) == 1
    assert not orphan.exists()
    assert store.read("r/x") == b"x"


def test_health(store: LocalStore, tmp_path: Path) -> None:
    store.health()
    assert list(store.root.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        LocalStore(tmp_path / "file" / "below").health()
