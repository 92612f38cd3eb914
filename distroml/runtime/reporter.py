"""The agent's voice: sends this node's complete facts to its peers, regularly and right after a change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
from msgspec import Struct

from distroml.consensus.peers import Channel
from distroml.reports import NodeReport, WorkerFact

COALESCE_S = 0.005
"""Changes within this time go out as one report."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class ReporterSources(Struct, frozen=True, kw_only=True):
    """Where the parts of a report are read from."""

    workers: Callable[[], tuple[WorkerFact, ...]]
    applied_index: Callable[[], int]
    ready: Callable[[], bool]


class Reporter:
    """Builds and sends ``NodeReport``s.

    Args:
        took: called with each report of this node before it is sent, as if it had been received.
    """

    def __init__(
        self,
        *,
        node: str,
        incarnation: int,
        slots: int,
        peers: Iterable[str],
        links: _Links,
        sources: ReporterSources,
        took: Callable[[NodeReport], None],
        interval_s: float,
    ) -> None:
        self._node = node
        self._incarnation = incarnation
        self._slots = slots
        self._peers = tuple(peers)
        self._links = links
        self._sources = sources
        self._took = took
        self._interval_s = interval_s
        self._sequence = 0
        self._kicked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.draining = False

    def start(self) -> None:
        """Begin to report."""
        self._task = asyncio.create_task(self._run(), name="reporter")

    async def stop(self) -> None:
        """Stop reporting."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def kick(self) -> None:
        """Something changed: report soon."""
        self._kicked.set()

    def send_now(self) -> None:
        """Build a report and send it to all peers that are connected."""
        report = self._build()
        self._took(report)
        body = msgspec.msgpack.encode(report)
        for peer in self._peers:
            self._links.send(peer, Channel.REPORT, body)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._kicked.wait()
                await asyncio.sleep(COALESCE_S)
            self._kicked.clear()
            self.send_now()

    def _build(self) -> NodeReport:
        self._sequence += 1
        return NodeReport(
            node=self._node,
            incarnation=self._incarnation,
            sequence=self._sequence,
            at=time.time(),
            slots=self._slots,
            workers=self._sources.workers(),
            applied_index=self._sources.applied_index(),
            draining=self.draining,
            ready=self._sources.ready(),
            memory_bytes=_resident_bytes(),
            cpu_percent=round(os.getloadavg()[0] * 100 / (os.cpu_count() or 1), 1),
        )


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc is not Linux's."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
