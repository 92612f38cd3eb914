"""The follower's side of replication: appends, snapshots, and what is acknowledged.

Replaces the library's handling of `append_entries`. Nothing is acknowledged or committed that the
very message at hand has not verified against the leader's log.
"""

from __future__ import annotations

import logging
from typing import Any

from distroml.consensus.library_fields import FOLLOWER, LEADER, LibraryFields
from distroml.consensus.messages import Append, AppendReply, SnapshotChunk, SnapshotReply
from distroml.consensus.proofs import nonces_in
from distroml.consensus.raft_types import SafetyViolation
from distroml.consensus.snapshot import IncomingSnapshot, Snapshot

logger = logging.getLogger(__name__)


class Following(LibraryFields):
    """Mixed into `hardening.HardenedRaft`."""

    heard_leader_at: float
    pre_vote_term: int | None
    incoming: IncomingSnapshot
    compact_from: int
    """Applied index at the last snapshot, taken or received or tried."""

    def _follow(self, node: Any, term: int) -> None:
        """A legitimate leader spoke."""
        if term > self.term:
            self.adopt_term(term, None)
        elif self.role == LEADER:
            raise SafetyViolation(f"{node.id} and this node both lead term {term}")
        self.set_role(FOLLOWER)
        self.leader_node = node
        self.pre_vote_term = None
        self.heard_leader_at = self.now
        self.election_deadline = self.now + self.election_timeout_s()

    def answer_to_heartbeat(self, node: Any, message: Append) -> AppendReply | None:
        """What to answer to an append that would change nothing here; None where it might."""
        log = self.log
        nothing_new = (
            not message.entries
            and message.term == self.term
            and node is self.leader_node
            and self.role == FOLLOWER
            and min(message.commit_index, message.prev_index) <= self.commit_index
            and (log.proven or self.learner)
            and message.prev_index >= log.anchor_index
            and log.term_at(message.prev_index) == message.prev_term
        )
        if not nothing_new:
            return None
        self._follow(node, message.term)
        return AppendReply(message.term, True, message.prev_index + 1)

    def on_append(self, node: Any, message: Append) -> None:
        # Hazard S6: the library truncates behind the previous entry even where the new entries match,
        # and commits up to its own log end. Here only a real conflict truncates, and nothing beyond
        # the last entry that this very message verified is acknowledged or committed (Raft, 5.3).
        if message.term < self.term:
            self._answer(node, False, self.log.last_index + 1)
            return
        self._follow(node, message.term)
        log, anchor = self.log, self.log.anchor_index
        entries = message.entries
        verified = message.prev_index
        if verified < anchor:
            # All up to the anchor is committed, hence equal to what the leader has there.
            entries = entries[anchor - verified :]
            verified = anchor
        elif log.term_at(verified) != message.prev_term:
            self._answer(node, False, self._conflict_hint(verified))
            return
        for command, index, term in entries:
            known = log.term_at(index)
            if known is not None and known != term:
                if index <= self.commit_index:
                    raise SafetyViolation(f"leader {node.id} contradicts committed entry {index}")
                log.truncate_from(index)
                known = None
            if known is None:
                log.append(command, index, term)
            verified = index
        self.commit_index = max(self.commit_index, min(message.commit_index, verified))
        if self.unproven and self._shown_proven(message):
            log.set_proven()
        self._answer(node, True, verified + 1)

    def _answer(self, node: Any, accepted: bool, next_index: int) -> None:
        self.emit(node, AppendReply(self.term, accepted, next_index, self.unproven))

    def _shown_proven(self, message: Append) -> bool:
        """Whether the log holds a proof of this very directory (`proofs` says why these two prove)."""
        log, commit = self.log, message.commit_index
        if self.founder_nonce(self.name) == log.nonce:
            return True
        if log.term_at(commit) != message.term:
            return False  # else the leader itself sent that entry, and compared all below it
        committed = log.entries[1 : commit - log.anchor_index + 1]
        return any(nonces_in(entry[0]).get(self.name) == log.nonce for entry in committed)

    def _conflict_hint(self, previous: int) -> int:
        """Hazard L3: skips the whole conflicting term instead of one entry per round trip."""
        log = self.log
        if previous > log.last_index:
            return log.last_index + 1
        term, first = log.term_at(previous), previous
        lowest = max(log.anchor_index, self.commit_index) + 1
        while first > lowest and log.term_at(first - 1) == term:
            first -= 1
        return first

    def on_snapshot_chunk(self, node: Any, chunk: SnapshotChunk) -> None:
        # Hazards S1, S9: a chunk never moves the commit index; only a whole, verified snapshot that is
        # ahead of us replaces state, and only then is it acknowledged.
        if chunk.term < self.term:
            self._answer(node, False, self.log.last_index + 1)
            return
        self._follow(node, chunk.term)
        if chunk.index <= self.commit_index:
            self.incoming.discard()
            self._answer(node, True, self.commit_index + 1)
            return
        snapshot = self.incoming.receive(chunk, list(self.voters))
        if snapshot is None or not self._install(snapshot):
            offset = self.incoming.next_offset
            reply = SnapshotReply(self.term, chunk.index, chunk.sha256, offset, self.unproven)
            self.emit(node, reply)
            return
        self._answer(node, True, snapshot.index + 1)

    def _install(self, snapshot: Snapshot) -> bool:
        try:
            self.machine.restore(snapshot.index, snapshot.blob)
        except Exception:
            self.refused += 1
            logger.exception("snapshot %d does not fit this state machine", snapshot.index)
            return False
        self.snapshot = snapshot
        if self.log.term_at(snapshot.index) == snapshot.term:
            self.log.compact(snapshot, snapshot.index)
        else:
            self.log.reset_to(snapshot)
        self.applied_index = self.commit_index = self.compact_from = snapshot.index
        return True
