"""The agent's voice: sends this node's complete facts to its peers, regularly and right after a change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
from msgspec import Struct

from distroml.consensus.peers import Channel
from distroml.reports import NodeReport, WorkerFact

GATHER_S = 0.001
"""How long a report waits for what belongs to the same change: workers that were killed together, a rank's keys."""
PAUSE_PER_REPORT = 4.0
"""Pause after a report in parts of the time that it took; changes meanwhile go out as one."""
MAX_REPORT_BYTES = 3 * 1024 * 1024
"""Under the frame limit of the peer links; a larger report goes without its less needed parts."""
_log = logging.getLogger(__name__)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class ReporterSources(Struct, frozen=True, kw_only=True):
    """Where the parts of a report are read from."""

    workers: Callable[[], tuple[WorkerFact, ...]]
    applied_index: Callable[[], int]
    ready: Callable[[], bool]
    workers_since: Callable[[], int] = lambda: 0


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
        peers: Callable[[], Iterable[str]],
        links: _Links,
        sources: ReporterSources,
        took: Callable[[NodeReport], None],
        interval_s: float,
    ) -> None:
        self._node = node
        self._incarnation = incarnation
        self._slots = slots
        self._peers = peers
        self._links = links
        self._sources = sources
        self._took = took
        self._interval_s = interval_s
        self._sequence = 0
        self._kicked = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        """Runs from ``start`` to ``stop``."""
        self.draining = False
        self.failures = 0
        """Reports that could not be made or sent."""

    def start(self) -> None:
        """Begin to report."""
        self.task = asyncio.create_task(self._run(), name="reporter")

    async def stop(self) -> None:
        """Stop reporting."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def kick(self) -> None:
        """Something changed: report soon."""
        self._kicked.set()

    def send_now(self) -> None:
        """Build a report and send it to all peers that are connected."""
        report = self._build()
        self._took(report)
        body = _encoded(report)
        for peer in tuple(self._peers()):
            self._links.send(peer, Channel.REPORT, body)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._kicked.wait()
                await asyncio.sleep(max(GATHER_S, due_s - loop.time()))
            self._kicked.clear()
            began_s = loop.time()
            try:
                self.send_now()
            except (
                Exception
            ):  # a node that falls silent for good is taken for dead, and its workers with it
                self.failures += 1
                _log.exception("a report could not be sent")
            now_s = loop.time()
            due_s = now_s + PAUSE_PER_REPORT * (now_s - began_s)

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
            workers_since=self._sources.workers_since(),
            memory_bytes=_resident_bytes(),
            cpu_percent=round(os.getloadavg()[0] * 100 / (os.cpu_count() or 1), 1),
        )


def _encoded(report: NodeReport) -> bytes:
    body = msgspec.msgpack.encode(report)
    for spared in (_without_words, _without_keys):
        if len(body) <= MAX_REPORT_BYTES:
            break
        _log.warning("a report of %d bytes is cut (%s)", len(body), spared.__doc__)
        workers = tuple(spared(fact) for fact in report.workers)
        report = msgspec.structs.replace(report, workers=workers)
        body = msgspec.msgpack.encode(report)
    return body


def _without_words(fact: WorkerFact) -> WorkerFact:
    """what failed workers wrote last is left out"""
    failure = fact.failure and msgspec.structs.replace(fact.failure, traceback="")
    return msgspec.structs.replace(fact, last_lines=(), failure=failure)


def _without_keys(fact: WorkerFact) -> WorkerFact:
    """rendezvous keys are left out; generations of this size cannot start"""
    return msgspec.structs.replace(fact, rendezvous={})


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc is not Linux's."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
