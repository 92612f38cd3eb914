"""Which checkpoints of a job must not go, whatever a policy or a client says. Pure.

Used by the handlers, which are the last to judge, and by ``runtime.retention``, which decides. A checkpoint is
indispensable where a restart of the run, the files of another one, or a job that begins with it depends on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from distroml.consensus.state import ClusterState
from distroml.model import Checkpoint, Job


def indispensable(state: ClusterState, job: Job) -> dict[int, str]:
    """Steps of the job's checkpoints that stay, each with the reason.

    Those that only another checkpoint refers to are not among them: ``leaving`` lets them go together with it.
    """
    found: dict[int, str] = {}
    directories = {one.directory: one.step for one in job.checkpoints}
    for other in state.jobs.values():
        if other.initial is not None and not other.terminal:
            step = directories.get(other.initial.directory)
            if step is not None:
                found[step] = f"job '{other.job_id}' begins with it"
    if job.terminal:
        return found
    for generation in (job.generation, job.outgoing):
        if generation is not None and generation.checkpoint_step is not None:
            source = job.source_of(generation)
            if source is not None and source.directory in directories:
                found[source.step] = f"generation {generation.number} may have to read it"
    newest = job.newest_checkpoint()
    if newest is not None:
        found[newest.step] = "it is the newest one of a run that goes on"
    return found


def leaving(checkpoints: Sequence[Checkpoint], steps: Collection[int]) -> tuple[Checkpoint, ...]:
    """Those of ``steps`` that may go together: what one that stays refers to stays, with what that refers to."""
    going = [one for one in checkpoints if one.step in steps]
    while True:
        names = {one.directory for one in going}
        needed = referred(one for one in checkpoints if one.directory not in names)
        left = [one for one in going if one.directory not in needed]
        if len(left) == len(going):
            return tuple(going)
        going = left


def referred(checkpoints: Iterable[Checkpoint]) -> frozenset[str]:
    """Directories in whose files some of the tensors of ``checkpoints`` are."""
    return frozenset(directory for one in checkpoints for directory in one.refers_to)
