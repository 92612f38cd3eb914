"""Writes and commits two checkpoints and, in the second, dies at one point: `python -m tests.runtime.checkpoint.crash_victim`.

Arguments: the store (a directory, or an `s3://` URL), point, `before` or `after`, and at which time that it comes there. What
it commits (in life the log would) it prints, one line of JSON each, and `survived` at its end if it never came to that
point so often.
"""

from __future__ import annotations

import array
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from chaos.under_test.deaths import around
from distroml.model import Checkpoint
from distroml.reports import ShardFact
from distroml.runtime.checkpoint import commit
from distroml.runtime.checkpoint.assembly import Base
from distroml.runtime.checkpoint.manifest import base_for, partition
from distroml.runtime.checkpoint.reader import read_manifest
from distroml.runtime.checkpoint.shard_file import TensorBytes
from distroml.runtime.checkpoint.stores.file import FileStore
from distroml.runtime.checkpoint.stores.interface import CheckpointStore
from distroml.runtime.checkpoint.stores.s3 import S3Store
from distroml.runtime.checkpoint.stores.s3_upload import Upload
from distroml.store_urls import StoreSettings, parse_store
from tests.runtime.checkpoint.object_server import SMALL_PART_BYTES, WITH_PART_BYTES
from tests.runtime.checkpoint.shards import CURSOR, JOB, RUN, writer

FILE_POINTS: dict[str, tuple[Any, str]] = {
    "write": (os, "pwrite"),
    "sync": (os, "fsync"),
    "link": (os, "link"),
    "remove temporary": (os, "unlink"),
    "manifest put": (FileStore, "put_if_absent"),
    "latest": (FileStore, "put_latest"),
}
"""Calls that the code itself makes; `snapshot` and `report` are made here."""
S3_POINTS: dict[str, tuple[Any, str]] = {
    "begin": (Upload, "_begin"),
    "part": (Upload, "_send_part"),
    "complete": (Upload, "_complete"),
    "object put": (S3Store, "_create"),
    "manifest put": (S3Store, "put_if_absent"),
    "latest": (S3Store, "put_latest"),
}
RANKS = 2
VALUES = 100_000
S3_VALUES = 1_400_000
"""Of each tensor: more than one part."""


class Death:
    """Comes the n-th time that a point is reached."""

    def __init__(self, point: str, moment: str, number: int) -> None:
        self._point, self._moment, self._left = point, moment, number
        self.armed = False

    def at(self, point: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def passing(after: bool, _: object) -> None:
            if self.armed and point == self._point and after == (self._moment == "after"):
                self._left -= 1
                if self._left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return around(work, passing)


def opened(where: str) -> CheckpointStore:
    """The store that is asked for."""
    if where.startswith("s3://"):
        return S3Store(parse_store(where, "store"), StoreSettings())
    return FileStore(where)


def state_of(step: int, values: int = VALUES) -> list[TensorBytes]:
    """One tensor that changes with each step and one that never does, for each rank."""
    return [
        TensorBytes(
            name, "F32", (values,), memoryview(array.array("f", [value] * values)).cast("B")
        )
        for name, value in (("a", step), ("b", 1), ("c", step + 1), ("d", 2))
    ]


def save(store: CheckpointStore, step: int, death: Death, base: Base) -> list[ShardFact]:
    facts: list[ShardFact] = []
    values = VALUES if isinstance(store, FileStore) else S3_VALUES
    state = {t.name: t for t in state_of(step, values)}
    sizes = {name: t.size_bytes for name, t in state.items()}
    for rank, names in enumerate(partition(sizes, RANKS)):
        made, durable, abandoned = writer(store, rank, RANKS, base=base)
        buffer = made.buffer(sum(sizes[name] for name in names))

        def snapshot(names: list[str] = names, buffer: memoryview = buffer) -> list[TensorBytes]:
            copies, at = [], 0
            for name in names:
                place = buffer[at : at + sizes[name]]
                place[:] = state[name].data
                copies.append(msgspec.structs.replace(state[name], data=place))
                at += sizes[name]
            return copies

        copies = death.at("snapshot", snapshot)()
        made.write(step, CURSOR, copies, {"lr": 0.1} if rank == 0 else None)
        made.wait()
        assert not abandoned, abandoned
        death.at("report", facts.extend)(durable)
    return facts


def committed(store: CheckpointStore, step: int, facts: list[ShardFact]) -> Checkpoint:
    checkpoint = commit.write_manifest(
        store, job_id=JOB, run_id=RUN, generation=1, shards=facts, committed_at=0.0
    )
    print(msgspec.json.encode(checkpoint).decode(), flush=True)
    commit.publish_latest(store, checkpoint)
    return checkpoint


def main(where: str, point: str, moment: str, number: str) -> None:
    death = Death(point, moment, int(number))
    store = opened(where)
    for name, (owner, call) in (FILE_POINTS if isinstance(store, FileStore) else S3_POINTS).items():
        setattr(owner, call, death.at(name, getattr(owner, call)))
    for module in WITH_PART_BYTES:
        setattr(module, "PART_BYTES", SMALL_PART_BYTES)  # noqa: B010
    first = committed(store, 100, save(store, 100, death, {}))
    base = base_for(JOB, RUN, 200, first, read_manifest(store, first))
    death.armed = True
    committed(store, 200, save(store, 200, death, base))
    print("survived", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
