"""Clients that follow a job's streams over several nodes, resuming where they broke off."""

from __future__ import annotations

import asyncio
import hashlib
import random
from contextlib import aclosing
from typing import Any

from chaos.records import EventSeen, Streamed
from chaos.target import Target
from distroml.client_async import AsyncClient
from distroml.errors import DistroMLError, InvalidRequest

TYPES: dict[str, tuple[str, ...]] = {
    "metrics": ("metric",),
    "logs": ("log",),
    "events": ("state", "checkpoint"),
}
CONNECTION_S = (1.0, 8.0)
"""How long a follower stays at one node before it goes on at another, drawn anew each time."""
ATTEMPT_S = 3.0
"""A node that cannot be reached for so long is left."""
PAUSE_S = 0.2
ERROR_CHARACTERS = 200


class Follower:
    """Follows one stream of one job to its end.

    Args:
        stream: metrics, logs or events.
        restless: leave a node now and then although it answers.
    """

    def __init__(
        self,
        target: Target,
        job_id: str,
        stream: str,
        rng: random.Random,
        *,
        client: str,
        restless: bool = True,
    ) -> None:
        self._target = target
        self._job_id = job_id
        self._stream = stream
        self._rng = rng
        self._client = client
        self._restless = restless
        self._cursor: str | None = None
        self._items: list[str] = []
        self._connections = 0
        self._ended = False
        self._error = ""

    async def run(self, *, reference_node: str | None = None) -> None:
        """Until the end event or until cancelled; either way what was delivered is recorded."""
        try:
            while not self._ended and not self._error:
                node = reference_node or self._rng.choice(sorted(self._target.nodes))
                await self._at(node)
                if not self._ended:
                    await asyncio.sleep(PAUSE_S)
        finally:
            self._target.history.write(
                Streamed(
                    at_s=self._target.clock(),
                    client=self._client,
                    job_id=self._job_id,
                    stream=self._stream,
                    items=tuple(self._items),
                    connections=self._connections,
                    ended=self._ended,
                    reference=reference_node is not None,
                    error=self._error,
                )
            )

    async def _at(self, node: str) -> None:
        stay_s = self._rng.uniform(*CONNECTION_S) if self._restless else None
        self._connections += 1
        try:
            async with (
                asyncio.timeout(stay_s),
                AsyncClient(self._target.nodes[node].url, timeout_s=ATTEMPT_S) as client,
                aclosing(
                    client.stream(self._job_id, self._cursor, types=TYPES[self._stream])
                ) as events,
            ):
                async for event in events:
                    self._take(event, node)
        except TimeoutError:
            pass
        except InvalidRequest as error:  # a cursor that a node gave out is refused by another
            self._error = str(error)[:ERROR_CHARACTERS]
        except DistroMLError:
            pass  # this node cannot now (it is down, or does not know the job yet): try elsewhere

    def _take(self, event: dict[str, Any], node: str) -> None:
        self._cursor = event.get("cursor", self._cursor)
        if event["type"] == "end":
            self._ended = True
        elif event["type"] in TYPES[self._stream]:
            self._items.append(item_of(event))
            if self._stream == "events":
                self._tell(event, node)

    def _tell(self, event: dict[str, Any], node: str) -> None:
        name = event["type"] if event["type"] == "state" else f"checkpoint_{event['event']}"
        kept = ("status", "generation", "step", "reason")
        self._target.history.write(
            EventSeen(
                at_s=self._target.clock(),
                node=node,
                log_index=event["index"],
                job_id=self._job_id,
                name=name,
                data={field: event[field] for field in kept if field in event},
            )
        )


def item_of(event: dict[str, Any]) -> str:
    """What names an event of a stream, and what it says; equal where it is the same one."""
    kind = event["type"]
    if kind == "metric":
        place = f"{event['generation']}.{event['rank']}.{event['step']}"
        loss = event.get("loss")
        told = "" if loss is None else float(loss).hex()
        return f"{place}={told}" if "eval_loss" not in event else f"{place}~{told}"
    if kind == "log":
        line = hashlib.sha256(event["line"].encode()).hexdigest()[:12]
        return f"{event['generation']}.{event['rank']}:{event['at']} {line}"
    what = event["status"] if kind == "state" else f"{event['event']} {event['step']}"
    return f"{event['index']}:{kind} {what}"
