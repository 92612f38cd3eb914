"""Which checkpoints of a run are kept and which go: pure functions of committed state and the spec's policy.

Used by ``runtime.reconciler``: what is surplus is retired through the log, and its files go afterwards (``garbage``,
``collecting``). Retention acts while a job is active; what a finished job left stays until somebody removes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from distroml.consensus.keeping import indispensable, leaving
from distroml.consensus.state import MAX_CHECKPOINTS, ClusterState
from distroml.model import Checkpoint, CheckpointStatus, Job
from distroml.spec import Checkpointing


def kept(checkpoints: Sequence[Checkpoint], policy: Checkpointing) -> frozenset[int]:
    """Steps of the checkpoints that the policy keeps: the newest, those of multiples, and the best.

    Of equally good ones the newer is better; one without the metric is never among the best. A corrupt one is kept
    for as long as it would be among the newest: people may want to look at it, and it takes nobody's place.

    Args:
        checkpoints: by step.
    """
    whole = [one for one in checkpoints if one.status is CheckpointStatus.COMMITTED]
    newest = {one.step for one in whole[-policy.keep_last :]}
    every = policy.keep_every_n_steps
    multiples = {one.step for one in whole if every and one.step % every == 0}
    sign = 1 if policy.best_is == "max" else -1
    measured = [(sign * one.metric, one.step) for one in whole if one.metric is not None]
    best = {step for _, step in sorted(measured, reverse=True)[: policy.keep_best]}
    oldest = min(newest, default=0)
    broken = {
        one.step
        for one in checkpoints
        if one.status is CheckpointStatus.CORRUPT and one.step >= oldest
    }
    # The state has room for so many; of too many multiples the oldest go first.
    return frozenset(sorted(newest | multiples | best | broken)[-MAX_CHECKPOINTS:])


def surplus(state: ClusterState, job: Job) -> tuple[Checkpoint, ...]:
    """Checkpoints of an active job that neither the policy nor anything else keeps, by step."""
    if len(job.checkpoints) <= job.spec.checkpointing.keep_last or job.imported:
        return ()
    wanted = kept(job.checkpoints, job.spec.checkpointing)
    going = {one.step for one in job.checkpoints} - wanted
    if going:
        going -= set(indispensable(state, job))
    return leaving(job.checkpoints, going) if going else ()


def describe_policy(policy: Checkpointing) -> str:
    """The policy in words, such as ``kept are the last 5 and those of every 1000 steps``."""
    parts = [f"the last {policy.keep_last}"]
    if policy.keep_every_n_steps:
        parts.append(f"those of every {policy.keep_every_n_steps} steps")
    if policy.keep_best:
        parts.append(f"the {policy.keep_best} with the {policy.best_is}imum {policy.best_metric}")
    return f"kept are {' and '.join(parts)}"
