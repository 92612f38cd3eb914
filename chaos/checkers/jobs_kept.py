"""Promise: a job that was acknowledged is there for good, and a request makes one job however often it is repeated.

Judged by: all answers to one idempotency key name the same job. Every job that was acknowledged is among those that
remain. What remains beyond that was asked for: for each name there are at most as many jobs as keys that may have had
an effect (acknowledged, or of unknown outcome), and as many at least as were acknowledged.
"""

from __future__ import annotations

from collections import defaultdict

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import JobEnded, Operation, Outcome, Violation

NAME = "jobs_kept"


def check(history: History, limits: Limits) -> list[Violation]:
    """All jobs that were lost, doubled or invented."""
    tries: dict[str, list[Operation]] = defaultdict(list)
    for one in of(history, Operation):
        if one.kind == "submit" and one.key is not None:
            tries[one.key].append(one)
    found = []
    for key, made in tries.items():
        ids = {one.job_id for one in made if one.outcome is Outcome.OK}
        if len(ids) > 1:
            what = f"one idempotency key ({key}) made {len(ids)} jobs: {', '.join(map(str, sorted(map(str, ids))))}"
            found.append(violation(NAME, what, made))
    remains = {one.job_id: one for one in of(history, JobEnded) if not one.undisturbed}
    if not remains:
        return found  # the run was cut off before it was read what remains
    for made in tries.values():
        acknowledged = [one for one in made if one.outcome is Outcome.OK]
        for one in acknowledged[:1]:
            if one.job_id not in remains or not remains[one.job_id].state:
                what = f"job {one.job_id} was acknowledged and is not there at the end"
                found.append(violation(NAME, what, [one], job_id=one.job_id))
    return found + _invented(tries, list(remains.values()))


def _invented(tries: dict[str, list[Operation]], remains: list[JobEnded]) -> list[Violation]:
    perhaps: dict[str, int] = defaultdict(int)
    for made in tries.values():
        if any(one.outcome is not Outcome.FAILED for one in made):
            perhaps[made[0].result.get("name", "")] += 1
    there: dict[str, list[JobEnded]] = defaultdict(list)
    for one in remains:
        if one.state:
            there[one.spec_name].append(one)
    return [
        violation(
            NAME,
            f"there are {len(jobs)} jobs named {name}, and {perhaps[name]} requests that may have made one",
            jobs,
        )
        for name, jobs in there.items()
        if len(jobs) > perhaps[name]
    ]
