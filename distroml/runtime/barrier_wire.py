"""Carries barriers between the workers of this node, its agent and whoever leads; ``barrier`` decides.

::

    worker ── Arrive ──> agent ── Arrived ──> leader      one frame per agent, once all its ranks have arrived
    worker <─ Released ─ agent <─ Released ── leader      one frame per agent
    worker <─ Awaited ── agent <─ Awaited ─── leader      where an agent repeats: who is missing

The frames have a channel of their own on the control lane: history that streams by does not hold them up. An agent
that waits repeats after ``REPEAT_S``, then ever less often, and at once where the leader or the link to it is new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from distroml.consensus.frames import Channel
from distroml.consensus.state import ClusterState
from distroml.errors import UNDECODABLE
from distroml.runtime import control
from distroml.runtime.barrier import (
    MAX_EARLY,
    REPEAT_MOST_S,
    REPEAT_S,
    Arrived,
    Asked,
    Awaited,
    Barrier,
    BarrierMessage,
    Gatherings,
    NotTaken,
    Outgoing,
    Released,
    Rosters,
    RunGeneration,
    Standing,
    is_to_come,
)


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class _Raft(Protocol):
    @property
    def leader(self) -> str | None: ...


class BarrierWire:
    """One node's end: an agent's ranks stand here, and whoever leads gathers here.

    Args:
        state: the replicated state, which says who belongs to a generation.
        told: called with a generation, local ranks of it, and what they are to hear of a barrier.
        monotonic: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        *,
        node: str,
        links: _Links,
        raft: _Raft,
        state: Callable[[], ClusterState],
        told: Callable[[RunGeneration, tuple[int, ...], control.Released | control.Awaited], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._node, self._links, self._raft = node, links, raft
        self._state, self._tell, self._monotonic = state, told, monotonic
        self._standing = Standing()
        self._gatherings = Gatherings()
        self._rosters = Rosters()
        self._early: dict[tuple[Barrier, int], int] = {}
        """Values of ranks that arrived before the state told of their generation."""
        self._decoder: msgspec.msgpack.Decoder[BarrierMessage] = msgspec.msgpack.Decoder(
            BarrierMessage
        )
        self._timer: asyncio.TimerHandle | None = None
        self._pause_s = REPEAT_S
        self.counters: dict[str, int] = {}
        """arrivals, releases, repeats, asks, refused_<reason>."""

    # --- what happens here ---

    def arrive(self, barrier: Barrier, rank: int, value: int) -> None:
        """A rank of this node arrives. One of a generation that is over waits for its end, not for others; one of a
        generation that is not known yet is kept until it is.

        Raises:
            NotTaken: it stands at ``barrier.MAX_OPEN`` others.
        """
        state, of = self._state(), barrier.generation
        roster = self._rosters.of(state, of)
        if roster is None and is_to_come(state.jobs.get(of.job_id), of):
            if len(self._early) < MAX_EARLY:
                self._early.setdefault((barrier, rank), value)
            else:
                self._count("refused_too_many_early")
            return
        if roster is None or rank not in roster.get(self._node, ()):
            self._count("refused_stale")
            return
        said = self._standing.arrive(barrier, rank, value)
        if isinstance(said, Released):
            self._release(said, (rank,))
            return
        if self._timer is None:
            self._arm()
        # Before all local ranks are there, the leader could do nothing with it.
        if len(said.ranks) == len(roster[self._node]):
            self._to_leader(said)

    def on_frame(self, peer: str, body: bytes) -> None:
        """A frame of ``Channel.BARRIER``."""
        try:
            message = self._decoder.decode(body)
        except UNDECODABLE:
            self._count("refused_garbage")
            return
        self._take(peer, message)

    def on_leader_change(self) -> None:
        """Somebody else may lead: say what is waited for."""
        self._pause_s = REPEAT_S
        self._say_again(self._standing.unanswered())

    def on_link(self, peer: str) -> None:
        """A peer is reachable again, and may have missed what was said."""
        if peer == self._raft.leader:
            self.on_leader_change()

    def on_applied(self) -> None:
        """The replicated state has changed: what belongs to ended generations is dropped, who came early is let in."""
        early, self._early = self._early, {}
        for (barrier, rank), value in early.items():
            try:
                self.arrive(barrier, rank, value)
            except NotTaken as error:
                self._count(f"refused_{error.reason}")
        if not len(self._rosters):
            return
        over = self._rosters.forget(self._state())
        if over:
            self._standing.forget(over)
            self._gatherings.forget(over)

    def close(self) -> None:
        """Repeat nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def missing(self) -> dict[Barrier, tuple[int, ...]]:
        """Ranks that each barrier gathered here still waits for."""
        return self._gatherings.missing()

    # --- messages ---

    def _take(self, peer: str, message: BarrierMessage) -> None:
        roster = self._rosters.of(self._state(), message.barrier.generation)
        if roster is None:
            # Over, or not known here yet; an agent that still waits will say so again.
            self._count("refused_stale")
            return
        try:
            match message:
                case Arrived():
                    self._count("arrivals")
                    now_s = self._monotonic()
                    self._send_all(self._gatherings.arrived(roster, peer, message, now_s))
                case Released():
                    self._go_on(message)
                    self._send_all(self._gatherings.released(message))
                case Awaited():
                    self._wait_on(message)
                case Asked():
                    known = self._standing.answer(message)
                    self._send_all([(peer, known)] if known else [])
        except NotTaken as error:
            self._count(f"refused_{error.reason}")

    def _go_on(self, message: Released) -> None:
        ranks = self._standing.release(message)
        if ranks:
            self._count("releases")
            self._release(message, ranks)

    def _release(self, message: Released, ranks: tuple[int, ...]) -> None:
        of, name = message.barrier.generation, message.barrier.name
        released = control.Released(generation=of.number, name=name, value=message.value)
        self._tell(of, ranks, released)

    def _wait_on(self, message: Awaited) -> None:
        ranks = self._standing.waiting(message.barrier)
        if ranks:
            of, name = message.barrier.generation, message.barrier.name
            awaited = control.Awaited(generation=of.number, name=name, missing=message.missing)
            self._tell(of, ranks, awaited)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._repeat)

    def _repeat(self) -> None:
        self._timer = None
        if not len(self._standing):
            self._pause_s = REPEAT_S
            return
        overdue = self._standing.repeat()
        self._pause_s = min(self._pause_s * 2, REPEAT_MOST_S) if overdue else REPEAT_S
        self._arm()
        self._say_again(overdue)

    def _say_again(self, messages: Iterable[Arrived]) -> None:
        for message in messages:
            self._count("repeats")
            self._to_leader(message)

    def _to_leader(self, message: Arrived) -> None:
        leader = self._raft.leader
        if leader is not None:
            self._send_all([(leader, message)])

    def _send_all(self, outgoing: Iterable[Outgoing]) -> None:
        encoded: tuple[BarrierMessage, bytes] | None = None
        for node, message in outgoing:
            if isinstance(message, Asked):
                self._count("asks")
            if node == self._node:
                self._take(node, message)
                continue
            if encoded is None or encoded[0] is not message:
                encoded = (message, msgspec.msgpack.encode(message))
            self._links.send(node, Channel.BARRIER, encoded[1])

    def _count(self, event: str) -> None:
        self.counters[event] = self.counters.get(event, 0) + 1
