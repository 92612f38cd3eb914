"""One node's raft directory: the log and its snapshot, opened together and kept consistent.

`open_storage` answers "what do we know after a crash at any instant"; `Storage.perform` carries out
the operations of one turn in order. Everything here blocks and runs in the node's sync thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from distroml.consensus.disk import Disk, write_atomically
from distroml.consensus.messages import NO_OP
from distroml.consensus.proofs import nonces_in
from distroml.consensus.raft_log import (
    FIRST_INDEX,
    AppendRecords,
    DiskOp,
    LogImage,
    RewriteLog,
    StoreSnapshot,
    blank_image,
)
from distroml.consensus.raft_types import StorageCorrupt, StorageInUse
from distroml.consensus.snapshot import Snapshot, decode_file, encode_file
from distroml.consensus.wal import Identity, Wal, refuse_other_voters

LOCK_WAIT_S: Final = 2.0


class Recovered(msgspec.Struct):
    """What a node knows when it starts."""

    image: LogImage
    snapshot: Snapshot | None
    notes: list[str]
    """What had to be repaired, for the log of the node."""


class Storage:
    """The raft directory of one node, locked against a second process."""

    def __init__(self, directory: Path, wal: Wal, disk: Disk, lock: int) -> None:
        self._directory = directory
        self._wal = wal
        self._disk = disk
        self._lock: int | None = lock

    def perform(self, op: DiskOp) -> None:
        """Makes one operation durable. Raises OSError and may then be called again with the same."""
        match op:
            case AppendRecords():
                self._wal.append(op.records)
            case StoreSnapshot():
                self._store_snapshot(op.snapshot)
            case RewriteLog():
                self._wal.rewrite(op.image)
                # Only now does nothing need the older snapshots: the old log may have begun there.
                self._remove_snapshots_below(op.image)

    def close(self) -> None:
        self._wal.close()
        if self._lock is not None:
            lock, self._lock = self._lock, None
            self._disk.close(lock)

    def _store_snapshot(self, snapshot: Snapshot) -> None:
        path = self._directory / snapshot_name(snapshot.index, snapshot.term)
        write_atomically(self._disk, path, encode_file(snapshot))

    def _remove_snapshots_below(self, image: LogImage) -> None:
        paths = _snapshot_files(self._disk, self._directory)
        for index, _, path in paths[:-1]:
            if index <= image.last_index:
                self._disk.remove(path)


def snapshot_name(index: int, term: int) -> str:
    return f"snapshot-{index:016d}-{term:016d}.snap"


def _snapshot_files(disk: Disk, directory: Path) -> list[tuple[int, int, Path]]:
    """(index, term, path) of each snapshot, oldest first."""
    found = []
    for name in disk.names(directory):
        parts = name.removesuffix(".snap").split("-")
        if name.endswith(".snap") and len(parts) == 3 and parts[0] == "snapshot":
            index, term = parts[1], parts[2]
            if index.isdecimal() and term.isdecimal():
                found.append((int(index), int(term), directory / name))
    return sorted(found)


def open_storage(directory: Path, identity: Identity, disk: Disk) -> tuple[Storage, Recovered]:
    """Opens or creates the raft directory.

    Raises StorageCorrupt where the content cannot be trusted, StorageInUse, OSError as it comes.
    """
    disk.make_directory(directory)
    disk.sync_directory(directory.parent)
    lock = _lock(directory, disk)
    try:
        # A killed process may have renamed a file without syncing the directory: the new name is seen
        # now, yet a loss of power would still undo it, and with it all that is about to be appended.
        disk.sync_directory(directory)
        wal = Wal(directory, identity, disk)
        recovered = _recover(directory, wal, disk)
    except BaseException:
        disk.close(lock)
        raise
    return Storage(directory, wal, disk, lock), recovered


def _lock(directory: Path, disk: Disk) -> int:
    """A killed process that is still in a disk call keeps its lock a moment longer: wait for it."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return disk.lock(directory / "lock")
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise StorageInUse(
                    f"{directory} is in use by another process; "
                    "two nodes must not share a data directory"
                ) from error
            time.sleep(0.05)


def _recover(directory: Path, wal: Wal, disk: Disk) -> Recovered:
    notes: list[str] = []
    for name in disk.names(directory):
        if name.endswith(".snap.tmp"):
            disk.remove(directory / name)
    opened = wal.open()
    snapshot = _newest_snapshot(directory, disk, notes)
    if opened is None:
        if snapshot is not None:
            raise StorageCorrupt(
                f"{directory} has a snapshot but no log: term and vote are lost. Move the whole "
                "directory away; the node then starts empty and catches up before it votes"
            )
        image = blank_image()
        wal.rewrite(image)
        return Recovered(image, None, ["started with an empty log"])
    image, cut_bytes = opened
    if cut_bytes:
        notes.append(f"cut {cut_bytes} bytes of an unfinished write off the end of the log")
    refuse_other_voters(_voters_then(image, snapshot), wal.identity, str(directory))
    joined = join(image, snapshot, str(directory))
    if joined is not image:
        notes.append(f"the log starts anew at snapshot {joined.anchor_index}")
    wal.rewrite(joined)
    return Recovered(joined, snapshot, notes)


def _voters_then(image: LogImage, snapshot: Snapshot | None) -> Iterable[str]:
    """Who voted when the log was written, also where an older version did not keep their names with it."""
    if snapshot is not None:
        return snapshot.voters
    founding = [command for command, index, _ in image.entries if index == FIRST_INDEX + 1]
    return nonces_in(founding[0]) if founding else ()


def join(image: LogImage, snapshot: Snapshot | None, where: str) -> LogImage:
    """The log to start from, given the newest snapshot; `image` itself where it may stay.

    Hazard S2: after a crash between "snapshot stored" and "log rewritten" the log still reaches
    behind the snapshot. Its tail is acknowledged state and is kept where it holds the snapshot's
    (index, term) (Raft, section 7: "retain log entries following it").
    Hazard L6: a log that starts behind the newest snapshot lacks entries; refuse, never guess.
    """
    covered = FIRST_INDEX if snapshot is None else snapshot.index
    if image.anchor_index > covered:
        raise StorageCorrupt(
            f"{where}: the log starts behind entry {image.anchor_index}, but the newest readable "
            f"snapshot ends at entry {covered}; the entries between are gone. Move the whole "
            "directory away; the node then starts empty and catches up before it votes"
        )
    if snapshot is None:
        return image
    position = snapshot.index - image.anchor_index
    if position < len(image.entries) and image.entries[position][2] == snapshot.term:
        return image
    return LogImage(
        entries=[(NO_OP, snapshot.index, snapshot.term)],
        term=max(image.term, snapshot.term),
        vote=image.vote if image.term >= snapshot.term else None,
        proven=image.proven,
        nonce=image.nonce,
    )


def _newest_snapshot(directory: Path, disk: Disk, notes: list[str]) -> Snapshot | None:
    """The newest intact snapshot; `join` refuses later if the log needs a newer one."""
    for index, _, path in reversed(_snapshot_files(disk, directory)):
        try:
            return decode_file(disk.read(path), str(path))
        except StorageCorrupt as error:
            notes.append(f"snapshot {index} is unusable: {error}")
    return None
