"""What a node wrote after a restart survives a loss of power, whatever its earlier life left in the page cache."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from distroml.consensus.raft_log import AppendRecords, EntryRecord, LogImage, RewriteLog, TermRecord
from distroml.consensus.storage import Recovered, Storage, open_storage
from distroml.consensus.wal import Identity
from tests.sim.disk import Failpoint, SimDisk
from tests.sim.loop import ProcessKilled

DIRECTORY = Path("/data")
IDENTITY = Identity("cluster", "a")


def _boot(disk: SimDisk) -> tuple[Storage, Recovered]:
    return open_storage(DIRECTORY, IDENTITY, disk)


def _append(storage: Storage, *indexes: int) -> None:
    storage.perform(AppendRecords([EntryRecord(b"\x00x", index, 0) for index in indexes]))


def _dies_in(disk: SimDisk, call: str, storage: Storage, image: LogImage) -> None:
    disk.failpoint = Failpoint(call, after=True)
    with pytest.raises(ProcessKilled):
        storage.perform(RewriteLog(image))
    disk.kill(0.0, random.Random(0))


@pytest.mark.parametrize("seed", range(20))
def test_a_rename_that_a_killed_process_did_not_make_durable(seed: int) -> None:
    disk = SimDisk()
    storage, recovered = _boot(disk)
    _append(storage, 2, 3)
    image = recovered.image.copy()
    image.entries += [(b"\x00x", 2, 0), (b"\x00x", 3, 0)]
    _dies_in(disk, "replace", storage, image)
    storage, _ = _boot(disk)
    storage.perform(AppendRecords([TermRecord(7, "b")]))
    _append(storage, 4)
    disk.kill(0.0, random.Random(seed))
    disk.lose_power(random.Random(seed))
    _, recovered = _boot(disk)
    assert (recovered.image.last_index, recovered.image.term, recovered.image.vote) == (4, 7, "b")


@pytest.mark.parametrize("seed", range(20))
def test_pages_that_a_failed_sync_of_a_killed_process_dropped(seed: int) -> None:
    disk = SimDisk()
    storage, _ = _boot(disk)
    _append(storage, 2)
    disk.fail["sync"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        _append(storage, 3)
    disk.fail.clear()
    disk.kill(0.0, random.Random(seed))  # before it could retry
    storage, recovered = _boot(disk)
    last = recovered.image.last_index  # what it reads may be in the page cache only
    _append(storage, last + 1)
    disk.kill(0.0, random.Random(seed))
    disk.lose_power(random.Random(seed))
    _, recovered = _boot(disk)
    assert recovered.image.last_index == last + 1
