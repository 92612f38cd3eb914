"""Events of jobs for streams: bounded replay by log position, and a wake-up per reader.

``node`` wires it to the replica: ``JobEvents(replica.recent_events)`` and ``replica.listen(events.applied)``.
Readers pull, so that a slow one costs nothing: there is no queue per reader. A position is a log index and the
ordinal of the event among those of its entry, hence the same on every node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from msgspec import Struct

from distroml.commands import Entry, Outcome
from distroml.http.wakes import Wakes
from distroml.model import Event


class Position(Struct, frozen=True, order=True, array_like=True):
    """The place of the next event to send."""

    index: int
    ordinal: int = 0


class JobEvents:
    """Replays recent events and wakes those who wait for new ones.

    Args:
        recent: the last events of a job in log order, bounded (``Replica.recent_events``).
    """

    def __init__(self, recent: Callable[[str], Iterable[Event]]) -> None:
        self._recent = recent
        self._wakes = Wakes()

    def applied(self, entry: Entry | None, outcome: Outcome, events: tuple[Event, ...]) -> None:
        """Replica listener. Without an entry a snapshot replaced the state: everybody looks again."""
        jobs = {event.job_id for event in events} if entry is not None else self._wakes.jobs
        for job_id in jobs:
            self._wakes.wake(job_id or "")

    def since(
        self, job_id: str, position: Position, submit_index: int
    ) -> tuple[list[tuple[Event, Position]], bool]:
        """Events at or after ``position``, each with the position after it, and whether none is missing."""
        numbered = list(_numbered(self._recent(job_id)))
        following = [(e, Position(p.index, p.ordinal + 1)) for e, p in numbered if p >= position]
        complete = bool(numbered) and (
            numbered[0][1].index == submit_index or numbered[0][1] < position
        )
        return following, complete

    def watch(self, job_id: str, wake: asyncio.Event) -> AbstractContextManager[None]:
        """Set ``wake`` whenever something of the job changes; the reader clears it."""
        return self._wakes.watch(job_id, wake)


def _numbered(events: Iterable[Event]) -> Iterator[tuple[Event, Position]]:
    index, ordinal = -1, 0
    for event in events:
        ordinal = ordinal + 1 if event.index == index else 0
        index = event.index
        yield event, Position(index, ordinal)
