"""The live copy of ``ClusterState`` on one node: what Raft applies to and everyone else reads from.

Feeds each committed entry to the pure state machine, keeps the newest state, and tells listeners what changed.
Listeners run inside the event loop's turn and must only note and wake; they never raise.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from distroml.commands import Entry, Outcome, decode_entry
from distroml.consensus import machine
from distroml.consensus.raft_types import UnreadableEntry
from distroml.consensus.state import ClusterState, decode_state, encode_state
from distroml.errors import UNDECODABLE
from distroml.model import Event, Job

MAX_EVENTS_PER_JOB = 256
"""Recent events kept per job so that a stream that reconnects misses none."""
MAX_EVENTS = 100_000
"""Recent events kept in all; the jobs that changed longest ago lose theirs first."""

_log = logging.getLogger(__name__)

Listener = Callable[[Entry | None, Outcome, tuple[Event, ...]], None]


class Replica:
    """Implements ``raft.StateMachine`` over ``ClusterState``."""

    def __init__(self) -> None:
        self.state = ClusterState()
        self._listeners: list[Listener] = []
        self._events: dict[str, deque[Event]] = {}
        """By job, the one that changed last at the end."""
        self._events_kept = 0

    def listen(self, listener: Listener) -> None:
        """Call ``listener(entry, outcome, events)`` after each applied entry.

        Without an entry a snapshot replaced the state: anything may have changed.
        """
        self._listeners.append(listener)

    def apply(self, index: int, data: bytes) -> None:
        """Apply one committed entry. Total: what cannot be done becomes a refused outcome.

        Raises:
            UnreadableEntry: the bytes are no entry of this version, and the state is as it was. Leaders append
                only what they read themselves, so a newer version wrote it: to pass over what others apply would
                make this copy another one for good.
        """
        if index <= self.state.index:
            return  # Raft may hand an entry again after a restart from a snapshot
        try:
            entry = decode_entry(data)
        except UNDECODABLE as error:
            raise UnreadableEntry(index, str(error)) from error
        applied = machine.apply_entry(self.state, index, entry)
        self.state = applied.state
        self._keep(applied.events)
        self._tell(entry, applied.outcome, applied.events)

    def snapshot(self) -> bytes:
        """The state's encoding, for a Raft snapshot."""
        return encode_state(self.state)

    def restore(self, index: int, blob: bytes) -> None:
        """Replace the state by a snapshot's.

        Raises:
            ValueError: the blob is not a state that this version reads.
        """
        state = decode_state(blob)
        if state.index > self.state.index or index > self.state.index:
            known, self.state = self.state.jobs, state
            for job_id in list(self._events):
                if _changed_at(known, job_id) != _changed_at(state.jobs, job_id):
                    self._drop_events(
                        job_id
                    )  # by an entry that this node never saw: some are missing
            self._tell(None, Outcome(index), ())

    def recent_events(self, job_id: str) -> Iterable[Event]:
        """The last events of a job in order, at most ``MAX_EVENTS_PER_JOB``."""
        return tuple(self._events.get(job_id, ()))

    def _keep(self, events: tuple[Event, ...]) -> None:
        for event in events:
            if event.job_id is None:
                continue
            if event.type == "removed":
                self._drop_events(event.job_id)
                continue
            kept = self._events.pop(event.job_id, None) or deque(maxlen=MAX_EVENTS_PER_JOB)
            self._events_kept += len(kept) < MAX_EVENTS_PER_JOB
            kept.append(event)
            self._events[event.job_id] = kept
        while self._events_kept > MAX_EVENTS:
            self._drop_events(next(iter(self._events)))

    def _drop_events(self, job_id: str) -> None:
        self._events_kept -= len(self._events.pop(job_id, ()))

    def _tell(self, entry: Entry | None, outcome: Outcome, events: tuple[Event, ...]) -> None:
        for listener in self._listeners:
            try:
                listener(entry, outcome, events)
            except Exception:  # a listener's defect must not stop the log (AUDIT S10)
                _log.exception("a listener of applied entries failed")


def _changed_at(jobs: Mapping[str, Job], job_id: str) -> int | None:
    job = jobs.get(job_id)
    return job.change_index if job else None
