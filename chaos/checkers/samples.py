"""Promise: each sample counts exactly once per epoch, whatever fails.

The runtime keeps a rolling digest over the sample ids that each step consumed; it is part of the state, so every checkpoint
and the result carry it. Judged by:

- at every step of which a digest is known it is that of the undisturbed run: the steps up to there have consumed the same
  samples in the same order, none twice and none left out;
- a step that was done again after a restore, and each rank that told of a step, told the loss of the undisturbed run;
- a job that completed did all its steps: each from the first to the last has its loss, once.
"""

from __future__ import annotations

from chaos.checkers.facts import History, Limits, of, violation
from chaos.checkers.items import metric
from chaos.records import JobEnded, Streamed, Violation

NAME = "samples"


def check(history: History, limits: Limits) -> list[Violation]:
    """All steps that consumed something else."""
    ends = of(history, JobEnded)
    references = {one.spec_name: one for one in ends if one.undisturbed}
    disturbed = {one.job_id: one for one in ends if not one.undisturbed}
    found = []
    for one in disturbed.values():
        reference = references.get(one.spec_name)
        if reference is not None:
            found += _digests(reference, one)
        found += _whole(one)
    for stream in of(history, Streamed):
        ended = disturbed.get(stream.job_id)
        reference = references.get(ended.spec_name) if ended is not None else None
        if reference is not None and stream.stream == "metrics":
            found += _told(reference, stream)
    return found


def _digests(reference: JobEnded, one: JobEnded) -> list[Violation]:
    wrong = [
        step
        for step, digest in sorted(one.samples.items())
        if reference.samples.get(step, digest) != digest
    ]
    if not wrong:
        return []
    what = (
        f"job {one.job_id} ({one.spec_name}) consumed other samples than its undisturbed run: the digests differ "
        f"at {len(wrong)} steps, first at step {wrong[0]}"
    )
    return [violation(NAME, what, [one, reference], job_id=one.job_id)]


def _whole(one: JobEnded) -> list[Violation]:
    if one.state != "COMPLETED" or one.total_steps is None:
        return []
    missing = set(range(1, one.total_steps + 1)) - one.losses.keys()
    if not missing:
        return []
    what = (
        f"job {one.job_id} completed {one.total_steps} steps, and {len(missing)} of them have no loss, first "
        f"step {min(missing)}"
    )
    return [violation(NAME, what, [one], job_id=one.job_id)]


def _told(reference: JobEnded, stream: Streamed) -> list[Violation]:
    found = []
    for item in stream.items:
        generation, rank, step, _, loss = metric(item)
        expected = reference.losses.get(step)
        if loss and expected is not None and loss != expected:
            what = (
                f"rank {rank} of generation {generation} of job {stream.job_id} told another loss of step {step} "
                "than the undisturbed run"
            )
            found.append(violation(NAME, what, job_id=stream.job_id, at_s=stream.at_s))
            break  # the rest follows from it
    return found
