"""Whether what this node has recorded of its ranks is on another node by now.

Pushes are not acknowledged and need not be: what gets lost is pulled later. But a step that is part of a committed checkpoint is
never trained again, so if this node's disk were lost before others have the step's records, nobody could make them anew. So
whoever is about to say that a shard is safe asks here first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.records import StreamKey
from distroml.runtime.store.sync import MAX_SPANS, Span

ASK_AGAIN_S = 0.02
MAX_HELD = 4096
"""Streams of which it is remembered how much others have."""


class Sharing:
    """Asks other nodes how much they have of the streams that originate here.

    Args:
        others: whether there is any other node that could have them.
        ask: sends a question for the heads of some streams to all nodes that can be reached.
    """

    def __init__(
        self,
        store: HistoryStore,
        *,
        others: Callable[[], bool],
        ask: Callable[[tuple[StreamKey, ...]], object],
    ) -> None:
        self._store, self._others, self._ask = store, others, ask
        self._held: dict[StreamKey, int] = {}
        """The most that another node said to have, of streams that were asked for."""
        self._told = asyncio.Event()

    async def shared(self, job_id: str) -> None:
        """Return once other nodes have what this one has recorded of a job by now; at once where there are no others."""
        due = self._store.own_heads(job_id)
        while self._others() and (lacking := self._lacking(due)):
            for key in lacking:
                self._held.setdefault(key, 0)
            while len(self._held) > MAX_HELD:
                del self._held[next(iter(self._held))]
            self._store.hurry()
            self._told.clear()
            self._ask(tuple(lacking[:MAX_SPANS]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self._told.wait()

    def _lacking(self, due: dict[StreamKey, int]) -> list[StreamKey]:
        return [key for key, head in due.items() if self._held.get(key, 0) < head]

    def take(self, spans: Iterable[Span]) -> None:
        """What another node says that it has."""
        for span in spans:
            if self._held.get(span.key, span.next) < span.next:
                self._held[span.key] = span.next
                self._told.set()

    def forget(self, job_id: str) -> None:
        """A job was removed."""
        for key in [key for key in self._held if key.job_id == job_id]:
            del self._held[key]
