"""Promise: a stream that is resumed, at whichever node, delivers everything once and in order.

Judged against the same stream as it was read in one go when all was over. Of metrics and logs, what each rank of each
generation wrote is one sequence, and what a follower got of it must be a beginning of that sequence: nothing left out,
nothing twice, nothing in another order. Its end may be missing, where the node that had it was away when the stream ended;
where no fault struck while the follower followed, it may not. More than there is in the end is a loss of history.

Events have their log index: they never go back, and none comes twice.
"""

from __future__ import annotations

from collections import defaultdict

from chaos.checkers.facts import History, Limits, of, violation
from chaos.checkers.items import source
from chaos.records import FaultBegan, Operation, Streamed, Violation

NAME = "streams"
FORGETFUL = "disk"
"""Family of the faults that may take what only one node had."""


def check(history: History, limits: Limits) -> list[Violation]:
    """All items that were lost, repeated or mixed up."""
    faults = of(history, FaultBegan)
    forgetful = any(fault.family == FORGETFUL for fault in faults)
    submitted = {
        one.job_id: one.invoked_s
        for one in reversed(of(history, Operation))
        if one.kind == "submit"
    }
    streams = of(history, Streamed)
    whole = {(one.job_id, one.stream): one for one in streams if one.reference and one.ended}
    found = []
    for one in streams:
        if one.error:
            what = f"the {one.stream} of job {one.job_id} could not be followed on: {one.error}"
            found.append(violation(NAME, what, [one], job_id=one.job_id))
        if one.reference:
            continue
        if one.stream == "events":
            found += _events(one)
        elif (reference := whole.get((one.job_id, one.stream))) is not None:
            began_s = submitted.get(one.job_id, 0.0)
            calm = not any(began_s <= fault.at_s <= one.at_s for fault in faults) and not any(
                fault.at_s < began_s for fault in faults
            )
            wrong = _compared(one, reference, forgetful=forgetful, to_the_end=calm and one.ended)
            if wrong:
                what = f"the {one.stream} of job {one.job_id} as {one.client} got them: {wrong}"
                found.append(violation(NAME, what, at_s=one.at_s, job_id=one.job_id))
    return found


def _events(one: Streamed) -> list[Violation]:
    last = -1
    seen: set[str] = set()
    for item in one.items:
        index = int(item.partition(":")[0])
        wrong = f"came again: {item}" if item in seen else ""
        if index < last:
            wrong = f"went back from index {last} to {index}: {item}"
        if wrong:
            what = f"an event of job {one.job_id} as {one.client} got it {wrong}"
            return [violation(NAME, what, at_s=one.at_s, job_id=one.job_id)]
        last = index
        seen.add(item)
    return []


def _compared(one: Streamed, reference: Streamed, *, forgetful: bool, to_the_end: bool) -> str:
    """What is wrong, in a few words; empty where nothing is."""
    expected, got = _by_source(reference), _by_source(one)
    for place, items in got.items():
        there = expected.get(place, [])
        where = f"rank {place[1]} of generation {place[0]}"
        for number, (item, right) in enumerate(zip(items, there, strict=False)):
            if item != right:
                return (
                    f"item {number} of {where} is {item}, not {right}: {_kind(item, number, there)}"
                )
        if len(items) > len(there) and not forgetful:
            return f"{where}: {len(items) - len(there)} items that are not there any more, first {items[len(there)]}"
    if to_the_end:
        for place, there in expected.items():
            missing = len(there) - len(got.get(place, []))
            if missing > 0:
                return f"{missing} items of rank {place[1]} of generation {place[0]} never came"
    return ""


def _kind(item: str, number: int, there: list[str]) -> str:
    if item in there[:number]:
        return "it came again"
    return "some were left out" if item in there[number:] else "it is not in the history"


def _by_source(stream: Streamed) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in stream.items:
        found[source(stream.stream, item)].append(item)
    return found
