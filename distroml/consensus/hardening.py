"""PySyncObj 0.3.17 made safe: one override per known hazard, and nothing else.

The library stays the Raft core: roles, terms, votes, commit rule, check-quorum. What it gets wrong is
replaced through its private names, so the exact source is pinned by hash and checked before use.
The overrides live here and in the parts this class is made of (`elections`, `following`,
`replication`). Each names the hazard it closes (S = safety, L = liveness, P = performance,
X = security):

====  ===========================================================================================
S1    a snapshot chunk moved the commit index over unverified entries → `on_snapshot_chunk`
S2    a restart between snapshot and trim dropped acknowledged entries → `storage.join`
S3-5  journal and term/vote file were neither atomic, checksummed nor synced → `wal`
S6    a delayed append truncated entries that match → `on_append`
S7    acknowledgements carried no term → `on_append_reply`
S8    votes were counted, not identified; strangers were heard → `on_vote_granted`, `receive`
S9    snapshot streams had no identity, offset or hash → `snapshot`, `on_snapshot_chunk`
S10   an exception after apply applied the entry again → `_SyncObj__applyLogEntries`
S11   forwarded commands could acknowledge the wrong one → nothing is forwarded: leader-only `submit`
S12   "failed" commands may have happened → the state machine remembers results; proposers retry
S13   membership changes could overlap → voters are static, such commands are refused
S14   a code version switch could replay entries → one kind of entry, our own bytes
S15   no linearizable read → `raft_core`
L1    two rejections in flight overwrote each other for ever → `on_append_reply`, probe mode
L2    a raising command blocked every node → `_SyncObj__applyLogEntries`
L3    back-off by one entry per heartbeat → `_conflict_hint`, and a probe at once
L4    no pre-vote, no loyalty, silent rejections → `_onTick`, `on_pre_vote`, `on_request_vote`
L5    lost forwards → see S11
L6    an unreadable dump left a log that starts nowhere → `storage.join` refuses to start
L7    compaction kept no trailing entries → `_SyncObj__tryLogCompaction`
P1    the send loop spun while a dump was written → `_SyncObj__sendAppendEntries`
P2    commands waited for a heartbeat → `_checkCommandsToApply` sends once per turn
P3    mmap journal: 32-bit offsets, SIGBUS on a full disk → `wal`
P4    fork for dumps → `_SyncObj__tryLogCompaction` takes plain bytes
P5    huge entries were cut wrongly → entries are capped, batches are whole entries
X1    pickle on wire, in log and in dumps → `messages`, `_SyncObj__doApplyCommand`
X2    anyone could change membership or pose as a node → `peers`, `receive`
====  ===========================================================================================

Also: a voter whose directory was emptied has forgotten its votes and acknowledgements. It counts for
nothing until the log proves it, except to found a cluster with all other voters: see `proofs`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any, ClassVar, Final

from pysyncobj import syncobj

from distroml.consensus.elections import Elections
from distroml.consensus.following import Following
from distroml.consensus.library import Journal, Outbox, Peer, adopt_library, ambient
from distroml.consensus.library_fields import LEADER
from distroml.consensus.messages import (
    NO_OP,
    REGULAR,
    Append,
    AppendReply,
    Message,
    PreVote,
    RequestVote,
    SnapshotChunk,
    SnapshotReply,
    TimeoutNow,
    VoteGranted,
    VoteReply,
)
from distroml.consensus.proofs import proof
from distroml.consensus.raft_log import LogImage
from distroml.consensus.raft_types import (
    RaftSettings,
    StateMachine,
    UnreadableEntry,
    check_voters,
)
from distroml.consensus.replication import Progress, Replication
from distroml.consensus.snapshot import IncomingSnapshot, Snapshot

logger = logging.getLogger(__name__)

APPLY_PER_TURN: Final = 1_024
"""Entries applied in one turn, at most, so that a long replay does not stop the event loop."""
_COMPACT_AT_LEAST: Final = 256
"""Applied entries that make a snapshot worth its while even where the log is full of bytes."""


class HardenedRaft(Elections, Following, Replication, syncobj.SyncObj):  # type: ignore[misc]
    """One voter or, where its name is not among the voters, a learner. Input methods change state and fill `outbox`; `turn` runs the library's tick.

    The caller sets `now` (through `begin`) before any input, performs `log.take_ops()` after the
    turn, and only then lets the outbox leave.
    """

    def __init__(
        self,
        *,
        name: str,
        voters: tuple[str, ...],
        settings: RaftSettings,
        machine: StateMachine,
        image: LogImage,
        snapshot: Snapshot | None,
        rng: random.Random,
        now: float,
    ) -> None:
        adopt_library()
        check_voters(voters)
        self.name, self.voters, self.settings, self.machine = name, voters, settings, machine
        self.snapshot, self.rng = snapshot, rng
        self.outbox: list[tuple[str, Message]] = []
        self.submissions: list[bytes] = []
        self.nodes = {voter: Peer(voter) for voter in sorted(voters)}
        self.learner = name not in voters
        if self.learner:
            self.nodes[name] = Peer(name)
        self.others = [self.nodes[voter] for voter in sorted(voters) if voter != name]
        self.learners: dict[str, Any] = {}
        self.progress: dict[Any, Progress] = {}
        self.send_needed = False
        self.appends: dict[tuple[int, int], Append] = {}
        self.apply_failures = 0
        self.snapshot_failures = 0
        self.snapshot_error = ""
        self.refused = 0
        self.supporters: set[str] = set()
        self.founders: dict[str, int] = {}
        self.knowing: set[str] = set()
        self.pre_vote_term: int | None = None
        self.pre_vote_rounds = 0
        self.pre_vote_at = float("-inf")
        self.heard_leader_at = float("-inf")
        self.incoming = IncomingSnapshot()
        self.begin(now)
        self.heartbeat_at = now  # the library reads every attribute while it constructs itself
        self.journal = Journal(image)
        conf = syncobj.SyncObjConf(
            autoTick=False,
            useFork=False,
            dynamicMembershipChange=False,
            commandsWaitLeader=False,
            journalFile=self.journal,
            raftMinTimeout=settings.election_min_s,
            raftMaxTimeout=settings.election_max_s,
            appendEntriesPeriod=settings.heartbeat_s,
            leaderFallbackTimeout=settings.check_quorum_s,
            connectionTimeout=settings.election_max_s,
            appendEntriesUseBatch=True,
        )
        super().__init__(self.nodes[name], self.others, conf, transport=Outbox(self.grant))
        if snapshot is not None:
            machine.restore(snapshot.index, snapshot.blob)
            self.applied_index = self.commit_index = snapshot.index
        # Asking for pre-votes soon disturbs nobody, and a cluster that starts has nothing to wait for.
        self.election_deadline = now + (self.retry_s() if self.others else 0.0)
        self.compact_from = self.applied_index
        if not self.learner and not self.log.proven and not self.log.nonce:
            self.log.set_nonce(1 + rng.getrandbits(61))  # durable before this node says anything

    # ------------------------------------------------------------------ inputs

    def begin(self, now: float) -> None:
        """Binds the library's clock and randomness to this node for the inputs that follow."""
        self.now = ambient.now = now
        ambient.rng = self.rng

    def receive(self, peer: str, message: Message) -> None:
        # Hazards S8, X2: only the other voters are heard at all, and learners where they acknowledge.
        handlers = self._HANDLERS
        if peer in self.learners:
            handlers = self._HANDLERS_OF_LEARNERS
        elif self.learner:
            handlers = self._HANDLERS_ON_LEARNERS
        node = self.nodes.get(peer)
        handler = handlers.get(type(message))
        if node is None or peer == self.name or handler is None:
            self.refused += 1
            return
        handler(self, node, message)

    def set_link(self, peer: str, up: bool) -> None:
        if peer == self.name:
            return
        if peer not in self.voters:
            self._set_learner(peer, up)
            return
        node = self.nodes[peer]
        self.lost_contact(node)
        if up:
            self.connected.add(node)
            self.send_needed = True
            return
        self.connected.discard(node)
        if self.role != LEADER and node == self.leader_node:
            # A broken connection is a strong hint that the leader died. Only a pre-vote is hastened
            # by it, which others still refuse while they hear the leader.
            self.heard_leader_at = float("-inf")
            soon = self.now + self.rng.uniform(0, self.settings.link_loss_election_s)
            self.election_deadline = min(self.election_deadline, soon)

    def _set_learner(self, name: str, up: bool) -> None:
        """A learner exists for as long as its connection does: whatever it is sent starts anew with that."""
        if self.learner:
            return  # learners follow voters only
        known = self.learners.pop(name, None)
        if known is not None:
            del self.nodes[name]
            self.connected.discard(known)
            for table in (self.progress, self.next_index, self.match_index, self.last_response_at):
                table.pop(known, None)
        if up:
            node = Peer(name)
            self.nodes[name] = self.learners[name] = node
            self.connected.add(node)
            self.progress[node] = Progress()
            self.next_index[node], self.match_index[node] = self.log.last_index + 1, 0
            self.send_needed = True

    def turn(self) -> None:
        self._onTick(0.0)

    # ------------------------------------------------------------------ library seams

    def _onTick(self, timeToWait: float = 0.0) -> None:  # noqa: N802, N803
        # Hazard L4: the library would start an election here, and a round of pre-votes takes its place.
        # Coming last also means that a new leader counts its own no-op only in the next turn, once it
        # is durable.
        if self.role == LEADER:
            super()._onTick(timeToWait)
            return
        # All that the library's tick would do for anyone but a leader, once it can not campaign.
        self._SyncObj__applyLogEntries()
        self._checkCommandsToApply()
        self._SyncObj__tryLogCompaction()
        if self.election_deadline <= self.now:
            self.election_deadline = self.now + self.retry_s()
            self.seek_election()

    def _checkCommandsToApply(self) -> None:  # noqa: N802
        # Hazards P2, S11, L5: entries are accepted on the leader only, and sent once per turn.
        submissions, self.submissions = self.submissions, []
        if self.role != LEADER:
            return
        for command in submissions:
            self.log.append(REGULAR + command, self.log.last_index + 1, self.term)
        if submissions or self.send_needed or self._commit_unsent():
            self._SyncObj__sendAppendEntries()

    def _commit_unsent(self) -> bool:
        commit, connected = self.commit_index, self.connected
        for node, progress in self.progress.items():
            if progress.sent_commit < commit and not progress.probing and node in connected:
                return True
        return False

    def _SyncObj__onBecomeLeader(self) -> None:  # noqa: N802
        self.reset_progress()
        if self._founding():
            self.journal.no_op = proof(self.founders)
            self.log.set_proven()
        self.incoming.discard()
        self.heartbeat_at = self.now
        for node in self.learners.values():
            self.next_index[node], self.match_index[node] = self.log.last_index + 1, 0
        super()._SyncObj__onBecomeLeader()
        self.journal.no_op = NO_OP

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802
        # Hazards S10, L2: the index moves on whatever apply does, and an entry that raises is an
        # empty entry on every node alike. What is not alike on all, such as no memory, stops us.
        if self.commit_index == self.applied_index:
            return False
        end = min(self.commit_index, self.applied_index + APPLY_PER_TURN)
        offset = self.log.anchor_index
        for index in range(self.applied_index + 1, end + 1):
            command = self.log.entries[index - offset][0]
            self.applied_index = index
            self._SyncObj__doApplyCommand(command)
        return False

    def _SyncObj__doApplyCommand(self, command: bytes) -> None:  # noqa: N802
        # Hazards X1, S13, S14: our own bytes, never unpickled; no membership or version commands.
        if command[:1] != REGULAR:
            return
        try:
            self.machine.apply(self.applied_index, command[1:])
        except (MemoryError, RecursionError, UnreadableEntry):
            raise
        except Exception:
            self.apply_failures += 1
            logger.exception("entry %d raised in apply and counts as empty", self.applied_index)

    def _SyncObj__tryLogCompaction(self) -> None:  # noqa: N802
        # Hazards L7, P4: plain bytes in process, and a window of entries stays for slow followers.
        since = self.applied_index - self.compact_from
        full = self.log.payload_bytes >= self.settings.compaction_bytes
        if since >= self.settings.compaction_entries or (full and since >= _COMPACT_AT_LEAST):
            self.compact()

    def compact(self) -> None:
        """Takes a snapshot of the applied state now and trims the log behind it.

        Where the machine cannot give one, the log goes on growing and the next try comes as many
        entries later as compactions are apart."""
        self.compact_from = self.applied_index
        term = self.log.term_at(self.applied_index)
        assert term is not None, "the last applied entry is in the log or is its anchor"
        try:
            blob = self.machine.snapshot()
            self.snapshot = Snapshot.take(self.applied_index, term, list(self.voters), blob)
        except Exception as error:
            self.snapshot_failures += 1
            self.snapshot_error = f"no snapshot at entry {self.applied_index}: {error}"
            logger.exception("no snapshot could be taken at entry %d", self.applied_index)
            return
        self.snapshot_error = ""
        self.log.compact(self.snapshot, max(self.log.anchor_index, self._trim_to()))

    def _trim_to(self) -> int:
        """The last index that followers need no more; all that is applied where the log is too big."""
        if self.log.payload_bytes >= self.settings.compaction_bytes:
            return self.applied_index
        trailing = self.applied_index - self.settings.trailing_entries
        under_way = self.needed_after_transfers()
        return trailing if under_way is None else min(trailing, under_way)

    _HANDLERS: ClassVar[dict[type, Callable[..., None]]] = {
        PreVote: Elections.on_pre_vote,
        VoteReply: Elections.on_vote_reply,
        RequestVote: Elections.on_request_vote,
        VoteGranted: Elections.on_vote_granted,
        Append: Following.on_append,
        AppendReply: Replication.on_append_reply,
        SnapshotChunk: Following.on_snapshot_chunk,
        SnapshotReply: Replication.on_snapshot_reply,
        TimeoutNow: Elections.on_timeout_now,
    }
    _HANDLERS_OF_LEARNERS: ClassVar[dict[type, Callable[..., None]]] = {
        AppendReply: Replication.on_append_reply,
        SnapshotReply: Replication.on_snapshot_reply,
    }
    _HANDLERS_ON_LEARNERS: ClassVar[dict[type, Callable[..., None]]] = {
        Append: Following.on_append,
        SnapshotChunk: Following.on_snapshot_chunk,
    }
