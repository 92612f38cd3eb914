"""Promise: all nodes apply one log, so a job is at each log index in one state only, and goes through it once.

Every answer and every look at a job is a fact: at this index it has this state, generation and so on. Judged by:

- equal index means equal facts, whichever node told them;
- by rising index the generation and the number of restarts never fall, and the generation never falls to an older one;
- the state changes along the table of transitions only (several at once between two looks), and what has ended stays;
- a job that was acknowledged is known to every later state.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from msgspec import Struct

from chaos.checkers.facts import TERMINAL, History, Limits, of, violation
from chaos.records import JobEnded, JobSeen, Operation, Outcome, Violation
from distroml.model import TRANSITIONS

NAME = "one_history"


UNTOLD = -1


class Fact(Struct, frozen=True):
    """What a job was at a log index, as one record tells it; None where that does not say."""

    index: int
    state: str | None
    generation: int | None
    restarts: int | None
    checkpoint: int | None
    """Step of the newest checkpoint; ``UNTOLD`` where the record does not say, None where there is none."""
    source: Any


def check(history: History, limits: Limits) -> list[Violation]:
    """All facts that contradict each other."""
    found = []
    for job_id, facts in facts_of(history).items():
        found += _contradictions(job_id, facts)
        found += _ways(job_id, facts)
    return found + _forgotten(history)


def facts_of(history: History) -> dict[str, list[Fact]]:
    """All facts by job, in order of the log."""
    by_job: dict[str, list[Fact]] = defaultdict(list)
    for record in history:
        for job_id, fact in _told(record):
            by_job[job_id].append(fact)
    for facts in by_job.values():
        facts.sort(key=lambda fact: fact.index)
    return dict(by_job)


def _told(record: Any) -> list[tuple[str, Fact]]:
    match record:
        case JobSeen(log_index=int(index)):
            return [
                (
                    record.job_id,
                    Fact(
                        index,
                        record.state,
                        record.generation,
                        record.restarts,
                        record.checkpoint,
                        record,
                    ),
                )
            ]
        case Operation(outcome=Outcome.OK, log_index=int(index)):
            views = record.result.get("jobs")
            if views is None and record.job_id is not None and "state" in record.result:
                views = {record.job_id: record.result}
            return [
                (
                    job_id,
                    Fact(
                        index,
                        view["state"],
                        view["generation"],
                        view["restarts"],
                        view.get("checkpoint", UNTOLD),
                        record,
                    ),
                )
                for job_id, view in (views or {}).items()
            ]
        case JobEnded(log_index=int(index)) if record.state:
            return [(record.job_id, Fact(index, record.state, None, None, UNTOLD, record))]
    return []


def _contradictions(job_id: str, facts: list[Fact]) -> list[Violation]:
    found: list[Violation] = []
    known: dict[tuple[int, str], Fact] = {}
    for fact in facts:
        for name, untold in _FIELDS.items():
            value = getattr(fact, name)
            if value == untold:
                continue
            other = known.setdefault((fact.index, name), fact)
            if getattr(other, name) != value:
                what = (
                    f"at index {fact.index} the {name} of job {job_id} is {getattr(other, name)} by one "
                    f"account and {value} by another"
                )
                found.append(violation(NAME, what, [other.source, fact.source], job_id=job_id))
    return found


_FIELDS = {"state": None, "generation": None, "restarts": None, "checkpoint": UNTOLD}
"""What the log alone decides, with the value that says nothing."""


def _ways(job_id: str, facts: list[Fact]) -> list[Violation]:
    found: list[Violation] = []
    newest: dict[str, Fact] = {}
    for fact in facts:
        for name in ("generation", "restarts"):
            value, before = getattr(fact, name), newest.get(name)
            if value is None:
                continue
            if before is not None and value < getattr(before, name):
                what = (
                    f"the {name} of job {job_id} fell from {getattr(before, name)} (index {before.index}) "
                    f"to {value} (index {fact.index})"
                )
                found.append(violation(NAME, what, [before.source, fact.source], job_id=job_id))
            newest[name] = fact
        if fact.state is None:
            continue
        last = newest.get("state")
        if last is not None and not _may_become(str(last.state), fact.state):
            told = "ended" if last.state in TERMINAL else "was"
            what = f"job {job_id} {told} {last.state} at index {last.index} and is {fact.state} at index {fact.index}"
            found.append(violation(NAME, what, [last.source, fact.source], job_id=job_id))
        newest["state"] = fact
    return found


def _closure() -> dict[str, frozenset[str]]:
    """Which states can follow a state, in any number of transitions."""
    reach = {one.value: {other.value for other in after} for one, after in TRANSITIONS.items()}
    for _ in reach:
        for after in reach.values():
            after |= {more for one in list(after) for more in reach[one]}
    return {one: frozenset(after | {one}) for one, after in reach.items()}


_FOLLOWING = _closure()


def _may_become(before: str, after: str) -> bool:
    return after in _FOLLOWING.get(before, frozenset())


def _forgotten(history: History) -> list[Violation]:
    """404 for a job at an index at which it exists."""
    born: dict[str, Operation] = {}
    for one in of(history, Operation):
        if one.kind == "submit" and one.outcome is Outcome.OK and one.job_id is not None:
            born.setdefault(one.job_id, one)
    found = []
    for one in of(history, Operation):
        birth = born.get(one.job_id or "")
        if one.status != 404 or birth is None or one.log_index is None or birth.log_index is None:
            continue
        if one.log_index >= birth.log_index:
            what = (
                f"node {one.node} does not know job {one.job_id} at index {one.log_index}; it was acknowledged "
                f"at index {birth.log_index}"
            )
            found.append(violation(NAME, what, [birth, one], job_id=one.job_id))
    return found
