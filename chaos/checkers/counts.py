"""Not a promise of the product, but of the harness: a run that did too little proves nothing, and must not pass.

Judged by the numbers of faults that struck and of operations that ended well, for the length of the run; by that some job
was compared with its undisturbed run, and by that the run came to its own end.
"""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import Began, Ended, FaultBegan, JobEnded, Operation, Outcome, Violation

NAME = "counts"


def check(history: History, limits: Limits) -> list[Violation]:
    """Everything of which there was too little."""
    began = of(history, Began)
    if not began:
        return [violation(NAME, "the history has no beginning", at_s=0.0)]
    duration_s = began[0].duration_s
    undisturbed = {one.job_id for one in of(history, JobEnded) if one.undisturbed}
    wanted = [
        ("end", len(of(history, Ended)), 1.0),
        (
            "operations that ended well",
            sum(one.outcome is Outcome.OK for one in of(history, Operation)),
            limits.operations_per_s * duration_s / limits.machine_factor,
        ),
        (
            "jobs that completed beside the undisturbed ones",
            sum(
                one.job_id not in undisturbed and one.state == "COMPLETED"
                for one in of(history, JobEnded)
            ),
            1.0,
        ),
    ]
    if began[0].faults:
        least = max(1.0, limits.faults_per_minute * duration_s / 60 / limits.machine_factor)
        wanted.append(("faults", len(of(history, FaultBegan)), least))
    return [
        violation(
            NAME,
            f"the run says nothing: it has {count} {what}, and needs {least:.0f}",
            began,
            at_s=duration_s,
        )
        for what, count, least in wanted
        if count < int(least)
    ]
