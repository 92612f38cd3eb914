"""Who hangs: from what agents see of the ranks of a generation to one culprit and a sentence.

Pure; used by ``runtime.reconciler``. A rank that stands still stops all others within a step, since they wait for it
in a collective. So there is nothing to see but that nobody advances, and the culprit is the one that does not wait:
its process is stopped, or its control thread says nothing, or it is busy outside of collectives, or it came to the
collective last. How long is too long is learnt from the steps of the job itself; of an evaluation nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime.control import PULSE_S

SILENT_S = 4 * PULSE_S
"""A control thread that says nothing for longer does not run."""


class HangSettings(Struct, frozen=True, gc=False, kw_only=True):
    """How long nothing may happen."""

    stopped_grace_s: float = 2.0
    """How long a process may be stopped (a debugger, a job control signal)."""
    steps: float = 10.0
    """Deadline in slowest steps of the job."""
    floor_s: float = 10.0
    ceiling_s: float = 600.0
    """Also the deadline while no step has been timed, and of an evaluation."""


class Hang(Struct, frozen=True, kw_only=True):
    """The rank to blame."""

    rank: int
    said: str
    """End of a sentence that starts with the worker."""
    since_s: float
    """For how long."""


def find_hang(
    ranks: Mapping[int, WorkerFact], still_s: float, settings: HangSettings
) -> Hang | None:
    """The rank that keeps a generation from going on, if one does.

    Args:
        ranks: what is known of each rank, as of reports that are not old.
        still_s: for how long none of them has advanced, or begun or ended an evaluation.
    """
    return _stopped(ranks, settings) or _without_progress(ranks, still_s, settings)


def deadline_s(ranks: Mapping[int, WorkerFact], settings: HangSettings) -> float:
    """How long a step, or an evaluation, may take at most before somebody is said to hang."""
    if any(fact.evaluating for fact in ranks.values()):
        return settings.ceiling_s
    slowest_s = max((fact.timing.slowest_s for fact in ranks.values() if fact.timing), default=0.0)
    if slowest_s <= 0:
        return settings.ceiling_s
    return min(settings.ceiling_s, max(settings.floor_s, settings.steps * slowest_s))


def _stopped(ranks: Mapping[int, WorkerFact], settings: HangSettings) -> Hang | None:
    worst = max(ranks, key=lambda rank: (ranks[rank].stopped_s, -rank), default=None)
    if worst is None or ranks[worst].stopped_s < settings.stopped_grace_s:
        return None
    stopped_s = ranks[worst].stopped_s
    return Hang(rank=worst, said=f"is stopped, for {stopped_s:.1f} s", since_s=stopped_s)


def _without_progress(
    ranks: Mapping[int, WorkerFact], still_s: float, settings: HangSettings
) -> Hang | None:
    if not ranks or any(fact.phase is not WorkerPhase.TRAINING for fact in ranks.values()):
        return None
    if still_s < deadline_s(ranks, settings):
        return None
    said = f"hangs: no rank completed a step for {still_s:.1f} s"
    silent = [rank for rank, fact in ranks.items() if fact.silent_s >= SILENT_S]
    if silent:
        rank = max(silent, key=lambda one: (ranks[one].silent_s, -one))
        return Hang(
            rank=rank,
            said=f"{said}, and it said nothing for {ranks[rank].silent_s:.1f} s",
            since_s=still_s,
        )
    busy = [rank for rank, fact in ranks.items() if fact.waiting_s <= 0]
    if busy:
        return Hang(rank=min(busy), said=f"{said}, and it waits for nobody", since_s=still_s)
    last = min(ranks, key=lambda one: (ranks[one].waiting_s, one))
    return Hang(rank=last, said=f"{said}, and it was the last to wait", since_s=still_s)
