"""One source of stream messages for WebSocket and SSE: a job's metrics, logs, states and resources in order.

Each reader pulls its own ``follow``; nothing is queued for it, so a slow one costs a connection and no more. Every
message that can be missed carries a cursor, which is a log position and a history position and therefore means
the same at every node. Delivery from a cursor is exactly once for metrics and logs; for states too while the
node still keeps the events, after that the present state stands for those that are gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct

from distroml.errors import InvalidRequest, Unavailable
from distroml.http.cluster_views import resources_view
from distroml.http.cursor import Cursor, decode_cursor
from distroml.http.job_events import Position
from distroml.http.services import LogLine, MetricPoint, Services
from distroml.http.views import Timestamp, WorkerView, facts_of, job_view, timestamp
from distroml.model import Event, Job

BATCH_RECORDS = 500
"""Records read from history at a time; bounds what one stream holds in memory."""
MESSAGES_PER_TURN = 32
"""Made and sent at once before others get their turn: a socket that takes all never makes the sender wait."""
END_SETTLE_S = 1.0
"""A finished job's stream ends when history was quiet for this long: the last batches travel by peer link."""
END_SETTLE_MOST_S = 5.0
CATCH_UP_S = 2.0
"""How long a cursor may be ahead of this node before the reader is sent elsewhere."""
CATCH_UP_POLL_S = 0.02
NOW = "now"
"""A cursor that skips everything before the connection."""


class MessageType(StrEnum):
    """What a reader may ask for with ``types=``."""

    METRIC = "metric"
    STATE = "state"
    LOG = "log"
    CHECKPOINT = "checkpoint"
    RESOURCE = "resource"


class MetricMessage(Struct, frozen=True, tag="metric", tag_field="type", kw_only=True):
    """One completed step at one rank; the metrics themselves (``loss``, ``throughput``, …) are members too."""

    step: int
    epoch: int
    generation: int
    rank: int
    at: Timestamp
    cursor: str


class StateMessage(Struct, frozen=True, tag="state", tag_field="type", kw_only=True):
    """The job came into this status, for this reason."""

    status: str
    reason: str
    generation: int
    index: int
    at: Timestamp
    cursor: str


class CheckpointMessage(Struct, frozen=True, tag="checkpoint", tag_field="type", kw_only=True):
    """A checkpoint was committed, abandoned, found corrupt or retired."""

    event: str
    step: int
    reason: str
    index: int
    at: Timestamp
    cursor: str


class LogMessage(Struct, frozen=True, tag="log", tag_field="type", kw_only=True):
    """One line of a worker's output."""

    rank: int
    generation: int
    line: str
    at: Timestamp
    cursor: str


class ResourceMessage(Struct, frozen=True, tag="resource", tag_field="type", kw_only=True):
    """Where the job's workers are and what is free; sent when it changed, at most once a second."""

    workers: list[WorkerView]
    slots_total: int
    slots_free: int
    nodes: dict[str, str]
    step: int
    total_steps: int | None
    epoch: int
    eta_s: float | None


class EndMessage(Struct, frozen=True, tag="end", tag_field="type", kw_only=True):
    """Nothing follows: the job ended (or was removed)."""

    status: str
    reason: str
    cursor: str


MESSAGES = (
    MetricMessage,
    StateMessage,
    CheckpointMessage,
    LogMessage,
    ResourceMessage,
    EndMessage,
)


class Message(Struct, frozen=True):
    """One encoded message; ``cursor`` is empty where resuming after it makes no sense."""

    type: str
    data: bytes
    cursor: str = ""


HEARTBEAT = Message("heartbeat", b"")
"""Keeps an idle SSE connection known to be alive; WebSockets have their own pings."""


class _Settling:
    """Whether the records of a job that is over have stopped coming."""

    def __init__(self) -> None:
        self._over_since: float | None = None
        self._quiet_since = 0.0

    def done(self, now: float, *, fresh: bool) -> bool:
        if self._over_since is None:
            self._over_since = self._quiet_since = now
        if fresh:
            self._quiet_since = now
        return (
            now - self._quiet_since >= END_SETTLE_S or now - self._over_since >= END_SETTLE_MOST_S
        )


class Reader:
    """One reader's place in one job's stream.

    Raises (from ``open``):
        InvalidRequest: the cursor cannot be read.
        Unavailable: the cursor is ahead of this node, which has yet to catch up.
    """

    def __init__(
        self, services: Services, job: Job, cursor: Cursor | None, types: frozenset[MessageType]
    ) -> None:
        self._services = services
        self._history = services.history
        self._job = job
        self._types = types
        index = services.state().index
        self._greet = cursor is None
        self._from_now = False
        self._position = cursor.position if cursor else Position(index + 1)
        self._at = cursor.history if cursor else None
        self._told: tuple[str, str, int] | None = None
        self._resource: ResourceMessage | None = None
        self._resource_due = 0.0

    @classmethod
    async def open(
        cls, services: Services, job: Job, cursor: str | None, types: frozenset[MessageType]
    ) -> Reader:
        """A reader from ``cursor``; None: the present state and all records kept; ``now``: the state and new ones.

        A reader from now is told the state whatever its types: it has to know where that is, or it would miss what
        comes before it goes on at another node.
        """
        if cursor is None or cursor == NOW:
            reader = cls(services, job, None, types)
            if cursor == NOW:
                reader._from_now = True
                reader._at = services.history.end_position(job.job_id)
            return reader
        place = decode_cursor(cursor, job.job_id)
        await _catch_up(services, place.position)
        try:
            await services.history.read_after(job.job_id, place.history, 1)
        except ValueError:
            raise InvalidRequest(
                "The cursor does not fit this job's history.", field="cursor"
            ) from None
        return cls(services, job, place, types)

    async def follow(self) -> AsyncGenerator[Message]:
        """All messages until the job's end; the last one is ``end``."""
        job_id = self._job.job_id
        wake = asyncio.Event()
        settling = _Settling()
        beat_at = time.monotonic()
        with self._services.events.watch(job_id, wake), self._history.watch(job_id, wake):
            if self._greet:
                state = self._state_now()
                if self._from_now or MessageType.STATE in self._types:
                    yield state
            while True:
                wake.clear()
                for message in self._changes():
                    yield message
                batch = await self._history.read_after(job_id, self._at, BATCH_RECORDS)
                for number, (record, position) in enumerate(batch.records, 1):
                    if number % MESSAGES_PER_TURN == 0:
                        await asyncio.sleep(0)
                    self._at = position
                    if (told := self._record(record)) is not None:
                        yield told
                self._at = batch.position
                if (resource := self._resource_changed()) is not None:
                    yield resource
                if batch.more:
                    continue
                over = self._over()
                if over and settling.done(time.monotonic(), fresh=bool(batch.records)):
                    yield self._end()
                    return
                await self._wait(wake, END_SETTLE_S / 4 if over else None)
                if time.monotonic() - beat_at >= self._services.settings.stream_heartbeat_s:
                    beat_at = time.monotonic()
                    yield HEARTBEAT

    async def _wait(self, wake: asyncio.Event, most_s: float | None) -> None:
        try:
            async with asyncio.timeout(most_s or self._services.settings.stream_resource_s):
                await wake.wait()
        except TimeoutError:
            pass

    def _changes(self) -> list[Message]:
        job = self._services.state().jobs.get(self._job.job_id)
        if job is None:
            return []
        self._job = job
        events, complete = self._services.events.since(job.job_id, self._position, job.submit_index)
        if not complete and job.change_index >= self._position.index:
            return self._filtered(self._state_now())
        messages = []
        for event, position in events:
            self._position = position
            messages += self._event(event)
        present = (job.status.value, job.reason, job.generation_number)
        if self._told is not None and self._told != present:
            messages += self._filtered(self._state_now())
        return messages

    def _event(self, event: Event) -> list[Message]:
        common: dict[str, Any] = {"index": event.index, "at": timestamp(event.at)}
        data = event.data
        if event.type == MessageType.STATE:
            told = (str(data["status"]), str(data["reason"]), int(data["generation"]))
            self._told = told
            status, reason, generation = told
            state = StateMessage(
                status=status, reason=reason, generation=generation, cursor=self._cursor(), **common
            )
            return self._filtered(_encoded(MessageType.STATE, state, state.cursor))
        if event.type.startswith(MessageType.CHECKPOINT):
            checkpoint = CheckpointMessage(
                event=event.type.removeprefix("checkpoint_").replace("checkpoint", "committed"),
                step=int(data.get("step", 0)),
                reason=str(data.get("reason", "")),
                cursor=self._cursor(),
                **common,
            )
            return self._filtered(_encoded(MessageType.CHECKPOINT, checkpoint, checkpoint.cursor))
        return []

    def _state_now(self) -> Message:
        """The present state; everything up to the applied index counts as told."""
        state = self._services.state()
        job = state.jobs.get(self._job.job_id, self._job)
        self._position = Position(state.index + 1)
        self._told = (job.status.value, job.reason, job.generation_number)
        message = StateMessage(
            status=job.status.value,
            reason=job.reason,
            generation=job.generation_number,
            index=state.index,
            at=timestamp(job.changed_at),
            cursor=self._cursor(),
        )
        return _encoded(MessageType.STATE, message, message.cursor)

    def _record(self, record: MetricPoint | LogLine) -> Message | None:
        if isinstance(record, LogLine):
            if MessageType.LOG not in self._types:
                return None
            log = LogMessage(
                rank=record.rank,
                generation=record.generation,
                line=record.line,
                at=timestamp(record.at),
                cursor=self._cursor(),
            )
            return _encoded(MessageType.LOG, log, log.cursor)
        if MessageType.METRIC not in self._types:
            return None
        metric = MetricMessage(
            step=record.step,
            epoch=record.epoch,
            generation=record.generation,
            rank=record.rank,
            at=timestamp(record.at),
            cursor=self._cursor(),
        )
        # A metric of the user's own that has the name of a member gives way to the member.
        return _encoded(MessageType.METRIC, metric, metric.cursor, record.values)

    def _resource_changed(self) -> Message | None:
        now = time.monotonic()
        if MessageType.RESOURCE not in self._types or now < self._resource_due:
            return None
        self._resource_due = now + self._services.settings.stream_resource_s
        state, observed = self._services.state(), self._services.observed()
        view = job_view(self._job, facts_of(observed), {}, time.time())
        cluster = resources_view(state, observed)
        message = ResourceMessage(
            workers=view.workers,
            slots_total=cluster.slots.total,
            slots_free=cluster.slots.free,
            nodes={name: node.status.value for name, node in sorted(state.nodes.items())},
            step=view.step,
            total_steps=view.total_steps,
            epoch=view.epoch,
            eta_s=view.eta_s,
        )
        if message == self._resource:
            return None
        self._resource = message
        return _encoded(MessageType.RESOURCE, message)

    def _over(self) -> bool:
        return self._job.terminal or self._job.job_id not in self._services.state().jobs

    def _end(self) -> Message:
        removed = self._job.job_id not in self._services.state().jobs
        end = EndMessage(
            status=self._job.status.value,
            reason="the job was removed" if removed else self._job.reason,
            cursor=self._cursor(),
        )
        return _encoded("end", end, end.cursor)

    def _cursor(self) -> str:
        return Cursor(self._job.job_id, self._position, self._at).encode()

    def _filtered(self, message: Message) -> list[Message]:
        return [message] if message.type in self._types else []


async def _catch_up(services: Services, position: Position) -> None:
    """A reader that comes from another node may know of an entry that is still on its way to this one."""
    deadline = time.monotonic() + CATCH_UP_S
    while position.index > services.state().index + 1:
        if time.monotonic() >= deadline:
            raise Unavailable(
                f"This node has applied the log up to {services.state().index} and the cursor is "
                "ahead of it; try again shortly or at another node."
            )
        await asyncio.sleep(CATCH_UP_POLL_S)


def _encoded(
    type_: str, message: Struct, cursor: str = "", values: Mapping[str, float] | None = None
) -> Message:
    if values is None:
        return Message(type_, msgspec.json.encode(message), cursor)
    return Message(type_, msgspec.json.encode({**values, **msgspec.to_builtins(message)}), cursor)
