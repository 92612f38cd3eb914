"""What must hold of a cluster, checked after every turn of every node.

The checker sees what no node sees: all of them at once, and all their lives. It keeps one note per (index, term)
and per committed index, so a check costs little however long the log is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distroml.commands import Entry, Outcome, SubmitJob
from distroml.consensus.messages import NO_OP
from distroml.consensus.raft_core import Turn
from distroml.consensus.raft_log import AppendRecords, EntryRecord, TruncateRecord
from distroml.consensus.raft_types import Role

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.process import Process


class _Seen:
    """What was last seen of one process."""

    __slots__ = ("applied", "commit", "led", "restored", "snapshot", "term")

    def __init__(self, process: Process) -> None:
        raft = process.core.raft
        self.term, self.commit = raft.term, raft.commit_index
        self.applied = raft.applied_index
        self.restored = 0
        self.led = 0
        self.snapshot: Any = None


class Checker:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self.entries: dict[tuple[int, int], tuple[bytes, int | None]] = {}
        """(index, term) → (command, term of the entry before)."""
        self.committed: dict[int, tuple[bytes, int, int]] = {}
        """index → (command, term, term in which it was first seen committed)."""
        self.applied: dict[int, bytes] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.effects: dict[tuple[str, int, int], int] = {}
        """(proposer, incarnation, sequence) → the one index at which it had its effect."""
        self.keyed: dict[str, int] = {}
        """Idempotency key → the one index at which its job was made."""
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[str, int], str] = {}
        self.terms: dict[str, int] = {}
        """Highest term in which each node has spent a vote: it must remember it for ever."""
        self.snapshots: dict[int, bytes] = {}
        self.floor = 0
        """Index that every later linearizable read must cover."""
        self.counts = {"elections": 0, "snapshots taken": 0, "snapshots installed": 0, "turns": 0}

    # ------------------------------------------------------------------ lives

    def started(self, process: Process) -> None:
        process.seen = _Seen(process)
        spent = self.terms.get(process.name, 0)
        if process.seen.term < spent:
            self._fail(
                f"{process.name} forgot term {spent} in which it voted: it is back at "
                f"{process.seen.term}"
            )

    def died(self, process: Process) -> None:
        process.seen = None

    def wiped(self, name: str) -> None:
        self.terms.pop(name, None)
        for key in [key for key in self.votes if key[0] == name]:
            del self.votes[key]

    # ------------------------------------------------------------------ what a process does

    def voted(self, process: Process, term: int, candidate: str) -> None:
        known = self.votes.setdefault((process.name, term), candidate)
        if known != candidate:
            self._fail(f"{process.name} voted in term {term} for {known} and for {candidate}")
        self.terms[process.name] = max(self.terms.get(process.name, 0), term)

    def after_turn(self, process: Process, turn: Turn) -> None:
        self.counts["turns"] += 1
        raft, seen, log = process.core.raft, process.seen, process.log
        leads = process.core.role is Role.LEADER
        if turn.disk:
            self._check_disk(process, turn, leads and seen.led == raft.term)
        if raft.term < seen.term:
            self._fail(f"{process.name}: term went back from {seen.term} to {raft.term}")
        seen.term = raft.term
        self._check_commit(process, seen)
        commit = raft.commit_index
        if raft.applied_index > commit or commit > log.last_index:
            self._fail(
                f"{process.name}: applied {raft.applied_index} <= committed {commit} <= "
                f"log end {log.last_index} does not hold"
            )
        if leads and seen.led != raft.term:
            seen.led = raft.term
            self._check_leader(process)
        self._world.note(process.life, raft.term * 4 + raft.role, commit + (log.last_index << 24))

    def _check_disk(self, process: Process, turn: Turn, leading: bool) -> None:
        log = process.log
        for op in turn.disk:
            if not isinstance(op, AppendRecords):
                snapshot = process.core.raft.snapshot
                if snapshot is not None and snapshot is not process.seen.snapshot:
                    process.seen.snapshot = snapshot
                    self._check_snapshot(process, snapshot)
                continue
            for record in op.records:
                if isinstance(record, EntryRecord):
                    if log.term_at(record.index) == record.term:
                        self._check_entry(process, record, log.term_at(record.index - 1))
                elif isinstance(record, TruncateRecord) and leading:
                    self._fail(f"{process.name} leads and truncated its own log")

    def _check_entry(self, process: Process, record: EntryRecord, previous: int | None) -> None:
        key, value = (record.index, record.term), (record.command, previous)
        known = self.entries.setdefault(key, value)
        if known[0] != value[0] or (previous is not None and known[1] not in (None, previous)):
            self._fail(f"log matching: {process.name} at {record.index}/{record.term}")

    def _check_snapshot(self, process: Process, snapshot: Any) -> None:
        """Replicas are deterministic, so snapshots of one index have the same bytes everywhere."""
        taken = snapshot.index != process.seen.restored
        self.counts["snapshots taken" if taken else "snapshots installed"] += 1
        known = self.snapshots.setdefault(snapshot.index, snapshot.sha256)
        if known != snapshot.sha256:
            self._fail(f"{process.name}: its snapshot of {snapshot.index} differs from another's")

    def _check_commit(self, process: Process, seen: _Seen) -> None:
        raft, log = process.core.raft, process.log
        commit = raft.commit_index
        if commit == seen.commit:
            return
        if commit < seen.commit:
            self._fail(f"{process.name}: commit went back from {seen.commit} to {commit}")
        entries, anchor, term_now = log.entries, log.anchor_index, raft.term
        last = anchor + len(entries) - 1
        for index in range(max(seen.commit, anchor) + 1, min(commit, last) + 1):
            command, _, term = entries[index - anchor]
            known = self.committed.setdefault(index, (command, term, term_now))
            if known[1] != term or known[0] != command:
                self._fail(
                    f"state machine safety: {process.name} committed {index}/{term}, "
                    f"another had committed {index}/{known[1]}"
                )
        seen.commit = commit

    def _check_leader(self, process: Process) -> None:
        raft, log = process.core.raft, process.log
        self.counts["elections"] += 1
        if self.leaders.setdefault(raft.term, process.name) != process.name:
            self._fail(
                f"two leaders of term {raft.term}: {self.leaders[raft.term]}, {process.name}"
            )
        entries, anchor = log.entries, log.anchor_index
        for index, (command, term, seen_in) in self.committed.items():
            if seen_in >= raft.term or index <= anchor:
                continue
            place = index - anchor
            if place >= len(entries) or entries[place][2] != term or entries[place][0] != command:
                self._fail(
                    f"leader completeness: {process.name} leads term {raft.term} without "
                    f"entry {index}/{term}, committed in term {seen_in}"
                )
                return

    # ------------------------------------------------------------------ what a replica does

    def before_apply(self, process: Process, index: int, data: bytes) -> None:
        seen = process.seen
        known = self.applied.setdefault(index, data)
        if known != data:
            self._fail(f"state machine safety: {process.name} applies another entry at {index}")
        if seen is None:
            return
        self._check_commit(process, seen)  # now: this very turn may trim the entry from the log
        restored = max(seen.applied, process.replica.state.index)
        if index <= restored:
            self._fail(f"{process.name} applies {index} again after {restored}")
        for skipped in range(restored + 1, index):
            entry = self.committed.get(skipped)
            if entry is not None and entry[0][:1] != NO_OP:
                self._fail(f"{process.name} skipped entry {skipped} before {index}")
        seen.applied = index

    def heard(self, process: Process, entry: Entry | None, outcome: Outcome) -> None:
        """After an entry was applied, or (without entry) a snapshot restored."""
        index = process.replica.state.index
        if entry is None:
            if process.seen is not None:
                process.seen.applied = max(process.seen.applied, outcome.index)
                process.seen.restored = outcome.index
            return
        known = self.outcomes.get(index)
        if known is not None:
            if known != outcome:
                self._fail(f"{process.name}: another outcome at {index}: {outcome} != {known}")
            return
        self.outcomes[index] = outcome
        if outcome.index != index or outcome.error == "stale-proposer":
            return  # a repeat, answered from what is remembered
        name = (entry.proposer, entry.incarnation, entry.sequence)
        if self.effects.setdefault(name, index) != index:
            self._fail(f"proposal {name} took effect at {self.effects[name]} and at {index}")
        command = entry.command
        if not isinstance(command, SubmitJob) or not command.key:
            return
        if outcome.error or outcome.replayed:
            return
        first = self.keyed.setdefault(command.key, index)
        if first != index:
            self._fail(f"key {command.key} made a job at {first} and at {index}")

    # ------------------------------------------------------------------ clients

    def acknowledged(self, process: Process, outcome: Outcome) -> None:
        """A write was answered: what it answered must have happened, and stays."""
        if outcome.index not in self.committed and outcome.index > process.log.anchor_index:
            self._fail(f"{process.name} acknowledged {outcome.index}, which nobody committed")
        self.floor = max(self.floor, outcome.index)

    def read(self, process: Process, index: int, floor: int) -> None:
        """A linearizable read that began when everything up to `floor` was known was answered."""
        state = process.replica.state
        if index < floor:
            self._fail(f"stale read on {process.name}: index {index}, known before: {floor}")
        if state.index < floor:
            self._fail(f"stale read on {process.name}: state {state.index}, known before: {floor}")
        self.floor = max(self.floor, state.index)

    # ------------------------------------------------------------------ the end of a run

    def check_converged(self) -> None:
        """All nodes are up, agree in every byte, and have what was acknowledged."""
        cluster = self._cluster
        digests = cluster.digests()
        if len(digests) < len(cluster.names) or len(set(digests.values())) != 1:
            self._fail(f"states differ after all faults ended: {cluster.describe()}")
        for name, process in cluster.processes.items():
            if process.replica.state.index < self.floor:
                self._fail(f"{name} lacks acknowledged entry {self.floor}")
            if process.core.raft.apply_failures:
                self._fail(f"{name}: an entry raised in apply")

    def _fail(self, what: str) -> None:
        self._world.violate(what)
