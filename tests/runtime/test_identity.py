"""A data directory belongs to one node and one process, and its incarnation only grows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distroml.errors import ConfigError
from distroml.runtime.identity import DataDirectory


def held(path: Path, name: str = "a", cluster_id: str = "c") -> DataDirectory:
    return DataDirectory(path, name=name, cluster_id=cluster_id)


def refusal(path: Path, name: str = "a", cluster_id: str = "c") -> str:
    with pytest.raises(ConfigError) as caught:
        held(path, name, cluster_id)
    assert caught.value.field == "data_dir"
    return caught.value.detail


def test_each_life_has_a_higher_incarnation(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        directory = held(tmp_path / "deep" / "a")
        seen.append(directory.next_incarnation())
        seen.append(directory.next_incarnation())
        directory.close()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_the_cluster_may_know_better(tmp_path: Path) -> None:
    directory = held(tmp_path)
    assert directory.next_incarnation(at_least=40) == 40
    directory.close()
    assert held(tmp_path).next_incarnation(at_least=7) == 41


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from distroml.runtime.identity import DataDirectory\n"
        "held = DataDirectory(pathlib.Path(sys.argv[1]), name='a', cluster_id='c')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert "in use by another distroml-node" in refusal(tmp_path)
        other.kill()
        other.wait()
    held(tmp_path)


def test_another_nodes_directory_is_refused(tmp_path: Path) -> None:
    directory = held(tmp_path)
    directory.next_incarnation()
    directory.close()
    assert "belongs to name 'a', not 'b'" in refusal(tmp_path, name="b")
    assert "belongs to cluster_id 'c', not 'd'" in refusal(tmp_path, cluster_id="d")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"incarnation": "x"}', '{"incarnation": null}']
)
def test_a_damaged_file_is_never_taken_for_a_fresh_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.json").write_text(text)
    assert "is damaged" in refusal(tmp_path)


def test_a_refused_directory_is_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "node.json"
    path.write_text("{")
    refusal(tmp_path)
    path.unlink()
    held(tmp_path)


def test_a_death_while_writing_leaves_the_old_number(tmp_path: Path) -> None:
    directory = held(tmp_path)
    directory.next_incarnation()
    directory.close()
    (tmp_path / "node.tmp").write_text('{"incarn')
    directory = held(tmp_path)
    assert directory.next_incarnation() == 2
    assert json.loads((tmp_path / "node.json").read_text())["incarnation"] == 2


def test_what_the_operating_system_refuses_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert f"data_dir {file / 'a'} cannot be used: Not a directory" in refusal(file / "a")
    (tmp_path / "a" / "node.json").mkdir(parents=True)
    assert "Is a directory" in refusal(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(tmp_path)


def test_a_disk_that_takes_nothing_more_is_named(tmp_path: Path) -> None:
    directory = held(tmp_path)
    (tmp_path / "node.tmp").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left on device"):
        directory.next_incarnation()


def unmount(store: Path) -> None:
    """The disk is away; where it was mounted is an empty directory."""
    shutil.rmtree(store)
    store.mkdir()


@pytest.mark.parametrize("how", ["empty", "gone"])
def test_a_store_that_was_there_before_and_is_not_is_refused(tmp_path: Path, how: str) -> None:
    store = tmp_path / "disk" / "store"
    directory = held(tmp_path / "a")
    directory.claim_store(store)
    directory.claim_store(store)
    (store / "job-1").mkdir()
    unmount(store if how == "empty" else tmp_path / "disk")
    with pytest.raises(ConfigError, match="not mounted") as caught:
        directory.claim_store(store)
    assert caught.value.field == "store_dir"
    note = tmp_path / "a" / "store-dir"
    assert str(store) in caught.value.detail
    assert str(note) in caught.value.detail
    assert not list(store.glob("*")), "nothing is written where the disk belongs"
    note.unlink()
    directory.claim_store(store)
    unmount(store)
    with pytest.raises(ConfigError):
        directory.claim_store(store)


def test_another_store_is_taken_and_watched_from_then_on(tmp_path: Path) -> None:
    directory = held(tmp_path / "a")
    directory.claim_store(tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    directory.claim_store(tmp_path / "new")
    unmount(tmp_path / "new")
    with pytest.raises(ConfigError, match="not mounted"):
        directory.claim_store(tmp_path / "new")


def test_a_store_outlives_the_data_directory_and_one_inside_goes_with_it(tmp_path: Path) -> None:
    held(tmp_path / "a").claim_store(tmp_path / "store")
    shutil.rmtree(tmp_path / "a")
    directory = held(tmp_path / "a")
    directory.claim_store(tmp_path / "store")
    directory.close()
    shutil.rmtree(tmp_path / "a")
    held(tmp_path / "a").claim_store(tmp_path / "a" / "store")
    assert [one.name for one in (tmp_path / "a").iterdir()] == ["lock"]


def test_a_death_between_mark_and_note_costs_nothing(tmp_path: Path) -> None:
    directory, store = held(tmp_path / "a"), tmp_path / "store"
    (tmp_path / "a" / "store-dir.tmp").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left on device"):
        directory.claim_store(store)
    (tmp_path / "a" / "store-dir.tmp").unlink()
    directory.claim_store(store)
    unmount(store)
    with pytest.raises(ConfigError, match="not mounted"):
        directory.claim_store(store)


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "store"
    with pytest.raises(ConfigError, match=f"store_dir {below} cannot be used: .* Not a directory"):
        held(tmp_path / "a").claim_store(below)
