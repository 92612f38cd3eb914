"""What the leader passes on between learners, who have no links with each other.

A rank on one learner needs the rendezvous keys of ranks on another, at once: a report with a new key is passed on as
it came. Views of the cluster need the rest, now and then: a learner that reports is answered with the newest reports
of all in one frame, its own among them, every ``PASS_ON_S``, and less often where they are many. The frame is made
once for all that ask within ``DIGEST_AGE_S``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from distroml.consensus.frames import Channel
from distroml.reports import NodeReport

PASS_ON_S: Final = 2.0
PASS_ON_MOST_S: Final = 10.0
PASS_ON_BYTES_PER_S: Final = 8 * 1024 * 1024
"""What all learners together are told of each other, as far as ``PASS_ON_MOST_S`` allows."""
DIGEST_AGE_S: Final = 0.25
MAX_DIGEST_BYTES: Final = 1024 * 1024
"""Reports in one frame; a larger one goes alone."""

_ARRAY_32: Final = struct.Struct(">BI")


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class ReportRelay:
    """`learners` tells who is one; `leads` whether this node is the one that relays."""

    def __init__(
        self,
        *,
        links: _Links,
        learners: Callable[[str], bool],
        leads: Callable[[], bool],
        monotonic: Callable[[], float],
    ) -> None:
        self._links, self._learners = links, learners
        self._leads, self._monotonic = leads, monotonic
        self._newest: dict[str, bytes] = {}
        self._bytes = 0
        """Of all newest reports."""
        self._keys: dict[str, frozenset[tuple[str, int, str]]] = {}
        """Those that were passed on, by learner."""
        self._told_s: dict[str, float] = {}
        """When each learner was told of the others."""
        self._checked_s = float("-inf")
        self._digests: tuple[bytes, ...] = ()
        self._digests_s = float("-inf")
        """When they were made."""

    def take(self, report: NodeReport, body: bytes) -> None:
        """A report that a learner sent, as it came."""
        if not self._leads():
            self._forget(tuple(self._newest))
            return
        if not self._learners(report.node):
            return
        self._bytes += len(body) - len(self._newest.get(report.node, b""))
        self._newest[report.node] = body
        if self._has_new_keys(report):
            for learner in self._newest:
                if learner != report.node:
                    self._links.send(learner, Channel.REPORT, body)
        now_s = self._monotonic()
        if now_s - self._told_s.get(report.node, float("-inf")) >= self._pause_s():
            self._forget_gone(now_s)
            self._told_s[report.node] = now_s
            if len(self._newest) > 1:
                for digest in self._newest_digests(now_s):
                    self._links.send(report.node, Channel.REPORT, digest)

    def _newest_digests(self, now_s: float) -> tuple[bytes, ...]:
        if now_s - self._digests_s >= DIGEST_AGE_S:
            self._digests, self._digests_s = tuple(_digests(self._newest.values())), now_s
        return self._digests

    def _has_new_keys(self, report: NodeReport) -> bool:
        if not any(fact.rendezvous for fact in report.workers):
            self._keys.pop(report.node, None)
            return False
        keys = frozenset(
            (fact.run_id, fact.generation, key)
            for fact in report.workers
            for key in fact.rendezvous
        )
        new = not keys <= self._keys.get(report.node, frozenset())
        self._keys[report.node] = keys
        return new

    def _pause_s(self) -> float:
        wanted_s = self._bytes * len(self._newest) / PASS_ON_BYTES_PER_S
        return min(max(PASS_ON_S, wanted_s), PASS_ON_MOST_S)

    def _forget_gone(self, now_s: float) -> None:
        """Drop whoever is no learner any more; at most every ``PASS_ON_S``."""
        if now_s - self._checked_s >= PASS_ON_S:
            self._checked_s = now_s
            self._forget([name for name in self._newest if not self._learners(name)])

    def _forget(self, names: Iterable[str]) -> None:
        self._digests_s = float("-inf")
        for name in names:
            self._bytes -= len(self._newest.pop(name))
            self._keys.pop(name, None)
            self._told_s.pop(name, None)


def _digests(bodies: Iterable[bytes]) -> Iterator[bytes]:
    """Encoded lists of reports that are encoded already."""
    part: list[bytes] = []
    size_bytes = 0
    for body in bodies:
        if part and size_bytes + len(body) > MAX_DIGEST_BYTES:
            yield _encoded_list(part)
            part, size_bytes = [], 0
        part.append(body)
        size_bytes += len(body)
    if part:
        yield _encoded_list(part)


def _encoded_list(encoded: list[bytes]) -> bytes:
    """MessagePack's ``array 32`` of what is MessagePack already: nothing is decoded to be passed on."""
    return b"".join((_ARRAY_32.pack(0xDD, len(encoded)), *encoded))
