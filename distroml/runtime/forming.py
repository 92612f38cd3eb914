"""Forms the next generation of a job: where and when one that waits starts, what a planned change makes of one at work.

Pure; used by ``runtime.reconciler``. ``scheduler`` finds the slots, ``resizing`` the changes; here they become commands, from
the state that is furthest: survivors', or the newest checkpoint, for whose commit a recovery waits a moment.
"""

from __future__ import annotations

from distroml.commands import FormGeneration, PlaceSpares
from distroml.model import Generation, Job, JobStatus, Member
from distroml.reports import WorkerFact, WorkerPhase
from distroml.runtime.checkpoint_progress import progress, write_decisions
from distroml.runtime.completion import finish
from distroml.runtime.decisions import Decision, Running, Turn, WriteManifest, at_work, running
from distroml.runtime.evidence import MAX_REASON_BYTES, clip
from distroml.runtime.facts import Facts, Now, ReconcilerSettings, sighting_of, workers_of
from distroml.runtime.node_survey import Survey
from distroml.runtime.scheduler import Placement, Request, describe, may_go_on

# --- waiting for slots -----------------------------------------------------------------------------------------

WAITING = frozenset({JobStatus.QUEUED, JobStatus.RECOVERING})


def request_of(
    job: Job, facts: Facts, now: Now, settings: ReconcilerSettings, seen: Survey
) -> Request:
    """What a job that is ``WAITING`` asks the scheduler for."""
    recovering = job.status is JobStatus.RECOVERING
    resources = job.spec.resources
    left = _left_of(job, facts, seen) if recovering else ()
    return Request(
        job_id=job.job_id,
        workers=resources.workers,
        fewest=resources.fewest,
        spares=resources.spares,
        priority=job.spec.priority,
        submit_index=job.submit_index,
        recovering=recovering,
        survivors=tuple(member for member, fact in left if fact.generation > 0),
        prepared=tuple(member.node for member, fact in left if fact.generation == 0),
        held=_held(job, facts, now, settings, left) if recovering else "",
    )


_Left = tuple[tuple[Member, WorkerFact], ...]


def _left_of(job: Job, facts: Facts, seen: Survey) -> _Left:
    """What a failed generation left on nodes where ranks can be: survivors with their former ranks, and spares."""
    incarnations = {host.node: host.incarnation for host in seen.hosts}
    return tuple(
        (Member(fact.rank, 0, name, incarnations[name]), fact)
        for name, fact in workers_of(job, facts)
        if name in incarnations and may_go_on(fact, name, job)
    )


def _survivors_step(left: _Left) -> int | None:
    """Most steps that a survivor completed; None where none has a state."""
    return max(
        (fact.step for _, fact in left if fact.has_state or fact.phase in _HAS_STATE),
        default=None,
    )


_HAS_STATE = frozenset({WorkerPhase.TRAINING, WorkerPhase.FINISHING})


def _held(job: Job, facts: Facts, now: Now, settings: ReconcilerSettings, left: _Left) -> str:
    """Why a recovering job may not start yet although there may be slots; empty if it may."""
    waited_s = now.monotonic_s - sighting_of(job, facts).since_s
    if waited_s < job.backoff_s:
        return f"restart in {job.backoff_s - waited_s:.1f} s"
    awaited = _awaited(job, facts, now, settings, _survivors_step(left))
    if awaited is not None:
        return f"checkpoint of step {awaited} is being committed"
    return ""


def _awaited(
    job: Job, facts: Facts, now: Now, settings: ReconcilerSettings, done: int | None
) -> int | None:
    """The newest step whose commit is still waited for; None where ``done``, the steps that survivors have, are as many."""
    if now.monotonic_s - sighting_of(job, facts).since_s >= settings.commit_wait_s:
        return None
    assert job.generation is not None  # it recovers
    number, goes_on = job.generation.number, job.generation.resume_step
    committing = [
        step
        for job_id, of, step in facts.writing
        # Also what the one before had whole, where the log would take it: the one that failed now may never have begun.
        if job_id == job.job_id
        and (of == number or (of == number - 1 and (job.generation.planned or step <= goes_on)))
    ]
    # Survivors go on from their own steps; the commit may come when they do (see the state machine).
    return max((step for step in committing if done is None or done < step), default=None)


def on_waiting(turn: Turn, job: Job) -> list[Decision]:
    """QUEUED: form the first generation once the scheduler found slots for its ranks."""
    placement = turn.schedule.placements.get(job.job_id)
    return [_form(turn, job, placement, None)] if placement else []


def _steps_kept(turn: Turn, job: Job, placement: Placement) -> int | None:
    """Most steps that a survivor among the ranks has for certain; None where none of them has a state.

    Where fewer stay on a node than there are, it is up to its agent who.
    """
    kept: _Left = ()
    left = _left_of(job, turn.facts, turn.survey)
    staying = [one.node for one in placement.members if one.rank not in placement.joining]
    for node in set(staying):
        here = [one for one in left if one[0].node == node and one[1].generation > 0]
        here.sort(key=lambda one: _survivors_step((one,)) or 0)
        kept += tuple(here[: staying.count(node)])
    return _survivors_step(kept)


def on_recovering(turn: Turn, job: Job) -> list[Decision]:
    """RECOVERING: what was whole when the generation failed is still committed."""
    run = running(job, turn.facts)
    initial = job.origin()
    if initial is not None and initial is job.initial and initial.reason:
        why = f"it cannot begin with {_initial_text(job)}: {initial.reason}"
        return [finish(run, JobStatus.FAILED, why)]
    writing = write_decisions(turn, run, progress(turn, run).whole)
    placement = turn.schedule.placements.get(job.job_id)
    if placement is None:
        return writing
    done = _steps_kept(turn, job, placement)
    if any(
        one.action.step > (done or 0) for one in writing if isinstance(one.action, WriteManifest)
    ):
        return writing  # and then resumed from
    if _awaited(job, turn.facts, turn.now, turn.settings, done) is not None:
        return writing  # there was no room for the survivors who need not wait
    return [*writing, _form(turn, job, placement, done)]


def _form(turn: Turn, job: Job, placement: Placement, done: int | None) -> Decision:
    newest = job.origin()
    number = job.generation_number + 1
    saved = job.steps_in(newest)
    source = ""
    if done is not None and done >= saved:
        source = f" from the {done} steps that its survivors have"
    elif newest is not None and newest is job.initial:
        source = f" from {_initial_text(job)}"
    elif number > 1:
        source = f" from the checkpoint of step {saved}" if newest else " from scratch"
    reason = f"generation {number}: {describe(placement.members)}{source}"
    generation = Generation(
        number=number,
        members=placement.members,
        joining=placement.joining if number > 1 else (),
        spares=placement.spares,
        formed_at=turn.now.wall_s,
        reason=reason,
        resume_step=max(saved, done or 0),
        checkpoint_step=newest.step if newest else None,
        from_initial=newest is not None and newest is job.initial,
    )
    return Decision(action=FormGeneration(job_id=job.job_id, generation=generation), reason=reason)


def _initial_text(job: Job) -> str:
    wanted, initial = job.spec.init_from, job.initial
    assert wanted is not None
    assert initial is not None  # the one follows from the other
    what = "the model in " if wanted.weights_only else ""
    return f"{what}the checkpoint of step {initial.step} of job {wanted.job}"


# --- planned changes -------------------------------------------------------------------------------------------


def change(turn: Turn, run: Running) -> list[Decision]:
    """Ranks or spares of a run at work are to be elsewhere, and there is room for it."""
    job, placement = run.job, turn.changes.get(run.job.job_id)
    if placement is None:
        return []
    if placement.members == run.generation.members:
        reason = f"{describe(placement.spares)} as spares" if placement.spares else "no spares"
        command = PlaceSpares(
            job_id=job.job_id,
            generation=run.generation.number,
            spares=placement.spares,
            reason=reason,
        )
        return [Decision(action=command, reason=reason)]
    before, after = len(run.generation.members), len(placement.members)
    verb = "moves to" if after == before else "grows to" if after > before else "shrinks to"
    return [_plan(turn, run, placement, f"{verb} {describe(placement.members)}")]


def undo(turn: Turn, run: Running, why: str) -> list[Decision]:
    """A planned change that nobody has made yet fails: those that train go on as they are."""
    outgoing = run.job.outgoing
    if outgoing is None:
        return []
    placement = Placement(outgoing.members, spares=outgoing.spares)
    return [_plan(turn, run, placement, clip(f"stays as it was: {why}", MAX_REASON_BYTES))]


def _plan(turn: Turn, run: Running, placement: Placement, what: str) -> Decision:
    newest = run.job.origin()
    number = run.job.generation_number + 1
    reason = f"generation {number} {what}"
    generation = Generation(
        number=number,
        members=placement.members,
        joining=placement.joining,
        spares=placement.spares,
        planned=True,
        formed_at=turn.now.wall_s,
        reason=reason,
        resume_step=at_work(run.job, turn.facts).highest_step,
        checkpoint_step=newest.step if newest else None,
        from_initial=newest is not None and newest is run.job.initial,
    )
    command = FormGeneration(job_id=run.job.job_id, generation=generation)
    return Decision(action=command, reason=reason)
