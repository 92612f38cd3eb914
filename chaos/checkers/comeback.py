"""Promise: when the faults are over the cluster leads again within 2 s, every job trains on within 10 s and ends well.

Judged by what was measured when the last fault had been taken back; the limits are multiplied by the factor of the machine.
In the end every training job is COMPLETED: it has as many restarts as it needs, so no fault may make it fail, and none
that was not cancelled may be.
"""

from __future__ import annotations

from chaos.checkers.facts import TERMINAL, History, Limits, of, violation
from chaos.records import JobEnded, Operation, Outcome, Settled, Violation

NAME = "comeback"
ENDS = frozenset({"cancel", "stop"})


def check(history: History, limits: Limits) -> list[Violation]:
    """What took too long, or never came back."""
    return [*_times(history, limits), *_ends(history)]


def _times(history: History, limits: Limits) -> list[Violation]:
    found = []
    leader_s = limits.leader_s * limits.machine_factor
    progress_s = limits.progress_s * limits.machine_factor
    for one in of(history, Settled):
        if one.leader_s is None or one.leader_s > leader_s:
            what = f"a leader was to be there within {leader_s:g} s and {_took(one.leader_s)}"
            found.append(violation(NAME, what, [one]))
        for job_id, took_s in one.progress_s.items():
            if took_s is None or took_s > progress_s:
                what = f"job {job_id} was to complete a step within {progress_s:g} s and {_took(took_s)}"
                found.append(violation(NAME, what, [one], job_id=job_id))
    return found


def _took(took_s: float | None) -> str:
    return "did not as long as it was watched" if took_s is None else f"took {took_s:.1f} s"


def _ends(history: History) -> list[Violation]:
    wanted = {
        one.job_id
        for one in of(history, Operation)
        if one.kind in ENDS and one.outcome is not Outcome.FAILED
    }
    found = []
    for one in of(history, JobEnded):
        if not one.state or one.state == "COMPLETED" or one.undisturbed:
            continue
        if one.state == "CANCELLED" and one.job_id in wanted:
            continue
        told = "has not ended" if one.state not in TERMINAL else f"ended as {one.state}"
        what = f"job {one.job_id} ({one.spec_name}) {told}: {one.reason}"
        found.append(violation(NAME, what, [one], job_id=one.job_id))
    for one in of(history, JobEnded):
        if one.error:
            what = f"what remains of job {one.job_id} could not be read: {one.error}"
            found.append(violation(NAME, what, [one], job_id=one.job_id))
    return found
