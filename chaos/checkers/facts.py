"""What checkers share: picking records out of a history, limits, and how a violation shows its evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from chaos.records import Record, Violation

History = Sequence[Record]

MAX_EVIDENCE = 6
MAX_LINE_CHARACTERS = 2000
MAX_VIOLATIONS = 25
"""Of one checker; the rest is counted."""

TERMINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED"})

_R = TypeVar("_R", bound=Struct)


class Limits(Struct, frozen=True, kw_only=True):
    """What a cluster is allowed; times and counts scale with the machine and the length of the run."""

    machine_factor: float = 1.0
    """How many times slower than a machine with a core per node this one may be."""
    leader_s: float = 2.0
    progress_s: float = 10.0
    rss_bytes: int = 400 * 1024**2
    """Of one agent."""
    rss_growth_bytes_per_hour: float = 64 * 1024**2
    files: int = 1024
    files_growth: int = 48
    """Open files more at the end than after the warm-up."""
    warm_up_s: float = 60.0
    operations_per_s: float = 1.0
    """Fewest that ended well, for a run to say anything."""
    faults_per_minute: float = 2.0


def of(history: History, kind: type[_R]) -> list[_R]:
    """All records of one kind, in order."""
    return [record for record in history if isinstance(record, kind)]


def line(record: Struct) -> str:
    """A record as it stands in the history, cut where it is very long."""
    text = msgspec.json.encode(record).decode()
    return text if len(text) <= MAX_LINE_CHARACTERS else text[:MAX_LINE_CHARACTERS] + "…"


def violation(
    checker: str,
    what: str,
    evidence: Iterable[Struct] = (),
    *,
    at_s: float | None = None,
    job_id: str | None = None,
) -> Violation:
    """A broken promise with the records that show it; ``at_s`` is by default that of the last of them."""
    shown = list(evidence)
    if at_s is None and shown:
        at_s = getattr(shown[-1], "at_s", None)
    return Violation(
        checker=checker,
        what=what,
        at_s=at_s,
        job_id=job_id,
        evidence=tuple(line(one) for one in shown[:MAX_EVIDENCE]),
    )
