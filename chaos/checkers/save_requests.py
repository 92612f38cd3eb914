"""Promise: a request for a checkpoint counts once, however often it is repeated, and is never forgotten.

The number of requests of a job is a counter in the log. Judged by:

- at one index it has one value, and at a later index it is at no time smaller;
- in the end it is at least the number of acknowledged keys, and at most that of keys that may have had an effect.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import JobEnded, Operation, Outcome, Violation

NAME = "save_requests"


def check(history: History, limits: Limits) -> list[Violation]:
    """All requests that were counted twice or forgotten."""
    operations = [one for one in of(history, Operation) if one.job_id is not None]
    by_job: dict[str, list[Operation]] = defaultdict(list)
    for one in operations:
        if one.kind in ("checkpoint_now", "read_checkpoints"):
            by_job[str(one.job_id)].append(one)
    ends = {one.job_id: one for one in of(history, JobEnded)}
    found = []
    for job_id, made in by_job.items():
        found += _order(job_id, made)
        found += _count(job_id, made, ends.get(job_id))
    return found


def _order(job_id: str, made: list[Operation]) -> list[Violation]:
    told = [
        one
        for one in made
        if one.outcome is Outcome.OK and one.log_index is not None and "save_request" in one.result
    ]
    told.sort(key=lambda one: one.log_index or 0)
    found = []
    for before, after in itertools.pairwise(told):
        numbers = before.result["save_request"], after.result["save_request"]
        same = before.log_index == after.log_index
        if numbers[1] < numbers[0] or (same and numbers[1] != numbers[0]):
            what = (
                f"job {job_id} had {before.result['save_request']} requests for a checkpoint at index "
                f"{before.log_index} and {after.result['save_request']} at {after.log_index}"
            )
            found.append(violation(NAME, what, [before, after], job_id=job_id))
    return found


def _count(job_id: str, made: list[Operation], ended: JobEnded | None) -> list[Violation]:
    requests: dict[str, list[Operation]] = defaultdict(list)
    for one in made:
        if one.kind == "checkpoint_now" and one.key is not None:
            requests[one.key].append(one)
    acknowledged = [
        tries for tries in requests.values() if any(one.outcome is Outcome.OK for one in tries)
    ]
    perhaps = [
        tries
        for tries in requests.values()
        if any(one.outcome is not Outcome.FAILED for one in tries)
    ]
    if ended is None or not ended.state:
        return []
    if not len(acknowledged) <= ended.save_request <= len(perhaps):
        what = (
            f"job {job_id} counts {ended.save_request} requests for a checkpoint; {len(acknowledged)} were "
            f"acknowledged and {len(perhaps)} may have had an effect"
        )
        shown = [one for tries in perhaps for one in tries]
        return [violation(NAME, what, [*shown[:3], ended], job_id=job_id)]
    return []
