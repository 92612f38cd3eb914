"""Brings the history that each node originates to all others, and back from them.

Push: what this node has just written of its own streams goes to every connected peer, once, without a queue that
could grow: who misses it sees the hole and pulls. Pull: when a link comes up and every few seconds, nodes compare
digests of jobs, then heads where those differ, and ask for what they lack in bounded chunks. So a voter that was
down catches up, and what a dead node's streams reached anywhere reaches everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Protocol

from distroml.consensus.frames import Channel
from distroml.runtime.store import sync
from distroml.runtime.store.catching_up import CatchingUp
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.outgoing import Outgoing
from distroml.runtime.store.pulls import Pulls, ReplicationCounts
from distroml.runtime.store.sharing import Sharing
from distroml.runtime.store.subscriptions import Written
from distroml.runtime.store.sync import (
    AskHeads,
    AskHeadsOf,
    Chunk,
    Digests,
    Heads,
    Message,
    Pull,
    Records,
    Span,
)

log = logging.getLogger(__name__)

TICK_S = 0.25
COMPARE_EVERY_S = 2.0
"""Time between comparisons of digests with each peer."""
RECENT_JOBS = 16
"""Compared every time; the rest in turn."""
MAX_OPENS = 32
"""Jobs read from disk for one comparison."""


class Links(Protocol):
    """What is needed of ``consensus.peers.PeerLinks``."""

    def subscribe(self, channel: Channel, handler: Callable[[str, bytes], None]) -> None: ...
    def on_link(self, handler: Callable[[str, bool], None]) -> None: ...
    def connected(self, peer: str) -> bool: ...
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class HistoryReplicator:
    """Keeps ``store`` and those of the peers alike. ``start`` and ``close`` it, or drive it by ``tick``.

    Args:
        name: of this node.
        peers: names of the nodes to exchange history with (this node's own is ignored).
        known_jobs: ids of the jobs that exist by the replicated state; others are refused.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        store: HistoryStore,
        links: Links,
        peers: Callable[[], Collection[str]],
        known_jobs: Callable[[], Collection[str]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = ReplicationCounts()
        self._name = name
        self._store = store
        self._links = links
        self._peers = peers
        self._known_jobs = known_jobs
        self._clock = clock
        self._outgoing = Outgoing()
        self.sharing = Sharing(
            store,
            others=lambda: any(peer != name for peer in peers()),
            ask=lambda keys: self._send_to_all(AskHeadsOf(keys)),
        )
        self._catching_up = CatchingUp(
            peers=self._reachable,
            ask=lambda peer, job_id, number: self._send(
                peer, AskHeads((job_id,), (store.digest(job_id),), number)
            ),
            lacks=lambda key, seq: (
                0 if store.wanted(key) is None else max(0, seq - store.span(key)[1])
            ),
            clock=clock,
        )
        self.caught_up = self._catching_up.caught_up
        self._pulls = Pulls(
            store,
            self.counts,
            urgent=lambda: self._catching_up.jobs,
            known_jobs=known_jobs,
            reachable=self._reachable,
            send=self._send,
            clock=clock,
        )
        self._next_compare = 0.0
        self._rotation = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        store.listen(self._on_written)
        links.subscribe(Channel.STORE, self._on_body)
        links.on_link(self._on_link)

    # --- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run in the background from now on."""
        self._task = asyncio.create_task(self._run(), name="history-replication")

    async def close(self) -> None:
        """Stop; what was not pushed is pulled by the peers from whoever has it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                self.tick()
            except Exception:  # a defect must not end replication for good
                log.exception("history: replication failed; going on")
                await asyncio.sleep(TICK_S)

    def tick(self) -> None:
        """Push what is new, compare when it is time, ask for what is missing."""
        now = self._clock()
        self._push()
        if now >= self._next_compare:
            self._next_compare = now + COMPARE_EVERY_S
            self._send_to_all(self._digests_page())
        self._pulls.pump()

    def forget(self, job_id: str) -> None:
        """A job was removed (and is no longer among ``known_jobs``): delete its history, take none of it again."""
        self._store.remove(job_id)
        self.sharing.forget(job_id)
        self._pulls.forget(job_id)
        self._catching_up.forget(job_id)

    def sweep(self) -> list[str]:
        """Delete the history of all jobs that are not known, and return their ids.

        Only to be called when this node has applied all that is committed: jobs may have been removed while it
        was down, but before it has caught up it does not know the others either.
        """
        known = self._known_jobs()
        unknown = [job_id for job_id in self._store.jobs() if job_id not in known]
        for job_id in unknown:
            self.forget(job_id)
        return unknown

    # --- push --------------------------------------------------------------------------------------------------

    def _on_written(self, written: Written, local: bool) -> None:
        self._catching_up.written()
        if local:
            self.counts.push_dropped += self._outgoing.add(written)
            self._wake.set()

    def _push(self) -> None:
        for message in self._outgoing.take(self._store.span):
            self.counts.pushed += self._send_to_all(message)

    def _reachable(self) -> list[str]:
        return sorted(
            peer for peer in self._peers() if peer != self._name and self._links.connected(peer)
        )

    def _send_to_all(self, message: Message) -> int:
        body = sync.encode(message)
        return sum(self._links.send(peer, Channel.STORE, body) for peer in self._reachable())

    def _send(self, peer: str, message: Message) -> bool:
        return self._links.send(peer, Channel.STORE, sync.encode(message))

    # --- compare -----------------------------------------------------------------------------------------------

    def _digests_page(self) -> Digests:
        """Digests of the most recently written jobs, and of some of the others in turn."""
        known = self._known_jobs()
        jobs = [job_id for job_id in self._store.jobs() if job_id in known]
        recent, rest = jobs[:RECENT_JOBS], jobs[RECENT_JOBS:]
        if rest:
            start = self._rotation % len(rest)
            turned = rest[start:] + rest[:start]
            page = list(self._affordable(turned[: sync.MAX_DIGESTS - RECENT_JOBS]))
            self._rotation = start + max(1, len(page))
            recent += page
        return Digests(tuple((job_id, self._store.digest(job_id)) for job_id in recent))

    def _affordable(self, job_ids: Collection[str]) -> Iterator[str]:
        """The start of ``job_ids`` that needs at most ``MAX_OPENS`` jobs to be read from disk."""
        opens = 0
        for job_id in job_ids:
            if not self._store.digest_known(job_id):
                opens += 1
            if opens > MAX_OPENS:
                return
            yield job_id

    def _on_digests(self, peer: str, message: Digests) -> None:
        known = self._known_jobs()
        theirs = {
            job_id: digest
            for job_id, digest in message.jobs
            if job_id in known and not self._store.evicted(job_id)
        }
        own = [(job_id, self._store.digest(job_id)) for job_id in self._affordable(theirs)]
        theirs = {job_id: theirs[job_id] for job_id, _ in own}
        if jobs := sync.differing(own, theirs):
            self._send(peer, AskHeads(jobs))

    def _on_ask_heads(self, peer: str, message: AskHeads) -> None:
        alike = {
            job_id
            for job_id, digest in zip(message.jobs, message.digests, strict=False)
            if digest and digest == self._store.digest(job_id)
        }
        spans = (
            Span(key, first, head)
            for job_id in message.jobs
            if job_id not in alike
            for key, (first, head) in self._store.spans(job_id).items()
            if head
        )
        while page := tuple(islice(spans, sync.MAX_SPANS)):
            if not self._send(peer, Heads(page)):
                return  # it will ask again
        self._send(peer, Heads((), message.jobs, message.number))

    def _on_ask_heads_of(self, peer: str, message: AskHeadsOf) -> None:
        self._store.hurry()
        spans = (Span(key, *self._store.span(key)) for key in message.keys)
        self._send(peer, Heads(tuple(spans)))

    def _on_heads(self, peer: str, message: Heads) -> None:
        self.sharing.take(message.spans)
        for span in message.spans:
            self._pulls.note(peer, span)
        self._catching_up.take(peer, message)
        self._pulls.pump()

    # --- pull --------------------------------------------------------------------------------------------------

    def _on_pull(self, peer: str, message: Pull) -> None:
        chunks: list[Chunk] = []
        room = sync.MAX_BODY_BYTES
        for want in message.wants:
            first, head = self._store.span(want.key)
            records = self._store.read(want.key, want.from_seq, room) if room > 0 else None
            if records is not None:
                chunks.append(Chunk(Span(want.key, first, head), want.from_seq, records))
                room -= sum(map(len, records))
        self.counts.served += sum(len(chunk.records) for chunk in chunks)
        self._send(peer, Records(message.number, tuple(chunks)))

    def _on_records(self, peer: str, message: Records) -> None:
        self._pulls.take(peer, message)
        self._pulls.pump()

    # --- links -------------------------------------------------------------------------------------------------

    def _on_link(self, peer: str, up: bool) -> None:
        self._pulls.link_changed(peer)
        self._catching_up.link_changed(peer)
        if up:
            self._next_compare = 0.0
            self._wake.set()

    def _on_body(self, peer: str, body: bytes) -> None:
        if peer not in self._peers():
            return
        try:
            message = sync.decode(body)
        except sync.Undecodable as error:
            self.counts.malformed += 1
            log.warning("history: message of %s refused: %s", peer, error)
            return
        match message:
            case Digests():
                self._on_digests(peer, message)
            case AskHeads():
                self._on_ask_heads(peer, message)
            case AskHeadsOf():
                self._on_ask_heads_of(peer, message)
            case Heads():
                self._on_heads(peer, message)
            case Pull():
                self._on_pull(peer, message)
            case Records():
                self._on_records(peer, message)
