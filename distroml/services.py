"""What ``http`` sees of a node: ``NodeServices``, as ``http.services`` asks for it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from distroml import __version__
from distroml.checkpoint_files import CheckpointFiles
from distroml.commands import AnyCommand, Outcome
from distroml.config import NodeConfig
from distroml.consensus.peers import PeerLinks
from distroml.consensus.proposer import Proposer
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import NotLeader, RaftStatus
from distroml.consensus.replica import Replica
from distroml.consensus.state import ClusterState, digest_state
from distroml.errors import Conflict, NotFound, Unavailable
from distroml.history_view import HistoryView
from distroml.http.job_events import JobEvents
from distroml.http.limits import HttpSettings
from distroml.http.services import Counter
from distroml.http.tally import Tally
from distroml.runtime.barrier_wire import BarrierWire
from distroml.runtime.collecting import Collector
from distroml.runtime.coordinator import Coordinator
from distroml.runtime.history_sink import HistoryWriter
from distroml.runtime.observations import Observations, ObservedNode
from distroml.runtime.replicas.copies import Copies
from distroml.runtime.reporter import Reporter
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.replication import HistoryReplicator


class Parts(Struct, frozen=True, kw_only=True):
    """The parts of a node that the API reads from and writes through."""

    config: NodeConfig
    incarnation: int
    raft: RaftNode
    replica: Replica
    proposer: Proposer
    links: PeerLinks
    observations: Observations
    history: HistoryStore
    writer: HistoryWriter
    replicator: HistoryReplicator
    stopping: Callable[[], bool]
    warm: Callable[[], bool]
    """Whether workers can be started at once (true for a node without slots)."""
    coordinator: Coordinator
    collector: Collector
    files: CheckpointFiles
    copies: Copies
    reporter: Reporter
    barriers: BarrierWire


class NodeServices:
    """Implements ``http.services.Services`` over the parts of one node."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started = time.monotonic()
        self._digesting = asyncio.Lock()
        self._digest = (-1, "")
        self.events = JobEvents(parts.replica.recent_events)
        self.tally = Tally(self.state, self.caught_up)
        self.history = HistoryView(parts.history, parts.replicator.caught_up)
        self.files = parts.files
        self.settings = HttpSettings(allowed_hosts=parts.config.allowed_hosts)
        self.version = __version__

    @property
    def name(self) -> str:
        return self._parts.config.name

    def state(self) -> ClusterState:
        return self._parts.replica.state

    async def state_digest(self) -> tuple[int, str]:
        """Made in a thread, one at a time; asked again at the same index, the last one is the answer."""
        async with self._digesting:
            state = self.state()
            if self._digest[0] != state.index:
                self._digest = (state.index, await asyncio.to_thread(digest_state, state))
            return self._digest

    def raft(self) -> RaftStatus:
        return self._parts.raft.status()

    def observed(self) -> Mapping[str, ObservedNode]:
        return self._parts.observations.view()

    def waiting(self) -> Mapping[str, str]:
        return self._parts.coordinator.waiting()

    async def propose(self, command: AnyCommand, timeout_s: float) -> Outcome:
        return await self._parts.proposer.propose(command, timeout_s)

    async def read_barrier(self, timeout_s: float) -> None:
        try:
            await self._parts.raft.read_index(timeout_s)
        except (NotLeader, TimeoutError):
            raise Unavailable(
                "No leader with a majority could confirm that this read is up to date; try again, "
                "or read with consistency=local."
            ) from None

    async def transfer_leadership(self, target: str | None, timeout_s: float) -> str:
        raft = self._parts.raft
        if target is not None and target not in raft.voters:
            if target in self.state().nodes:
                raise Conflict(
                    f"Node '{target}' does not vote, so it cannot lead; the voters are "
                    f"{', '.join(raft.voters)}.",
                    field="node",
                )
            raise NotFound(f"There is no node '{target}'.", field="node")
        try:
            leader = await raft.transfer_leadership(target, timeout_s)
        except NotLeader:
            raise Unavailable("Nobody leads now; leadership cannot be handed over.") from None
        if leader is None:
            now = f"'{raft.leader}' leads on" if raft.leader else "nobody leads now"
            raise Conflict(f"{_nobody_took_over(target, raft.voters)}; {now}.")
        return leader

    def caught_up(self) -> bool:
        """True from the moment on that this node's registration was applied here: all that was acknowledged before
        it started is then part of its state.

        That the state has this very incarnation says less: a node that lost its directory counts from 1 again.
        """
        return self._parts.proposer.registered

    def ready(self) -> tuple[bool, str]:
        parts = self._parts
        if parts.stopping():
            return False, "this node is stopping"
        status = parts.raft.status()
        if not status.healthy:
            return False, status.reason
        if status.leader is None:
            return False, status.awaits or "no leader is known"
        if not self.caught_up():
            return False, "this node has not applied the whole log since it started"
        return True, ""

    def health(self) -> Mapping[str, Any]:
        status = self._parts.raft.status()
        return {
            "incarnation": self._parts.incarnation,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "pid": os.getpid(),
            "raft_healthy": status.healthy,
            "raft_reason": status.reason,
            "raft_snapshot_error": status.snapshot_error,
            "warm": self._parts.warm(),
        }

    def counters(self) -> Iterable[Counter]:
        parts = self._parts
        labelled: tuple[tuple[str, str, str, Mapping[str, float]], ...] = (
            (
                "link_events_total",
                "event",
                "What happened on the links with other nodes.",
                parts.links.counters,
            ),
            (
                "raft_loop_total",
                "event",
                "Turns of consensus, frames refused, snapshots of the state that could not be taken.",
                parts.raft.counters,
            ),
            (
                "refused_entries_total",
                "reason",
                "Entries of the log without effect, by reason.",
                parts.replica.state.refused,
            ),
            (
                "barrier_events_total",
                "event",
                "Arrivals, releases, repeats and refusals at barriers of workers.",
                parts.barriers.counters,
            ),
            (
                "decisions_total",
                "command",
                "Decisions that this node proposed while it led.",
                parts.coordinator.decisions,
            ),
            (
                "checkpoint_directories_total",
                "event",
                "Directories of checkpoints that this node deleted, or could not.",
                parts.collector.counts,
            ),
            (
                "checkpoint_copies_total",
                "event",
                "Files of the store 'local': copies that others took, refused or could not be had in time; "
                "fetched, mended and restored ones.",
                parts.copies.counts,
            ),
            (
                "checkpoint_copy_bytes_total",
                "direction",
                "Bytes of checkpoint files that went to other nodes or came from them.",
                parts.copies.bytes_moved,
            ),
            (
                "history_replication_total",
                "event",
                "Records of history exchanged with other nodes.",
                dataclasses.asdict(parts.replicator.counts),
            ),
        )
        for name, label, about, values in labelled:
            for key, value in dict(values).items():
                yield _counter(name, value, about, {label: key})
        yield _counter(
            "checkpoint_copies_missing",
            parts.copies.upkeep.lacking,
            "Copies that committed checkpoints lack, as the leader saw last; 0 on other nodes.",
        )
        yield _counter(
            "checkpoint_files_lost",
            parts.copies.upkeep.lost,
            "Files of committed checkpoints that no node had when the leader looked last.",
        )
        yield _counter(
            "history_dropped_total",
            parts.writer.dropped,
            "Metrics and log lines of local workers that history could not take.",
        )
        yield _counter(
            "history_bytes", parts.history.size_bytes, "Size of history on this node's disk."
        )
        yield _counter(
            "reports_refused_total",
            parts.observations.refused,
            "Reports of other nodes that could not be read or were not their own.",
        )
        yield _counter(
            "reports_failed_total",
            parts.reporter.failures,
            "Reports of this node that could not be made or sent.",
        )
        yield _counter(
            "proposals_dropped_total",
            parts.proposer.forwarded_dropped,
            "Entries of other nodes that this one could not take; they are offered again.",
        )
        yield _counter(
            "proposals_unreadable_total",
            parts.proposer.forwarded_unreadable,
            "Entries of other nodes that this leader could not read, perhaps of a newer version, and refused.",
        )


def _nobody_took_over(target: str | None, voters: Sequence[str]) -> str:
    if len(voters) == 1:
        return "There is no other voter"
    if target is None:
        return "No other voter took over (they are down, cut off or far behind)"
    return f"Node '{target}' did not take over (it is down, cut off or far behind)"


def _counter(name: str, value: float, about: str, labels: dict[str, str] | None = None) -> Counter:
    return Counter(name=f"distroml_{name}", value=float(value), help=about, labels=labels or {})
