"""A node's disk as its operations leave it: each is performed whole or not at all."""

from __future__ import annotations

from distroml.consensus.raft_log import (
    AppendRecords,
    DiskOp,
    LogImage,
    RewriteLog,
    StoreSnapshot,
    apply_record,
    blank_image,
)
from distroml.consensus.snapshot import Snapshot
from distroml.consensus.storage import Recovered, join


class Disk:
    """Outlives the lives of its node."""

    def __init__(self) -> None:
        self.image: LogImage | None = None
        self.snapshot: Snapshot | None = None

    def perform(self, op: DiskOp) -> None:
        match op:
            case AppendRecords():
                assert self.image is not None
                for record in op.records:
                    apply_record(self.image, record)
            case StoreSnapshot():
                self.snapshot = op.snapshot
            case RewriteLog():
                self.image = op.image.copy()

    def recover(self) -> Recovered:
        if self.image is None:
            self.image = blank_image()
        self.image = join(self.image, self.snapshot, "disk").copy()
        return Recovered(self.image.copy(), self.snapshot, [])
