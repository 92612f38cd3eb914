"""The leader's side of replication: what each follower is sent, and what its answers mean.

Replaces the library's `__sendAppendEntries` and its handling of `next_node_idx`. A follower is in
one of three modes, as in etcd's design: *probe* (its log end is unknown: one message at a time),
*stream* (pipelined entries) and *snapshot* (it needs entries that the log no longer holds).
"""

from __future__ import annotations

from typing import Any

from distroml.consensus.library_fields import LEADER, LibraryFields
from distroml.consensus.messages import Append, AppendReply, SnapshotReply
from distroml.consensus.proofs import PROOF_PAUSE_S, proof
from distroml.consensus.raft_log import FIRST_INDEX
from distroml.consensus.snapshot import OutgoingSnapshot

_MESSAGES_PER_ROUND = 8
"""Append messages to one follower in one turn, at most."""


class Progress:
    """What the leader knows of one follower beyond the library's next and match index."""

    __slots__ = (
        "match",
        "probe_in_flight",
        "probing",
        "proof_at",
        "proof_index",
        "sent_commit",
        "transfer",
        "unproven",
    )

    def __init__(self) -> None:
        self.match = 0
        """The follower's log equals ours up to there. The library's own match index, by which it commits, stays 0
        while the follower is not proven."""
        self.probing = True
        self.probe_in_flight = False
        self.sent_commit = 0
        self.transfer: OutgoingSnapshot | None = None
        self.unproven = 0
        """The nonce that a voter with an unproven directory gave last, else 0."""
        self.proof_index = 0
        """Where the newest proof of that nonce is; 0 where there is none."""
        self.proof_at = float("-inf")

    def lose_contact(self, now: float) -> None:
        self.match = 0
        self.probing = True
        self.probe_in_flight = False
        self.sent_commit = 0
        if self.transfer is not None:
            self.transfer.rewind(now)


class Replication(LibraryFields):
    """Overrides of the library's leader side; mixed into `hardening.HardenedRaft`."""

    progress: dict[Any, Progress]
    send_needed: bool
    appends: dict[tuple[int, int], Append]
    """Messages of this round by (first index, limit): followers in step share them, encoded once."""

    def reset_progress(self) -> None:
        self.progress = {node: Progress() for node in self.followers_in_order()}

    def lost_contact(self, node: Any) -> None:
        """Whatever was in flight to `node` may be gone; find out anew where its log ends.

        What it had acknowledged is forgotten too: it may come back with an emptied directory, and
        `next_index` never falls below what is known to match. Knowing less is always safe.
        """
        if node in self.progress:
            self.progress[node].lose_contact(self.now)
            self.match_index[node] = 0

    # Hazards P1, P5, L3, S9. The library loops over a clock here, spins while a dump is being
    # written (P1), compares pickled with unpickled lengths (P5), sends snapshots without any name or
    # offset (S9), and waits for the next heartbeat after a rejection (L3).
    def _SyncObj__sendAppendEntries(self) -> None:  # noqa: N802
        due = self.now >= self.heartbeat_at
        if due:
            self.heartbeat_at = self.now + self.settings.heartbeat_s
        self.send_needed = False
        self.appends.clear()
        for node in self.followers_in_order():
            if node in self.connected:
                self._send_to(node, due)

    def _send_to(self, node: Any, due: bool) -> None:
        progress = self.progress[node]
        if self.next_index[node] <= self.log.anchor_index:
            self._send_snapshot(node, progress, due)
        elif progress.probing:
            if due or not progress.probe_in_flight:
                progress.probe_in_flight = True
                self._send_append(node, progress)
        else:
            self._stream(node, progress, due)

    def _stream(self, node: Any, progress: Progress, due: bool) -> None:
        sent = 0
        while sent < _MESSAGES_PER_ROUND and self.next_index[node] <= self.log.last_index:
            in_flight = self.next_index[node] - 1 - progress.match
            if in_flight >= self.settings.inflight_entries:
                break
            self.next_index[node] = self._send_append(node, progress)
            sent += 1
        if self.next_index[node] <= self.log.last_index:
            self.send_needed = sent == _MESSAGES_PER_ROUND
        if sent == 0 and (due or progress.sent_commit < self.commit_index):
            self._send_append(node, progress, limit_entries=0)

    def _send_append(self, node: Any, progress: Progress, limit_entries: int | None = None) -> int:
        """Sends entries from `next_index` on; returns the index behind the last one sent."""
        settings, first = self.settings, self.next_index[node]
        limit = settings.inflight_entries if limit_entries is None else limit_entries
        append = self.appends.get((first, limit))
        if append is None:
            entries = self.log.slice(first, settings.append_batch_bytes, limit) if limit else []
            previous_term = self.log.term_at(first - 1)
            assert previous_term is not None, "next_index is above the anchor"
            append = Append(self.term, first - 1, previous_term, self.commit_index, entries)
            self.appends[first, limit] = append
        progress.sent_commit = self.commit_index
        self.emit(node, append)
        return first + len(append.entries)

    def _send_snapshot(self, node: Any, progress: Progress, due: bool) -> None:
        assert self.snapshot is not None, "a log that starts late has a snapshot"
        transfer = progress.transfer
        if transfer is None or transfer.snapshot.index < self.log.anchor_index:
            transfer = progress.transfer = OutgoingSnapshot(
                self.snapshot,
                self.settings.snapshot_chunk_bytes,
                self.settings.snapshot_window_chunks,
                self.now,
            )
        transfer.rewind_if_stalled(self.now)
        sent = False
        while (chunk := transfer.next_chunk(self.term)) is not None:
            self.emit(node, chunk)
            sent = True
        if due and not sent:
            self.emit(node, transfer.keepalive(self.term))

    def needed_after_transfers(self) -> int | None:
        """The lowest snapshot index under way: its receiver needs the entries behind it.

        Without this a leader that compacts faster than a snapshot arrives would start the transfer
        anew with each snapshot, for ever.
        """
        if self.role != LEADER:
            return None
        transfers = [p.transfer for p in self.progress.values() if p.transfer is not None]
        return min((t.snapshot.index for t in transfers if t.progressing(self.now)), default=None)

    def hears_nothing_new(self, node: Any, reply: AppendReply) -> bool:
        """Notes that `node` is alive, and tells whether its acknowledgement says nothing else."""
        nothing_new = (
            reply.accepted
            and reply.term == self.term
            and self.role == LEADER
            and not self.progress[node].probing
            and reply.unproven == self.progress[node].unproven == 0
            and reply.next_index - 1 <= self.progress[node].match
            and self.next_index[node] > self.log.last_index
        )
        if nothing_new:
            self.last_response_at[node] = self.now
        return nothing_new

    def _answers_this_term(self, node: Any, reply: AppendReply | SnapshotReply) -> bool:
        # Hazard S7: an acknowledgement counts only in the term it was given in (Raft, section 5.3).
        term = reply.term
        if term > self.term:
            self.step_down(term)
            return False
        if term != self.term or self.role != LEADER:
            return False
        self._note_directory(node, reply.unproven)
        if not self.progress[node].unproven:
            self.last_response_at[node] = self.now  # others are no part of a leader's quorum
        return True

    def _note_directory(self, node: Any, nonce: int) -> None:
        progress = self.progress[node]
        if node not in self.peers or nonce == progress.unproven:
            return
        # Another directory than before, or one whose word now counts: only what it says from here on does.
        progress.unproven = nonce
        progress.match = self.match_index[node] = 0
        founder = nonce and nonce == self.founder_nonce(node.id)
        progress.proof_index = FIRST_INDEX + 1 if founder else 0

    def _prove(self, node: Any) -> None:
        """Appends a proof of an unproven voter: one, and another only where it has passed that without seeing it
        committed, as when the proof came inside a snapshot."""
        progress = self.progress[node]
        seen = min(progress.match, self.commit_index) >= progress.proof_index
        if progress.unproven and seen and self.now >= progress.proof_at + PROOF_PAUSE_S:
            progress.proof_index = self.log.last_index + 1
            progress.proof_at = self.now
            self.log.append(proof({node.id: progress.unproven}), progress.proof_index, self.term)
            self.send_needed = True

    def on_append_reply(self, node: Any, reply: AppendReply) -> None:
        if not self._answers_this_term(node, reply):
            return
        progress = self.progress[node]
        self._prove(node)
        if not reply.accepted:
            # Hazards L1, L3: the hint only ever lowers next_index, never below what is known to
            # match, and the follower is probed at once instead of at the next heartbeat.
            hinted = min(reply.next_index, self.next_index[node])
            self.next_index[node] = max(hinted, progress.match + 1, FIRST_INDEX + 1)
            progress.probing, progress.probe_in_flight = True, False
            self.send_needed = True
            return
        if reply.next_index > self.log.last_index + 1:
            return  # hazard S7: nobody may speak of entries beyond this log
        progress.match = max(progress.match, reply.next_index - 1)
        # Who may have forgotten what it acknowledged does not count (`proofs`).
        self.match_index[node] = 0 if progress.unproven else progress.match
        self.next_index[node] = max(self.next_index[node], progress.match + 1)
        if progress.probing or self.next_index[node] <= self.log.last_index:
            self.send_needed = True
        progress.probing = False
        if self.next_index[node] > self.log.anchor_index:
            progress.transfer = None

    def on_snapshot_reply(self, node: Any, reply: SnapshotReply) -> None:
        if not self._answers_this_term(node, reply):
            return
        self._prove(node)
        transfer = self.progress[node].transfer
        if transfer is not None and reply.sha256 == transfer.snapshot.sha256:
            transfer.acknowledged(reply.next_offset, self.now)
            self.send_needed = True
