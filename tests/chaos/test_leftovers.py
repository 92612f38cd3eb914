"""What a harness leaves when it is killed goes with the next start; what belongs to one that lives stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos import leftovers, storage
from chaos.processes import (
    MARK,
    NODE,
    Process,
    Role,
    marked,
    own_mark,
    owner_lives,
    start_time,
)

TIMEOUT_S = 10.0
Spawn = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """A process that carries a mark and waits."""
    started: list[subprocess.Popen[bytes]] = []

    def make(mark: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"],
            env={**os.environ, MARK: mark, NODE: "a"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield make
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def dead_mark() -> str:
    """The mark of a harness that has ended."""
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = f"{gone.pid}-{start_time(gone.pid)}"
    assert owner_lives(mark)
    gone.communicate(b"\n", timeout=TIMEOUT_S)
    return mark


def test_a_signal_reaches_only_the_process_that_was_seen(spawn: Spawn) -> None:
    child = spawn(own_mark())
    (seen,) = [process for process in marked(own_mark()) if process.pid == child.pid]
    assert (seen.node, seen.role) == ("a", Role.OTHER)

    impostor = Process(seen.pid, seen.started + 1, seen.mark, seen.node, seen.role)
    assert not impostor.kill()
    assert child.poll() is None

    assert seen.signal(signal.SIGTERM)
    child.wait(TIMEOUT_S)
    assert not seen.kill()
    assert not seen.alive


def test_owners_are_told_apart_by_their_start(dead_mark: str) -> None:
    assert owner_lives(own_mark())
    assert not owner_lives(dead_mark)
    assert not owner_lives(f"{os.getpid()}-1")
    assert not owner_lives("nonsense")


async def test_the_next_start_removes_what_a_dead_harness_left(
    spawn: Spawn, dead_mark: str, tmp_path: Path
) -> None:
    orphan, own = spawn(dead_mark), spawn(own_mark())
    disk = storage.Disk(f"chaos-{dead_mark}-a", tmp_path / "disks/a", 1)
    disk.make()

    dead = await leftovers.remove_of_dead_harnesses()

    assert dead_mark in dead
    assert orphan.wait(TIMEOUT_S) == -signal.SIGKILL
    assert own.poll() is None
    assert dead_mark not in storage.marks_of_mounts()
    if disk.own:
        assert not disk.path.exists()


def test_a_small_disk_can_be_full_and_empty_again(tmp_path: Path) -> None:
    disk = storage.Disk(f"chaos-{own_mark()}-a", tmp_path / "disks/a", 2)
    disk.make()
    if not disk.own:
        pytest.skip("only root can mount a tmpfs")
    try:
        assert disk.fill() > 0
        assert disk.free_bytes == 0
        with pytest.raises(OSError, match="No space left"):
            (disk.path / "more").write_bytes(b"x" * 8192)

        disk.empty()

        assert disk.free_bytes > 2**20
    finally:
        storage.unmount(own_mark())


def test_what_is_left_is_told(spawn: Spawn, tmp_path: Path) -> None:
    known = leftovers.before()
    spawn(own_mark())
    (tmp_path / "half.tmp").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        found = leftovers.look(own_mark(), 1.0, known, [tmp_path], [address, "127.0.0.1:1"])

    assert sorted(one.kind for one in found) == ["file", "port", "process"]
    assert any(one.what == address for one in found)
