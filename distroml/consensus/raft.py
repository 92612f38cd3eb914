"""Runs one Raft node inside the event loop: inbox → turn → disk → outbox.

The loop wakes on a frame, a submission or a timer, lets `RaftCore` run one turn, has the turn's
disk operations performed by one dedicated thread (one group fdatasync per turn), and only then
releases the messages; a leader's appends leave before, so that all disks write at once. While a sync is pending no turn runs; inputs queue, within limits. A disk that
fails stops every acknowledgement until it works again; a broken invariant stops the node for good.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from distroml.consensus.disk import Disk, RealDisk
from distroml.consensus.handover import Handover
from distroml.consensus.messages import BadMessage, Message, decode, encode
from distroml.consensus.peers import Channel, PeerLinks
from distroml.consensus.raft_core import TRANSFER_LIMIT_S, RaftCore, Turn
from distroml.consensus.raft_types import (
    NotLeader,
    Overloaded,
    RaftSettings,
    RaftStatus,
    Role,
    StateMachine,
    check_voters,
)
from distroml.consensus.read_barriers import ReadBarriers
from distroml.consensus.sync_thread import SyncThread
from distroml.consensus.wal import Identity

logger = logging.getLogger(__name__)

MAX_INBOX: Final = 8_192
"""Decoded messages that wait for a turn; more are dropped, which Raft repairs by itself."""
MAX_INBOX_BYTES: Final = 64 * 1024 * 1024
MAX_SUBMISSIONS: Final = 16_384
MAX_SUBMISSION_BYTES: Final = 32 * 1024 * 1024
INPUTS_PER_TURN: Final = 1_024
SUBMISSION_BYTES_PER_TURN: Final = 4 * 1024 * 1024
ENTRY_OVERHEAD_BYTES: Final = 128
"""Index, term and lengths around one entry in a message, generously."""
STOP_LIMIT_S: Final = 5.0
"""A disk that hangs does not keep the process from leaving: nothing unsynced was promised."""


class RaftNode:
    """One voter of the cluster or, where its name is not among the voters, a learner.

    `machine` is called inside the event loop. `clock` gives monotonic seconds. All methods are to
    be called in the loop that `start` ran in.
    """

    def __init__(
        self,
        *,
        name: str,
        voters: Sequence[str],
        data_dir: Path,
        links: PeerLinks,
        machine: StateMachine,
        settings: RaftSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        disk: Disk | None = None,
    ) -> None:
        check_voters(tuple(voters))
        _check_frames(settings or RaftSettings(), links.limits.frame_bytes)
        self.name = name
        self._voters = tuple(voters)
        self._directory = data_dir / "raft"
        self._links = links
        self._machine = machine
        self._settings = settings or RaftSettings()
        self._clock = clock
        self._rng = rng or random.Random()
        self._disk: Disk = disk or RealDisk()
        self._sync = SyncThread(
            name,
            hang_s=self._settings.check_quorum_s,
            rng=self._rng,
            on_trouble=self._publish,
        )
        self._core: RaftCore | None = None
        self._task: asyncio.Task[None] | None = None
        self._inbox: deque[tuple[Callable[[], None], int]] = deque()
        self._inbox_bytes = 0
        self._submissions: deque[bytes] = deque()
        self._submission_bytes = 0
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._stopping = asyncio.Event()
        self._reads = ReadBarriers(self._rng)
        self._role_handlers: list[Callable[[RaftStatus], None]] = []
        self._handover = Handover(self, links, self._post)
        self._published: tuple[object, ...] = ()
        self._awaits = ""
        self._failure = ""
        self.notes: list[str] = []
        """What had to be repaired on disk at the start."""
        self.counters = {
            "frames_malformed": 0,
            "frames_dropped": 0,
            "turns": 0,
            "pre_vote_rounds": 0,
            "snapshots_failed": 0,
        }

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Recovers the node's state from disk and joins the cluster.

        Raises UnsafeLibrary, StorageCorrupt, StorageInUse or OSError; the node then has neither
        voted nor sent anything.
        """
        voters = tuple(sorted(self._voters)) if self.name in self._voters else ()
        identity = Identity(self._links.cluster_id, self.name, voters)
        try:
            recovered = await self._sync.open(self._directory, identity, self._disk)
            self.notes = recovered.notes
            for note in recovered.notes:
                logger.info("%s: %s", self._directory, note)
            self._core = RaftCore(
                name=self.name,
                voters=self._voters,
                settings=self._settings,
                machine=self._machine,
                recovered=recovered,
                clock=self._clock,
                rng=self._rng,
            )
        except BaseException:
            await self._sync.close()
            raise
        self._links.subscribe(Channel.RAFT, self._on_frame)
        self._links.on_link(self._on_link)
        for peer in self._links.connected_peers():  # they came while the disk was read
            self._on_link(peer, True)
        self._wake.set()  # the first turn needs no cause: it sets the first timer
        self._task = asyncio.create_task(self._run(), name=f"raft-{self.name}")

    async def stop(self) -> None:
        """Stops after the turn in progress. Nothing is lost by not calling it."""
        self._stopping.set()
        self._sync.stop()
        self._wake.set()
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=STOP_LIMIT_S)
            for task in late:
                task.cancel()
                await asyncio.wait({task}, timeout=STOP_LIMIT_S)
        if self._timer is not None:
            self._timer.cancel()
        self._reads.refuse_all()
        await self._sync.close()

    # ------------------------------------------------------------------ facts

    @property
    def core(self) -> RaftCore:
        """The node's state machine of Raft itself; for tests and diagnosis."""
        if self._core is None:
            raise RuntimeError(f"raft node {self.name!r} has not been started")
        return self._core

    @property
    def leader(self) -> str | None:
        return None if self._core is None or self._trouble else self._core.leader

    @property
    def voters(self) -> tuple[str, ...]:
        """Who elects, this node or not; fixed."""
        return self._voters

    @property
    def term(self) -> int:
        return 0 if self._core is None else self._core.raft.term

    @property
    def is_leader(self) -> bool:
        """Believes to lead, and can: a leader whose disk fails or hangs does not count."""
        return self._core is not None and self._core.role is Role.LEADER and not self._trouble

    @property
    def commit_index(self) -> int:
        return 0 if self._core is None else self._core.raft.commit_index

    @property
    def applied_index(self) -> int:
        return 0 if self._core is None else self._core.raft.applied_index

    @property
    def failure(self) -> str:
        """Why this node has stopped for good (an invariant broke); empty while it works."""
        return self._failure

    @property
    def _trouble(self) -> str:
        if self._failure or self._sync.trouble:
            return self._failure or self._sync.trouble
        if self._core is None:
            return "not started"
        return "stopped" if self._stopping.is_set() else ""

    def status(self) -> RaftStatus:
        """Never raises; before `start` it says so as the reason for being unhealthy."""
        trouble = self._trouble
        if self._core is None:
            return RaftStatus(name=self.name, healthy=False, reason=trouble)
        core, raft = self._core, self._core.raft
        return RaftStatus(
            name=self.name,
            role=Role.FOLLOWER if trouble else core.role,
            term=raft.term,
            leader=self.leader,
            voters=self._voters,
            commit_index=raft.commit_index,
            applied_index=raft.applied_index,
            last_index=raft.log.last_index,
            log_entries=len(raft.log.entries) - 1,
            log_bytes=raft.log.payload_bytes,
            snapshot_index=raft.snapshot.index if raft.snapshot else 0,
            snapshot_error=raft.snapshot_error,
            last_sync_ms=self._sync.last_sync_ms,
            proven=raft.log.proven,
            awaits=raft.awaited(),
            healthy=not trouble,
            reason=trouble,
        )

    # ------------------------------------------------------------------ requests

    def append(self, entry: bytes) -> None:
        """Puts an entry into the leader's log; `machine.apply` tells when it is committed.

        Raises NotLeader (with a hint), EntryTooLarge, Overloaded. Not raising promises nothing: if
        leadership is lost the entry may or may not be committed, so the proposer must retry under
        the same identity.
        """
        if self._core is None or self._trouble:
            raise NotLeader(None)
        self._core.check_append(entry)
        full = self._submission_bytes + len(entry) > MAX_SUBMISSION_BYTES
        if full or len(self._submissions) >= MAX_SUBMISSIONS:
            raise Overloaded(f"{len(self._submissions)} entries already wait for the log; retry")
        self._submissions.append(entry)
        self._submission_bytes += len(entry)
        self._wake.set()

    def on_role(self, handler: Callable[[RaftStatus], None]) -> None:
        """Calls `handler` in the loop after role, term, leader or health changed."""
        self._role_handlers.append(handler)

    async def read_index(self, timeout_s: float) -> int:
        """Waits until this node has applied everything that was committed before the call.

        Returns that index. Works on any node; a follower asks the leader. Raises NotLeader where no
        leader could confirm, TimeoutError after `timeout_s`.
        """
        if self._core is None or self._trouble:
            raise NotLeader(None)
        token, answer = self._reads.ask()
        self._post(partial(self._core.request_read, token))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            if self._reads.forget(token):
                self._post(partial(self._core.cancel_read, token))

    async def transfer_leadership(
        self, target: str | None = None, timeout_s: float = TRANSFER_LIMIT_S
    ) -> str | None:
        """Has leadership handed to `target`, by default to the most advanced connected voter.

        Any node may ask; the leader accepts nothing meanwhile. Returns the new leader, or None if it did
        not change in time: the old one then leads on. Raises NotLeader where no leader is known.
        """
        return await self._handover.run(target, timeout_s)

    # ------------------------------------------------------------------ inputs

    def _on_frame(self, peer: str, body: bytes) -> None:
        if self._failure or self._stopping.is_set():
            return
        if len(self._inbox) >= MAX_INBOX or self._inbox_bytes + len(body) > MAX_INBOX_BYTES:
            self.counters["frames_dropped"] += 1
            return
        try:
            message = decode(body)
        except BadMessage as error:
            self.counters["frames_malformed"] = total = self.counters["frames_malformed"] + 1
            level = logging.WARNING if total & (total - 1) == 0 else logging.DEBUG
            logger.log(level, "dropped frame %d of %s: %s", total, peer, error)
            return
        if not self._inbox and not self._sync.busy:
            answers = self.core.receive_heartbeat(peer, message)
            if answers is not None:
                for answer in answers:
                    self._links.send(peer, Channel.RAFT, encode(answer))
                return
        self._post(partial(self.core.receive, peer, message), len(body))

    def _on_link(self, peer: str, up: bool) -> None:
        self._post(partial(self.core.set_link, peer, up))

    def _post(self, action: Callable[[], None], size_bytes: int = 0) -> None:
        self._inbox.append((action, size_bytes))
        self._inbox_bytes += size_bytes
        self._wake.set()

    # ------------------------------------------------------------------ the loop

    async def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                await self._wait_for_work()
                await self._turn()
        except Exception as error:
            # Crash-only: what is on disk is consistent, what is in memory no longer is.
            logger.exception("raft node %s stops", self.name)
            self._failure = f"{type(error).__name__}: {error}"
            self._reads.refuse_all()
        finally:
            self._publish()

    async def _wait_for_work(self) -> None:
        if self._wake.is_set():
            await asyncio.sleep(0)
        else:
            await self._wake.wait()
        self._wake.clear()

    async def _turn(self) -> None:
        core = self.core
        core.begin()
        self._submit_batch(core)  # before a hand-over that may be in the inbox
        for _ in range(min(len(self._inbox), INPUTS_PER_TURN)):
            action, size_bytes = self._inbox.popleft()
            self._inbox_bytes -= size_bytes
            action()
        turn = core.finish_turn()
        self.counters["turns"] += 1
        self.counters["pre_vote_rounds"] = core.raft.pre_vote_rounds
        self.counters["snapshots_failed"] = core.raft.snapshot_failures
        self._release(turn.early)
        if turn.disk and not await self._sync.persist(turn.disk):
            return  # stopped with the turn not on disk: nothing of it may leave
        self._release(turn.messages)
        self._schedule(turn)
        self._reads.confirm(turn.reads, self.leader)
        self._reads.release(self.applied_index)
        self._publish()

    def _submit_batch(self, core: RaftCore) -> None:
        budget = SUBMISSION_BYTES_PER_TURN
        while self._submissions and budget > 0:
            entry = self._submissions.popleft()
            self._submission_bytes -= len(entry)
            budget -= len(entry)
            core.submit(entry)

    def _release(self, messages: Sequence[tuple[str, Message]]) -> None:
        encoded: dict[int, bytes] = {}
        for peer, message in messages:
            body = encoded.get(id(message))
            if body is None:
                body = encoded[id(message)] = encode(message)
            self._links.send(peer, Channel.RAFT, body)

    def _schedule(self, turn: Turn) -> None:
        if turn.again or self._inbox or self._submissions:
            self._wake.set()
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        at = now + max(0.0, turn.wake_at - self._clock())
        if self._timer is not None:
            if now < self._timer_at <= at:
                return  # it fires early enough; a turn too many costs less than a timer per turn
            self._timer.cancel()
        self._timer, self._timer_at = loop.call_at(at, self._wake.set), at

    def _publish(self) -> None:
        awaits = "" if self._core is None else self._core.raft.awaited()
        if awaits != self._awaits:
            self._awaits = awaits
            logger.info("%s: %s", self.name, awaits or "this voter takes part in elections")
        trouble = self._trouble
        role = Role.FOLLOWER if trouble or self._core is None else self._core.role
        facts = (role, self.term, self.leader, not trouble)
        if facts == self._published:
            return
        self._published = facts
        status = self.status()
        self._handover.on_role_change()
        for handler in self._role_handlers:
            try:
                handler(status)
            except Exception:
                logger.exception("a role handler of raft node %s failed", self.name)


def _check_frames(settings: RaftSettings, frame_bytes: int) -> None:
    """Raises ValueError where a message of these settings could exceed what links carry."""
    append = settings.append_batch_bytes + settings.entry_max_bytes
    append += settings.inflight_entries * ENTRY_OVERHEAD_BYTES
    largest = max(append, settings.snapshot_chunk_bytes) + ENTRY_OVERHEAD_BYTES
    if largest > frame_bytes:
        raise ValueError(
            f"append_batch_bytes, inflight_entries or snapshot_chunk_bytes allow messages of "
            f"{largest} bytes, but links carry frames of {frame_bytes} bytes"
        )
