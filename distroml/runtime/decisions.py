"""What a turn of the reconciler is made of: its inputs in one value, and the decisions that come out."""

from __future__ import annotations

from msgspec import Struct

from distroml.commands import AnyCommand
from distroml.model import Generation, Job
from distroml.reports import ShardFact, WorkerFact
from distroml.runtime.facts import Facts, Now, ReconcilerSettings, members_facts, ranks_of
from distroml.runtime.node_survey import Survey
from distroml.runtime.scheduler import Placement, Schedule


class WriteManifest(Struct, frozen=True, kw_only=True):
    """Effect: write the manifest of a whole checkpoint, then propose ``CommitCheckpoint``.

    It is decided again in each turn until its key (job, generation, step) is among ``Facts.writing`` or the commit
    is in the state. A writer that gives up puts the key into ``Facts.write_failures``.
    """

    job_id: str
    run_id: str
    generation: int
    step: int
    shards: tuple[ShardFact, ...]
    """One per rank, in the order of ranks."""
    store: str = "local"
    """As in the job's spec."""
    best_metric: str = ""
    """Metric of the state whose value the log should know; empty: none."""
    last: bool = False
    """All ranks have ended: what is not committed now is lost."""


class Decision(Struct, frozen=True, kw_only=True):
    """One thing to do and, for people, why."""

    action: AnyCommand | WriteManifest
    reason: str
    together: bool = False
    """Proposed right behind the decision before it on the same job, without waiting for what becomes of that."""


class Turn(Struct, frozen=True, kw_only=True):
    """All that the decisions of one turn may look at."""

    active: tuple[Job, ...]
    """Jobs that have not ended, by submission."""
    facts: Facts
    now: Now
    settings: ReconcilerSettings
    survey: Survey
    schedule: Schedule
    changes: dict[str, Placement] = {}
    """Where ranks and spares of running jobs are to be, for those that are to change."""


class Running(Struct, frozen=True, kw_only=True):
    """A job that has a generation, with what is known of its ranks."""

    job: Job
    generation: Generation
    ranks: dict[int, WorkerFact]

    @property
    def key(self) -> tuple[str, int]:
        return self.job.job_id, self.generation.number

    @property
    def highest_step(self) -> int:
        """Most steps that any rank completed."""
        steps = (fact.step for fact in self.ranks.values())
        return max(steps, default=self.generation.resume_step)


def at_work(job: Job, facts: Facts) -> Running:
    """The job with the facts of the generation that trains until a planned change is made, or else of the newest.

    Raises:
        ValueError: the job has no generation.
    """
    if job.outgoing is None:
        return running(job, facts)
    ranks = ranks_of(job, job.outgoing, facts)
    return Running(job=job, generation=job.outgoing, ranks=ranks)


def running(job: Job, facts: Facts) -> Running:
    """The job with the facts of its newest generation.

    Raises:
        ValueError: the job has no generation; statuses past QUEUED always have one.
    """
    if job.generation is None:
        raise ValueError(f"job '{job.job_id}' is {job.status} but has no generation")
    return Running(job=job, generation=job.generation, ranks=members_facts(job, facts))
