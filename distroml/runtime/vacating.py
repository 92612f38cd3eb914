"""Ranks that have to leave their nodes although nobody else has their state: they save it, and the run goes on elsewhere.

Pure; used by ``runtime.reconciler``. Most planned changes hand the state to newcomers (``resizing``), for which some rank has
to stay. None does where a run of one rank is drained, or all its nodes shut down at once. Then ``VacateGeneration`` has the
ranks stop at a step boundary and save a checkpoint there. Once that is committed, the generation ends, and the next one
begins with it as soon as there is room. Whoever dies meanwhile, the log knows which checkpoint is whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from distroml.commands import VacateGeneration
from distroml.model import FailureKind
from distroml.reports import WorkerOutcome
from distroml.runtime.checkpoint_progress import Progress
from distroml.runtime.completion import final_checkpoint_problem
from distroml.runtime.decisions import Decision, Running, Turn
from distroml.runtime.evidence import ranks_text
from distroml.runtime.failing import fail_generation, made_up


def must_vacate(turn: Turn, run: Running) -> bool:
    """Whether the ranks have to go elsewhere without anybody who could take the state over from them."""
    members = run.generation.members
    planned = turn.changes.get(run.job.job_id)
    if run.job.outgoing is not None or (planned is not None and planned.members != members):
        return False
    views = [turn.survey.views.get(member.node) for member in members]
    if all(view is not None and view.leaving for view in views):
        return True  # what is not saved now is lost, whether there is room elsewhere or not
    room = any(host.free > 0 and not host.closed for host in turn.schedule.left.values())
    return len(members) == 1 and turn.survey.to_move(members[0]) and room


def vacate(turn: Turn, run: Running) -> list[Decision]:
    """Have the ranks save a checkpoint and end, unless they are asked already or need not leave."""
    if run.generation.vacated or not must_vacate(turn, run):
        return []
    number = run.generation.number
    reason = (
        f"generation {number}: {_left(run)}; a checkpoint is saved, and the run goes on elsewhere"
    )
    command = VacateGeneration(job_id=run.job.job_id, generation=number, reason=reason)
    return [Decision(action=command, reason=reason)]


def vacated(
    turn: Turn, run: Running, outcomes: Mapping[int, WorkerOutcome], at: Progress
) -> list[Decision]:
    """The end of a generation whose ranks have ended as asked; nothing while their checkpoint is being committed."""
    outcome = outcomes[min(outcomes)]
    problem = final_checkpoint_problem(turn, run, outcome, at)
    if problem is None:
        return []
    saved = "saved" if not problem else f"not saved because {problem}"
    reason = f"{_left(run)}; step {outcome.step} is {saved}"
    verdict = made_up(turn, run, FailureKind.NODE_LEFT, reason, run.generation.members)
    return fail_generation(turn, run, verdict, [])


def _left(run: Running) -> str:
    members = run.generation.members
    nodes = sorted({member.node for member in members})
    ranks = ranks_text([member.rank for member in members])
    return (
        f"{ranks} leave{'s'[: len(members) == 1]} node{'s'[: len(nodes) != 1]} {', '.join(nodes)}"
    )
