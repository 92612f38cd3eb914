"""What only a directory does; the rest is in ``test_stores``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from distroml.errors import StoreError
from distroml.runtime.checkpoint.stores.file import TEMPORARY_PREFIX, FileStore


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_of_two_writers_at_once_one_wins(store: FileStore, monkeypatch) -> None:
    """The other one appears between our check and our link."""
    link = os.link

    def late(source, target) -> None:
        Path(target).write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    stored = store.put_if_absent("x", [b"ours"])
    assert not stored.created
    assert stored.sha256 == hashlib.sha256(b"theirs").hexdigest()


def test_a_failed_write_leaves_nothing(store: FileStore, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (store.root / "d").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write 'd/x': No space left on device"):
        store.put_if_absent("d/x", [b"data"])
    assert list((store.root / "d").iterdir()) == []


def test_orphans_are_removed_once_old(store: FileStore) -> None:
    store.put_if_absent("r/x", [b"x"])
    orphan = store.root / "r" / f"{TEMPORARY_PREFIX}1-abc"
    orphan.write_bytes(b"half")
    written = orphan.stat().st_mtime
    assert store.list("r") == ["r/x"]
    assert store.remove_orphans("r", now=written + 10, min_age_s=60) == 0
    assert store.remove_orphans("r", now=written + 60, min_age_s=60) == 1
    assert not orphan.exists()
    assert store.read("r/x") == b"x"


def test_a_folder_of_nothing_but_orphans_goes_with_them(store: FileStore) -> None:
    for number in range(2):
        orphan = store.root / "r" / "ckpt" / f"{TEMPORARY_PREFIX}{number}-abc"
        orphan.parent.mkdir(parents=True, exist_ok=True)
        orphan.write_bytes(b"half")
    assert store.remove_orphans("r", now=orphan.stat().st_mtime + 60, min_age_s=60) == 2
    assert list((store.root / "r").iterdir()) == []


def test_health(store: FileStore, tmp_path: Path) -> None:
    store.health()
    assert list(store.root.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        FileStore(tmp_path / "file" / "below").health()
