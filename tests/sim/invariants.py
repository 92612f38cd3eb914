"""What must hold of a cluster, checked after every turn of every node.

The checker sees what no node sees: all of them at once, and all their lives. It keeps one note per (index, term)
and per committed index, and looks only at what a turn has changed, so a check costs little however long the log is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distroml.commands import Entry, Outcome, SubmitJob
from distroml.consensus.library_fields import LEADER
from distroml.consensus.messages import NO_OP, AppendReply, Message, RequestVote, VoteGranted
from distroml.consensus.raft_core import Turn
from distroml.consensus.raft_log import AppendRecords, EntryRecord, LogImage, TruncateRecord

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.process import Process


class _Promise:
    """What a node held when it last spoke; whatever happens to its process or host, it must hold that again."""

    __slots__ = ("last", "last_term", "term", "vote")

    def __init__(self, term: int, vote: str | None, last: int, last_term: int | None) -> None:
        self.term, self.vote, self.last, self.last_term = term, vote, last, last_term


class _Seen:
    """What was last seen of one process."""

    __slots__ = (
        "acknowledged",
        "applied",
        "commit",
        "facts",
        "led",
        "promise",
        "restored",
        "snapshot",
        "term",
    )

    def __init__(self, process: Process) -> None:
        raft, log = process.core.raft, process.log
        self.term, self.commit = raft.term, raft.commit_index
        self.applied = raft.applied_index
        self.restored = 0
        self.led = 0
        self.snapshot: Any = None
        self.facts: tuple[int, ...] = ()
        self.acknowledged = (0, 0)
        """(term, index): up to there its log was said to equal that of the term's leader."""
        self.promise = _Promise(raft.term, raft.voted_for, log.last_index, log.last_term)


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
        self.promises: dict[str, _Promise] = {}
        self.lost: dict[str, _Promise | None] = {}
        """Voters whose directory was lost and that were not seen proven since, with what they had promised before."""
        self.snapshots: dict[int, bytes] = {}
        self.floor = 0
        """Index that every later linearizable read must cover."""
        self.highest = 1
        """The highest index that any node has seen committed."""
        self.turns = 0
        self.counts = {"elections": 0, "snapshots taken": 0, "snapshots installed": 0}

    # ------------------------------------------------------------------ lives

    def started(self, process: Process) -> None:
        process.seen = _Seen(process)
        promise, found, name = self.promises.get(process.name), process.seen.promise, process.name
        if promise is None:
            return
        if found.term < promise.term:
            self._fail(f"{name} forgot term {promise.term}: it is back at {found.term}")
        if found.term == promise.term and promise.vote not in (None, found.vote):
            self._fail(f"{name} forgot its vote for {promise.vote} in term {promise.term}")
        last_term = process.log.term_at(promise.last)
        covered = promise.last <= process.log.anchor_index
        if not covered and (last_term is None or promise.last_term not in (None, last_term)):
            self._fail(
                f"{name} forgot entry {promise.last}/{promise.last_term}, which it had when it last "
                f"spoke: its log ends at {found.last}/{found.last_term}"
            )

    def given(self, name: str, image: LogImage) -> None:
        """The node's disk holds this before its first life."""
        self.promises[name] = _Promise(image.term, image.vote, image.last_index, image.last_term)
        if image.vote is not None:
            self.votes[name, image.term] = image.vote

    def died(self, process: Process) -> None:
        process.seen = None

    def wiped(self, name: str) -> None:
        lost, earlier = self.promises.pop(name, None), self.lost.get(name)
        # Lost again before it was proven: whatever it said in between did not count.
        self.lost[name] = earlier if name in self.lost else lost
        for key in [key for key in self.votes if key[0] == name]:
            del self.votes[key]

    # ------------------------------------------------------------------ what a process does

    def speaks(self, process: Process) -> None:
        """A message of the last turn leaves: all that the process held by then must be durable."""
        seen = process.seen
        if seen is not None:
            self.promises[process.name] = seen.promise

    def tells(self, process: Process, peer: str, message: Message) -> None:
        """A message leaves that spends a vote or acknowledges entries."""
        match message:
            case AppendReply(term=term, accepted=accepted, next_index=index):
                if accepted and process.seen is not None:
                    process.seen.acknowledged = max(process.seen.acknowledged, (term, index - 1))
            case RequestVote(term=term):
                self._votes(process, term, process.name)
            case VoteGranted(term=term):
                self._votes(process, term, peer)

    def _votes(self, process: Process, term: int, candidate: str) -> None:
        known = self.votes.setdefault((process.name, term), candidate)
        if known != candidate:
            self._fail(f"{process.name} voted in term {term} for {known} and for {candidate}")
        if process.learns:
            self._fail(f"{process.name} is a learner and voted in term {term} for {candidate}")

    def after_turn(self, process: Process, turn: Turn) -> None:
        self.turns += 1
        raft, seen, log = process.core.raft, process.seen, process.log
        term, role, commit, last = raft.term, raft.role, raft.commit_index, log.last_index
        if log.proven:
            self.lost.pop(process.name, None)
        facts = (term, role, commit, raft.applied_index, last)
        self._world.note(process.life, term * 4 + role, commit + (last << 24))
        if facts == seen.facts and not turn.disk:
            return
        seen.facts = facts
        leads = role == LEADER
        if turn.disk:
            self._check_disk(process, turn, leads and seen.led == term)
            seen.promise = _Promise(term, raft.voted_for, last, log.last_term)
        if term < seen.term:
            self._fail(f"{process.name}: term went back from {seen.term} to {term}")
        seen.term = term
        if leads and commit > seen.commit:
            self._check_majority(process, commit)
        self._check_commit(process, seen)
        if raft.applied_index > commit or commit > last:
            self._fail(
                f"{process.name}: applied {raft.applied_index} <= committed {commit} <= "
                f"log end {last} does not hold"
            )
        if leads and seen.led != term:
            seen.led = term
            self._check_leader(process)

    def _check_disk(self, process: Process, turn: Turn, leading: bool) -> None:
        log = process.log
        for op in turn.disk:
            if not isinstance(op, AppendRecords):
                snapshot = process.core.raft.snapshot
                self._may_forget(process.name, log.last_index)
                if snapshot is not None and snapshot is not process.seen.snapshot:
                    process.seen.snapshot = snapshot
                    self._check_snapshot(process, snapshot)
                continue
            for record in op.records:
                if isinstance(record, EntryRecord):
                    if log.term_at(record.index) == record.term:
                        self._check_entry(process, record, log.term_at(record.index - 1))
                elif isinstance(record, TruncateRecord):
                    self._may_forget(process.name, record.first_removed - 1)
                    term, index = process.seen.acknowledged
                    if term == process.core.raft.term and record.first_removed <= index:
                        self._fail(
                            f"{process.name} takes entry {record.first_removed} back, which it has "
                            f"acknowledged in this very term {term}"
                        )
                    if leading:
                        self._fail(f"{process.name} leads and truncated its own log")

    def _may_forget(self, name: str, last: int) -> None:
        """The log is being cut behind `last`, which may be durable before the node speaks again."""
        promise = self.promises.get(name)
        if promise is not None and last < promise.last:
            self.promises[name] = _Promise(promise.term, promise.vote, last, None)

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
        self.highest = max(self.highest, commit)

    def _check_majority(self, leader: Process, commit: int) -> None:
        """What a leader counts as committed is on the disks of a majority, or was before one was lost. A voter that
        lost its directory is no part of it until it is proven, but for what it acknowledged before."""
        cluster, term = self._cluster, leader.log.term_at(commit)
        holders = 0
        for name in cluster.voters:
            process, promise = cluster.processes.get(name), self.promises.get(name)
            if name in self.lost:
                lost = self.lost[name]
                holders += lost is not None and lost.last >= commit
            elif process is not None and process.started:
                log = process.log
                holders += log.anchor_index >= commit or log.term_at(commit) == term
            else:
                holders += promise is not None and promise.last >= commit
        if holders <= len(cluster.voters) // 2:
            self._fail(
                f"{leader.name} counts entry {commit}/{term} as committed, which {holders} of "
                f"{len(cluster.voters)} voters hold"
            )

    def _check_leader(self, process: Process) -> None:
        raft, log = process.core.raft, process.log
        self.counts["elections"] += 1
        if process.learns:
            self._fail(f"{process.name} is a learner and leads term {raft.term}")
        if self.leaders.setdefault(raft.term, process.name) != process.name:
            self._fail(
                f"two leaders of term {raft.term}: {self.leaders[raft.term]}, {process.name}"
            )
        entries, anchor = log.entries, log.anchor_index
        for index in range(anchor + 1, self.highest + 1):
            known = self.committed.get(index)
            if known is None or known[2] >= raft.term:
                continue
            command, term, seen_in = known
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
