"""Promise: a failure does not change the result.

Jobs of one name have the same specification and seed. Judged against the job of that name which was played before the
faults: the final weights and optimizer state, the rolling digest of the sample ids at the end, and the loss of each step
are the same, bit for bit.
"""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import JobEnded, Violation

NAME = "same_result"


def check(history: History, limits: Limits) -> list[Violation]:
    """All jobs that ended in other bits."""
    ends = of(history, JobEnded)
    references = {one.spec_name: one for one in ends if one.undisturbed}
    found = []
    for one in ends:
        reference = references.get(one.spec_name)
        if one.undisturbed or one.state != "COMPLETED":
            continue
        if reference is None:
            what = f"job {one.job_id} ({one.spec_name}) has no undisturbed run to be compared with"
            found.append(violation(NAME, what, [one], job_id=one.job_id))
            continue
        for wrong in differences(reference, one):
            what = f"job {one.job_id} ({one.spec_name}) is not as its undisturbed run: {wrong}"
            found.append(violation(NAME, what, [one, reference], job_id=one.job_id))
    return found


def differences(reference: JobEnded, one: JobEnded) -> list[str]:
    """What is not the same; empty where all is."""
    found = []
    if one.model_sha256 != reference.model_sha256:
        found.append(
            f"weights and optimizer state are {_short(one.model_sha256)}, not {_short(reference.model_sha256)}"
        )
    if missing := sorted(reference.losses.keys() - one.losses.keys()):
        found.append(f"{len(missing)} steps have no loss, first step {missing[0]}")
    if more := sorted(one.losses.keys() - reference.losses.keys()):
        found.append(f"{len(more)} steps have a loss and should not be, first step {more[0]}")
    both = sorted(one.losses.keys() & reference.losses.keys())
    if wrong := [step for step in both if one.losses[step] != reference.losses[step]]:
        found.append(f"{len(wrong)} losses differ, first that of step {wrong[0]}")
    return found


def _short(digest: str | None) -> str:
    return (digest or "unknown")[:12]
