"""Promise: a checkpoint that is listed is whole, and damage by others is found out where it matters.

Judged by the verification of every byte at the end of the run, when the harness has given back what its faults took:
a committed checkpoint must verify, and the newest one whose commit anybody was told of must be listed. The cluster may have taken one out of use as corrupt only if a fault damaged a file of
it. (That a damaged one was used unnoticed would show in the result, see ``same_result``.)
"""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import EventSeen, FaultBegan, FaultEnded, JobEnded, Violation

NAME = "checkpoints"


def check(history: History, limits: Limits) -> list[Violation]:
    """All checkpoints that are not what they should be."""
    faults = of(history, FaultBegan)
    healed = {one.fault for one in of(history, FaultEnded)}
    found = []
    for ended in of(history, JobEnded):
        for step, wrong in ended.checkpoints.items():
            damage = _damage(faults, ended.job_id, step)
            if wrong and (damage is None or damage.fault in healed):
                what = f"checkpoint {step} of job {ended.job_id} is committed and does not verify: {wrong}"
                found.append(violation(NAME, what, [ended], job_id=ended.job_id))
        for step, reason in ended.corrupt.items():
            if _damage(faults, ended.job_id, step) is None:
                what = f"checkpoint {step} of job {ended.job_id} was found to be corrupt, and nobody damaged it: {reason}"
                found.append(violation(NAME, what, [ended], job_id=ended.job_id))
    return found + _forgotten(history)


def _forgotten(history: History) -> list[Violation]:
    """Retention takes old checkpoints, never the newest."""
    newest: dict[str, EventSeen] = {}
    for event in of(history, EventSeen):
        if event.name == "checkpoint_committed" and event.job_id is not None:
            before = newest.get(event.job_id)
            if before is None or event.data["step"] > before.data["step"]:
                newest[event.job_id] = event
    found = []
    for ended in of(history, JobEnded):
        told = newest.get(ended.job_id)
        if told is None or not ended.state or ended.error:
            continue
        if told.data["step"] not in ended.checkpoints:
            what = f"checkpoint {told.data['step']} of job {ended.job_id} was committed, the newest, and is not listed"
            found.append(violation(NAME, what, [told, ended], job_id=ended.job_id))
    return found


def _damage(faults: list[FaultBegan], job_id: str, step: int) -> FaultBegan | None:
    """The fault that damaged a file of a checkpoint, by the path in its detail."""
    directory = f"/ckpt_step_{step:08d}/"
    for fault in faults:
        path = str(fault.detail.get("file", ""))
        if directory in path and f"/{job_id}/" in f"/{path}":
            return fault
    return None
