"""How far the checkpoints of a running generation are, and what to do next about them.

Pure; used by ``runtime.reconciler``. Everything is derived from the shards that agents list and from the committed
checkpoints, so a new leader sees the same. Only steps after the newest commit of this generation are considered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct

from distroml.commands import AbandonCheckpoint, BeginCheckpoint
from distroml.model import CheckpointStatus, Generation, JobStatus
from distroml.reports import Former, ShardFact, WorkerFact
from distroml.runtime.decisions import Decision, Running, Turn, WriteManifest
from distroml.runtime.facts import sighting_of, workers_of


class OpenCheckpoint(Struct, frozen=True, kw_only=True):
    """A step with durable shards that may still be committed."""

    step: int
    shards: tuple[ShardFact, ...]
    """By rank; of all ranks once it is whole."""
    whole: bool


class Progress(Struct, frozen=True, kw_only=True):
    """Checkpoints of one generation that are not committed, by step in ascending order."""

    open: tuple[OpenCheckpoint, ...]
    dead: dict[int, str]
    """Steps that will never be whole, with the reason."""

    @property
    def whole(self) -> tuple[OpenCheckpoint, ...]:
        return tuple(one for one in self.open if one.whole)


def progress(turn: Turn, run: Running) -> Progress:
    """Where each uncommitted checkpoint of the generation stands."""
    number, checkpoints = run.generation.number, run.job.checkpoints
    saved = _saved(turn, run)
    floor = max((c.step for c in checkpoints if c.generation == number), default=-1)
    # An earlier generation may have committed what was whole when it failed, while this one went on from further back.
    floor = max(floor, run.job.passed_by(number) - 1)
    # Below the floor lies a corrupt one of this very generation too: the same shards are not committed again.
    settled = {c.step for c in checkpoints if c.status is CheckpointStatus.COMMITTED}
    shards = {
        step: held
        for step, held in _by_step(saved, run.generation).items()
        if step > floor and step not in settled
    }
    world_size = len(run.generation.members)
    dead = {
        step: why
        for step, why in _dead(turn, run, saved, shards, world_size)
        if step > floor and step not in settled
    }
    return Progress(
        open=tuple(
            OpenCheckpoint(
                step=step,
                shards=tuple(held[rank] for rank in sorted(held)),
                whole=len(held) == world_size,
            )
            for step, held in sorted(shards.items())
            if step not in dead
        ),
        dead=dict(sorted(dead.items())),
    )


def checkpoint_decisions(turn: Turn, run: Running, at: Progress) -> list[Decision]:
    """Show, commit or give up what is under way. Commits go in the order of steps."""
    job, number = run.job, run.generation.number
    decisions = [
        Decision(
            action=AbandonCheckpoint(
                job_id=job.job_id, generation=number, step=step, reason=at.dead[step]
            ),
            reason=f"checkpoint of step {step} abandoned: {at.dead[step]}",
        )
        for step in _to_announce(turn, run, at)
    ]
    if at.open and job.status is JobStatus.RUNNING:
        step = at.open[0].step
        begin = BeginCheckpoint(job_id=job.job_id, generation=number, step=step)
        decisions.append(Decision(action=begin, reason=f"first shard of step {step} is durable"))
    if at.open and at.open[0].whole:
        decisions += write_decisions(turn, run, at.open[:1])
    return decisions


def left_behind(turn: Turn, work: Running, number: int) -> list[Decision] | None:
    """What becomes of checkpoints that a planned change to generation ``number``, now made, found open.

    Empty where there are none; None while they may still be committed, for which the outgoing generation is kept.
    """
    seen_s = sighting_of(work.job, turn.facts).shards_since_s
    decisions = []
    for one in progress(turn, work).open:
        waited_s = turn.facts.looked_s - seen_s.get(one.step, turn.facts.looked_s)
        if waited_s < turn.settings.commit_wait_s:
            return None
        durable = f"{len(one.shards)} of {len(work.generation.members)} shards were durable"
        why = f"{durable} when generation {number} took over"
        command = AbandonCheckpoint(
            job_id=work.job.job_id, generation=work.generation.number, step=one.step, reason=why
        )
        reason = f"checkpoint of step {one.step} abandoned: {why}"
        decisions.append(Decision(action=command, reason=reason))
    return decisions


def write_decisions(turn: Turn, run: Running, whole: tuple[OpenCheckpoint, ...]) -> list[Decision]:
    """The effects that commit ``whole``, but for those that are being written already."""
    facts = [run.ranks.get(member.rank) for member in run.generation.members]
    ended = all(fact is not None and fact.outcome is not None for fact in facts)
    return [
        Decision(
            action=WriteManifest(
                job_id=run.job.job_id,
                run_id=run.job.run_id,
                generation=run.generation.number,
                step=one.step,
                shards=one.shards,
                store=run.job.spec.checkpointing.store,
                best_metric=run.job.spec.checkpointing.best_metric,
                last=ended,
            ),
            reason=f"all {len(one.shards)} shards of step {one.step} are durable",
        )
        for one in whole
        if (*run.key, one.step) not in turn.facts.writing
    ]


def _to_announce(turn: Turn, run: Running, at: Progress) -> list[int]:
    """Dead steps to abandon now: those seen to be dead in this very look, once; later only what the job shows."""
    seen = sighting_of(run.job, turn.facts).abandoned_since_s
    steps = {step for step in at.dead if seen.get(step) == turn.facts.looked_s}
    if at.dead and not at.open and run.job.status is JobStatus.CHECKPOINTING:
        steps.add(max(at.dead))
    return sorted(steps)


def _saved(turn: Turn, run: Running) -> dict[int, WorkerFact | Former]:
    """What each rank of the generation saved in it, also of those that have left it by a planned change."""
    number = run.generation.number
    if number == run.job.generation_number:
        return dict(
            run.ranks
        )  # nobody has left the newest one; all workers of the cluster need not be looked at
    left = {
        fact.former.rank: fact.former
        for _, fact in workers_of(run.job, turn.facts)
        if fact.former is not None and fact.former.generation == number
    }
    return {**left, **run.ranks}


def _by_step(
    ranks: Mapping[int, WorkerFact | Former], generation: Generation
) -> dict[int, dict[int, ShardFact]]:
    shards: dict[int, dict[int, ShardFact]] = {}
    for member in generation.members:
        fact = ranks.get(member.rank)
        for shard in fact.shards if fact else ():
            if shard.rank == member.rank:
                shards.setdefault(shard.step, {})[shard.rank] = shard
    return shards


def _dead(
    turn: Turn,
    run: Running,
    saved: Mapping[int, WorkerFact | Former],
    shards: Mapping[int, Mapping[int, ShardFact]],
    world_size: int,
) -> Iterator[tuple[int, str]]:
    """Steps that cannot be completed any more; of several reasons for one step the last counts."""
    newest_whole = max((s for s, held in shards.items() if len(held) == world_size), default=-1)
    first_seen = sighting_of(run.job, turn.facts).shards_since_s
    for step, held in shards.items():
        waited_s = turn.facts.looked_s - first_seen.get(step, turn.facts.looked_s)
        if len(held) < world_size and step < newest_whole:
            yield step, f"the one of step {newest_whole} was whole before it"
        elif len(held) < world_size and waited_s >= turn.settings.checkpoint_deadline_s:
            yield step, f"{len(held)} of {world_size} shards after {waited_s:.0f} s"
    for rank in sorted(saved):
        for step, why in saved[rank].abandoned:
            yield step, f"rank {rank} could not write its shard: {why}"
    for (job_id, number, step), why in turn.facts.write_failures.items():
        if (job_id, number) == run.key:
            yield step, f"its manifest could not be written: {why}"
