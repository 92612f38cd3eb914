"""Where ranks and spares of running jobs should be, given what is free: growth, drained nodes, spares.

Pure; used by ``runtime.reconciler``, once the queue was served. A change is made by a planned generation: nobody
loses a step, and it counts as no restart. At least one rank always stays, since the state comes from those that do.
"""

from __future__ import annotations

from collections.abc import Mapping

from distroml.model import Job, JobStatus, Member
from distroml.runtime.decisions import Turn
from distroml.runtime.scheduler import Host, Placement, place_spares, resize, without


def changes(turn: Turn) -> dict[str, Placement]:
    """The jobs that are to change, with where they should be then; those with equal members change spares only."""
    left: Mapping[str, Host] = turn.schedule.left
    jobs = [job for job in turn.active if _is_settled(turn, job)]
    jobs.sort(key=lambda job: (-job.spec.priority, job.submit_index))
    found: dict[str, Placement] = {}
    for job in jobs:
        placement = _moved(turn, job, left) or _grown(turn, job, left)
        if placement is not None:
            newcomers = [m for m in placement.members if m.rank in placement.joining]
            left = without(left, newcomers)
            found[job.job_id] = placement
    for job in jobs:
        if job.generation is None or job.job_id in found:
            continue
        spares = _spares(job, job.generation.spares, left)
        left = without(left, spares)
        if _nodes(spares) != _nodes(job.generation.spares):
            found[job.job_id] = Placement(job.generation.members, spares=spares)
    return found


def _is_settled(turn: Turn, job: Job) -> bool:
    """Whether all its ranks train on nodes that can be spoken with, and no change is under way."""
    generation = job.generation
    if generation is None or generation.running_at is None or job.outgoing is not None:
        return False
    if generation.vacated:
        return False
    views = [turn.survey.views.get(member.node) for member in generation.members]
    heard = all(view is not None and view.speaks for view in views)
    return heard and job.status in (JobStatus.RUNNING, JobStatus.CHECKPOINTING)


def _moved(turn: Turn, job: Job, left: Mapping[str, Host]) -> Placement | None:
    """Away from drained nodes, as far as there is room; with fewer ranks if that is allowed and there is none."""
    assert job.generation is not None  # only settled jobs are looked at
    members = job.generation.members
    going = [member for member in members if turn.survey.to_move(member)]
    staying = [member for member in members if member not in going]
    free = _free(left)
    if not staying and free == 0:
        return None
    # The last ones to know the state go only when others have it, and no more of them than can be spared.
    spared = len(staying) + min(len(going), free)
    held_back = max(0 if staying else 1, job.spec.resources.fewest - spared)
    staying, going = [*staying, *going[:held_back]], going[held_back:]
    if not going or not staying:
        return None
    size = len(staying) + min(len(going), free)
    return resize(staying, size, left.values(), _nodes(job.generation.spares))


def _grown(turn: Turn, job: Job, left: Mapping[str, Host]) -> Placement | None:
    assert job.generation is not None  # only settled jobs are looked at
    generation = job.generation
    missing = job.spec.resources.workers - len(generation.members)
    free = _free(left)
    if missing <= 0 or free <= 0 or turn.schedule.blocked:
        return None
    settings = turn.settings
    tried = generation.planned and not generation.joining
    pause_s = settings.regrow_pause_s if tried else settings.grow_pause_s
    if turn.now.wall_s - generation.formed_at < pause_s:
        return None
    size = len(generation.members) + min(missing, free)
    return resize(generation.members, size, left.values(), _nodes(generation.spares))


def _spares(job: Job, present: tuple[Member, ...], left: Mapping[str, Host]) -> tuple[Member, ...]:
    """As many as are wanted and have room; those that are there stay."""
    assert job.generation is not None  # only settled jobs are looked at
    wanted, first_rank = job.spec.resources.spares, len(job.generation.members)
    kept: list[Member] = []
    for spare in present:
        host = left.get(spare.node)
        if len(kept) < wanted and host is not None and host.free > 0 and not host.closed:
            left = without(left, [spare])
            kept.append(spare)
    added = place_spares(wanted - len(kept), first_rank + len(kept), left)
    return (*kept, *added)


def _nodes(members: tuple[Member, ...]) -> list[str]:
    return sorted(member.node for member in members)


def _free(hosts: Mapping[str, Host]) -> int:
    return sum(max(0, host.free) for host in hosts.values() if not host.closed)
