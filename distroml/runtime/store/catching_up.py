"""Whether this node has caught up with what others recorded, for whoever is about to read history.

A node that comes back, or was cut off, lacks what was recorded meanwhile. It asks each peer how much that one has, and pulls
what it lacks; until that is over, or takes too long, readers wait: a series with a hole in it looks like a whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

START_S = 5.0
"""How long a node that starts may take until it knows which jobs there are."""
COMPARISON_S = 3.0
"""How long readers wait for one peer."""
LOOK_S = 0.05

_START = ""
"""In the place of a peer: no name is empty."""


class CatchingUp:
    """The comparisons with peers that are not over.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due_s = {_START: clock() + START_S}
        """By peer: until when readers wait for it."""
        self._awaited: dict[str, set[str] | None] = {_START: None}
        """By peer: the jobs of which it has yet to tell how much it has; None: it has yet to tell which differ."""
        self._news = asyncio.Event()

    @property
    def started(self) -> bool:
        """Whether this node knows which jobs there are, and peers were asked."""
        return _START not in self._due_s

    def start(self, peers: Collection[str]) -> None:
        """All that are connected are asked now."""
        for peer in peers:
            self.ask(peer)
        self.drop(_START)

    def ask(self, peer: str) -> None:
        """A peer is asked how much it has of which job."""
        self._due_s[peer], self._awaited[peer] = self._clock() + COMPARISON_S, None

    def drop(self, peer: str) -> None:
        """Nothing is to be had of it any more, or not now."""
        if self._due_s.pop(peer, None) is not None:
            del self._awaited[peer]
            self._news.set()

    def compared(self, peer: str, differing: Collection[str]) -> None:
        """It told how much it has; of these jobs it has something else, and is asked for more."""
        if peer in self._awaited and self._awaited[peer] is None:
            self._awaited[peer] = set(differing)

    def told(self, peer: str, jobs: Collection[str]) -> None:
        """It told how much it has of each stream of these jobs."""
        awaited = self._awaited.get(peer)
        if awaited is not None:
            awaited.difference_update(jobs)

    def settle(self, lacks: Callable[[str], bool]) -> None:
        """End the comparisons that are over, or take too long.

        Args:
            lacks: whether this node has yet to get something that the peer said to have.
        """
        now_s = self._clock()
        for peer, due_s in list(self._due_s.items()):
            over = self._awaited[peer] == set() and not lacks(peer)
            if over or due_s <= now_s:
                self.drop(peer)

    async def finished(self) -> bool:
        """Return once no comparison is open; whether that took any time."""
        waited = bool(self._due_s)
        while self._due_s:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._news.wait()
        return waited
