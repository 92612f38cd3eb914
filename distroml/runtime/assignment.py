"""Which of this node's processes is which rank: from the replicated state and what runs here to duties. Pure but for paths.

A process outlives generations, so each new one is handed to the processes that are there: who has the rank already
keeps it, then survivors take their old ranks, then any survivor any rank, then spares; only what is left is forked.
The order matters: a survivor has the state, a spare has everything imported, a fork has neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from distroml.consensus.state import ClusterState
from distroml.model import (
    ASSIGNED,
    CheckpointStatus,
    Generation,
    Job,
    JobStatus,
    Member,
    Node,
    NodeStatus,
)
from distroml.reports import WorkerPhase
from distroml.runtime.control import Join, WorkerPlan
from distroml.runtime.log_tail import log_path
from distroml.store_urls import StoreSettings

_AT_WORK = frozenset({WorkerPhase.TRAINING, WorkerPhase.FINISHING})


class SupervisorSettings(Struct, frozen=True, kw_only=True):
    """Where this node is and where its workers keep things."""

    node: str
    incarnation: int
    host: str
    data_dir: Path
    store_dir: Path
    stores: StoreSettings = StoreSettings()
    worker_threads: int = 1

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "workers"


class Process(Struct, frozen=True, kw_only=True):
    """One process of a run on this node."""

    worker: int
    told: int
    """Generation that it was told to join last; 0: a spare."""
    rank: int
    """Its rank there."""
    joined: int
    """Generation that it is in; behind ``told`` while a planned change lasts."""
    ranks: Mapping[int, int] = {}
    """By generation, of the last ones that it was in: its rank there."""
    phase: WorkerPhase
    alive: bool = True
    usable: bool = True
    """False once it has failed, finished or been killed: it will not join anything any more."""

    def was_in(self, generation: int) -> bool:
        """Whether it has, or had, a part in a generation."""
        return generation in (self.told, self.joined) or generation in self.ranks


class Duties(Struct, frozen=True, kw_only=True):
    """What becomes of the processes of one run."""

    ranks: dict[int, int | None] = {}
    """By rank of the newest generation: the process that has it, None where one is to be forked."""
    spares: tuple[int | None, ...] = ()
    """Processes that wait without a rank, None for each that is to be forked."""
    aborted: tuple[int, ...] = ()
    """Survivors of a failed generation: they are to leave its collectives, and wait."""
    retired: tuple[int, ...] = ()
    """Not needed: killed if they live, forgotten once they are gone."""


def duties(
    state: ClusterState, node: str, incarnation: int, processes: Mapping[str, Sequence[Process]]
) -> dict[str, Duties]:
    """What this incarnation of ``node`` has to do, by run; ``processes`` are those that it knows, by run.

    Empty until the log tells of this incarnation: what an earlier one left running is not judged before.
    """
    own = state.nodes.get(node)
    if own is None or own.incarnation != incarnation:
        return {}
    jobs = {job.run_id: job for job in state.jobs.values() if not job.terminal and job.generation}
    room = own.slots - state.slots_used().get(node, 0)
    shares: dict[str, Duties] = {}
    for run_id in sorted(jobs, key=lambda run_id: _keeping_order(jobs[run_id])):
        share = _share(jobs[run_id], own, processes.get(run_id, ()), room)
        room -= len(share.aborted) + len(share.spares)
        if share != Duties():
            shares[run_id] = share
    for run_id, left in processes.items():
        if run_id not in jobs:
            shares[run_id] = Duties(retired=tuple(one.worker for one in left))
    return shares


def ranks_here(state: ClusterState, node: str, incarnation: int) -> int:
    """How many ranks this incarnation of ``node`` should be running, or holds until a planned change is made."""
    return sum(1 for _ in _generations_here(state, node, incarnation))


def saves_here(state: ClusterState, node: str, incarnation: int) -> bool:
    """Whether ranks of this incarnation of ``node`` are to save their state before they end."""
    return any(one.vacated for one in _generations_here(state, node, incarnation))


def _generations_here(state: ClusterState, node: str, incarnation: int) -> Iterator[Generation]:
    """The generation of each rank that this incarnation of ``node`` has."""
    own = state.nodes.get(node)
    if own is None or own.incarnation != incarnation:
        return
    for job in state.jobs.values():
        if job.status in ASSIGNED:
            present = [one for one in (job.generation, job.outgoing) if one is not None]
            for generation in present:
                here = [m for m in generation.members if m.node == node and own.holds(m)]
                yield from [generation] * len(here)


def next_join(job: Job, rank: int, process: Process | None = None) -> Join:
    """What a process is told to become this rank of the newest generation.

    Raises:
        ValueError: the newest generation has no such rank.
    """
    generation = job.generation
    members = generation.members if generation else ()
    member = next((one for one in members if one.rank == rank), None)
    if generation is None or member is None:
        raise ValueError(f"job '{job.job_id}' has no rank {rank}")
    outgoing = job.outgoing.number if job.outgoing else None
    trains_on = process is not None and process.joined == outgoing and process.phase in _AT_WORK
    source = job.source_of(generation)
    return Join(
        generation=generation.number,
        rank=rank,
        local_rank=member.local_rank,
        world_size=len(generation.members),
        checkpoint=source if source and source.status is CheckpointStatus.COMMITTED else None,
        weights_only=generation.from_initial and job.takes_weights_only,
        resume_step=generation.resume_step,
        at_boundary=generation.planned and trains_on,
    )


def worker_plan(
    job: Job, worker: int, join: Join | None, settings: SupervisorSettings, control_path: Path
) -> WorkerPlan:
    """All that a process needs to start; ``control_path`` is the agent's socket."""
    return WorkerPlan(
        job_id=job.job_id,
        run_id=job.run_id,
        worker=worker,
        node=settings.node,
        host=settings.host,
        spec=job.spec,
        store_dir=str(settings.store_dir),
        stores=settings.stores,
        control_path=str(control_path),
        log_path=str(log_path(settings.log_dir, job.run_id, worker)),
        threads=settings.worker_threads,
        join=join,
    )


# --- one run ---------------------------------------------------------------------------------------------------


def _keeping_order(job: Job) -> tuple[int, int, str]:
    """Whose survivors and spares stay where not all of them can."""
    return (-job.spec.priority, job.submit_index, job.run_id)


def _share(job: Job, own: Node, processes: Sequence[Process], room: int) -> Duties:
    assert job.generation is not None  # only such jobs are looked at
    if job.status is JobStatus.RECOVERING:
        return _between_generations(job, own, processes, room)
    if job.status not in ASSIGNED:
        return Duties(retired=tuple(one.worker for one in processes))
    generation = job.generation
    mine = [m for m in generation.members if m.node == own.name and own.holds(m)]
    lost = {m.rank for m in mine if m.incarnation != own.incarnation}
    ranks = {
        rank: worker
        for rank, worker in _ranks(job, own, mine, processes).items()
        # What an earlier incarnation spawned and is gone: the ranks that it met do not wait for another.
        if worker is not None or rank not in lost
    }
    taken = {worker for worker in ranks.values() if worker is not None}
    left = [one for one in processes if one.worker not in taken]
    wanted = sum(1 for m in generation.spares if m.node == own.name and own.holds(m))
    waiting = [one.worker for one in left if one.told == 0 and one.usable]
    spares: tuple[int | None, ...] = (*waiting, *[None] * wanted)[: max(0, min(wanted, room))]
    return Duties(
        ranks=ranks,
        spares=spares,
        retired=tuple(
            one.worker for one in left if one.worker not in spares and not _leaves_later(job, one)
        ),
    )


def _between_generations(job: Job, own: Node, processes: Sequence[Process], room: int) -> Duties:
    """The job is RECOVERING: those with the state stay, as far as nobody else was given their slots.

    Who is gone is remembered: shards that it told of may still be committed.
    """
    staying = [
        one.worker
        for one in sorted(processes, key=lambda one: (one.told == 0, one.rank, one.worker))
        if one.usable
        and own.status is not NodeStatus.LOST
        and not job.is_to_blame(own.name, one.worker)
    ][: max(0, room)]
    return Duties(
        aborted=tuple(staying),
        retired=tuple(one.worker for one in processes if one.alive and one.worker not in staying),
    )


def _ranks(
    job: Job, own: Node, mine: Iterable[Member], processes: Sequence[Process]
) -> dict[int, int | None]:
    generation = job.generation
    assert generation is not None
    number = generation.number
    ranks: dict[int, int | None] = dict.fromkeys((member.rank for member in mine), None)
    # A dead process keeps its rank, and the one before a planned change too: the coordinator decides what follows.
    since = job.outgoing.number if job.outgoing and generation.planned else number

    def rank_of(one: Process) -> int:
        # What it was told of a change that another one has replaced counts for nothing.
        return one.rank if one.told == number else one.ranks.get(since, one.rank)

    for one in sorted(processes, key=lambda one: (one.told, one.usable, one.worker)):
        rank = rank_of(one)
        joins_anew = rank in generation.joining and one.told < number
        if one.told >= since and rank in ranks and not joins_anew:
            ranks[rank] = one.worker
    able = [one for one in processes if one.usable and one.told < number]
    if generation.planned and job.outgoing:
        # Who has to take another rank because there are fewer, and who was made for the change or for none.
        size = len(generation.members)
        moving = [one for one in able if one.was_in(since) and rank_of(one) >= size]
        new = [one for one in able if one.told == 0 or (one.told > since and not one.was_in(since))]
        staying = {rank: one for rank, one in ranks.items() if rank not in generation.joining}
        joining = {rank: one for rank, one in ranks.items() if rank in generation.joining}
        return _filled(staying, moving) | _filled(joining, new)
    return _filled(ranks, [one for one in able if not job.is_to_blame(own.name, one.worker)])


def _filled(ranks: Mapping[int, int | None], able: Sequence[Process]) -> dict[int, int | None]:
    """Hand the ranks that nobody has to those who are able, each to the best one."""
    filled = dict(ranks)
    left = {one.worker: one for one in able if one.worker not in ranks.values()}
    for one in sorted(left.values(), key=lambda one: (-one.told, one.worker)):
        if one.told > 0 and filled.get(one.rank, one.worker) is None and one.rank in filled:
            filled[one.rank] = one.worker
            del left[one.worker]
    others = sorted(left.values(), key=_worth)
    for rank in sorted(rank for rank, worker in filled.items() if worker is None):
        if others:
            filled[rank] = others.pop(0).worker
    return filled


def _worth(process: Process) -> tuple[bool, bool, int, int]:
    """Survivors first, by former rank; then spares, those that are prepared first."""
    spare = process.told == 0
    unprepared = spare and process.phase is not WorkerPhase.SPARE
    return (spare, unprepared, process.rank, process.worker)


def _leaves_later(job: Job, process: Process) -> bool:
    """Whether a process without a rank in a planned generation has, or had, its part in the outgoing one.

    It trains until all leave after the same step, and is kept until the others train again: it has the state.
    """
    return job.outgoing is not None and process.was_in(job.outgoing.number)
