"""Which directories of a run in a checkpoint store nobody needs any more. Pure; ``collecting`` carries it out.

A directory is needed while the state lists its checkpoint, or another job begins with it. What is not listed is

- **removed** by request from a run that has ended: it goes at once;
- **passed**: below the newest committed step, so it was retired or never whole. It goes at once: the state machine
  refuses a commit behind the newest one, so its files can never be listed again. Should the newest one be corrupt, a later
  generation may come to this step, with files of its own;
- **open**: above the newest committed step of a run that goes on. It may become whole any moment, or the run comes to
  this step again and finds its files there: never touched, also where a corrupt one of this step was removed by request;
- **orphaned**: the same of a run that has ended. Its generation is dead and the directory never whole; it goes after a
  grace, in which a person may look at it.

Jobs that the state does not know are not looked at: their data is their owner's. Nor are directories of imported jobs,
but for those that were removed by request: another cluster may be using them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.model import Job
from distroml.runtime.checkpoint.manifest import checkpoints_directory

_DIRECTORY = re.compile(r"ckpt_step_(\d{8,12})\Z")


class Garbage(Struct, frozen=True):
    """A directory to delete, and why."""

    directory: str
    reason: str


def directories_in(listing: Iterable[str], job: Job) -> dict[str, int]:
    """Checkpoint directories of a run, with their steps, from paths of files in its store. Others are left alone."""
    parent = checkpoints_directory(job.job_id, job.run_id) + "/"
    found: dict[str, int] = {}
    for path in listing:
        name = path.removeprefix(parent).partition("/")[0] if path.startswith(parent) else ""
        if (match := _DIRECTORY.match(name)) is not None:
            found[parent + name] = int(match[1])
    return found


def begun_with(state: ClusterState) -> frozenset[str]:
    """Directories that jobs which have not ended begin with, of whichever job."""
    initial = (one.initial for one in state.jobs.values() if not one.terminal)
    return frozenset(
        name for one in initial if one is not None for name in (one.directory, *one.refers_to)
    )


def needed(job: Job, begun: frozenset[str]) -> frozenset[str]:
    """Directories of the run that are not to be touched: listed, referred to, or in ``begun_with``."""
    listed = (name for one in job.checkpoints for name in (one.directory, *one.refers_to))
    return begun.union(listed)


def garbage(
    job: Job,
    found: Mapping[str, int],
    held: Collection[str],
    seen_since_s: Mapping[str, float],
    now_s: float,
    *,
    grace_s: float,
) -> tuple[Garbage, ...]:
    """What of ``found`` is to be deleted now, by step.

    Args:
        found: directories of the run with their steps, listed before ``job`` was read from an up-to-date state.
        held: as of ``needed``.
        seen_since_s: when each was first seen, monotonic seconds.
        grace_s: how long orphans stay.
    """
    newest = job.newest_checkpoint()
    gone: list[Garbage] = []
    for directory, step in sorted(found.items(), key=lambda item: item[1]):
        if directory in held:
            continue
        passed = newest is not None and step < newest.step
        if directory in job.removed and (job.terminal or passed):
            gone.append(Garbage(directory, "removed by request"))
        elif job.imported:
            continue
        elif newest is not None and passed:
            gone.append(Garbage(directory, f"not kept, and behind step {newest.step}"))
        elif job.terminal and now_s - seen_since_s.get(directory, now_s) >= grace_s:
            gone.append(Garbage(directory, f"never whole, and the job is {job.status}"))
    return tuple(gone)


def has_orphans(job: Job, found: Mapping[str, int], held: Collection[str]) -> bool:
    """Whether there is something that will be garbage once its grace is over."""
    return job.terminal and not job.imported and any(name not in held for name in found)
