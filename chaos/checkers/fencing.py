"""Promise: what a generation did that is over has no effect any more.

Judged by:

- checkpoints are committed in the order of generations, and a commit is of the generation that trains at its log index
  (or of the one before, which a planned change lets train on until it is relieved, or whose survivors went on from the
  checkpoint's step or beyond it: what was whole when it failed may still be committed);
- a recovery goes back no further than the newest whole checkpoint that was committed by the generation which failed, or
  by one before it, and tells how far it goes back;
- the end of a process fails one generation, not the next one as well;
- within one generation each rank tells its steps one after the other.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict

from chaos.checkers.facts import History, Limits, of, violation
from chaos.checkers.items import metric
from chaos.records import EventSeen, Incident, JobEnded, JobSeen, Streamed, Violation

NAME = "fencing"


def check(history: History, limits: Limits) -> list[Violation]:
    """All effects of stale generations."""
    return [
        *_order(history),
        *_commits(history),
        *_resumed(history),
        *_ended_twice(history),
        *_order_of_steps(history),
    ]


def _ended_twice(history: History) -> list[Violation]:
    """What was told of a worker in one generation and failed the next one too."""
    first: dict[tuple[str, str], Incident] = {}
    found = []
    for incident in of(history, Incident):
        if not incident.culprit:
            continue
        before = first.setdefault((incident.job_id, incident.culprit), incident)
        if before.generation != incident.generation:
            what = (
                f"{incident.culprit} failed generation {before.generation} of job {incident.job_id}, and "
                f"generation {incident.generation} as well: {incident.reason}"
            )
            found.append(violation(NAME, what, [before, incident], job_id=incident.job_id))
    return found


def _order(history: History) -> list[Violation]:
    found = []
    for one in of(history, JobEnded):
        by_step = sorted(one.checkpoint_generations.items())
        for (step, generation), (later, other) in itertools.pairwise(by_step):
            if other < generation:
                what = (
                    f"checkpoint {later} of job {one.job_id} is of generation {other}, and checkpoint {step} "
                    f"before it of generation {generation}"
                )
                found.append(violation(NAME, what, [one], job_id=one.job_id))
    return found


def _commits(history: History) -> list[Violation]:
    """Each commit that the log tells, against the generation that the job had then."""
    of_job: dict[str, dict[int, int]] = defaultdict(dict)
    planned: set[tuple[str, int]] = set()
    commits: dict[tuple[str, int], EventSeen] = {}
    for record in history:
        match record:
            case EventSeen(job_id=str(job_id), name="state"):
                of_job[job_id][record.log_index] = int(record.data["generation"])
            case EventSeen(job_id=str(job_id), name="checkpoint_committed"):
                commits[job_id, int(record.data["step"])] = record
            case JobSeen(log_index=int(index)):
                of_job[record.job_id].setdefault(index, record.generation)
                if record.planned:
                    planned.add((record.job_id, record.generation))
    found = []
    for ended in of(history, JobEnded):
        known = sorted(of_job[ended.job_id].items())
        for step, generation in ended.checkpoint_generations.items():
            commit = commits.get((ended.job_id, step))
            if commit is None or not known:
                continue
            place = bisect_right(known, commit.log_index, key=lambda one: one[0])
            if not place:
                continue
            current = known[place - 1][1]
            if generation >= current:
                continue
            relieved = all(
                (ended.job_id, one) in planned for one in range(generation + 1, current + 1)
            )
            whole = any(
                one.job_id == ended.job_id
                and (one.generation, one.next_generation) == (generation, current)
                and one.resume_step is not None
                and one.resume_step >= step
                for one in of(history, Incident)
            )
            if not relieved and not whole:
                what = (
                    f"checkpoint {step} of job {ended.job_id} was committed by generation {generation} at index "
                    f"{commit.log_index}, when generation {current} had taken its place"
                )
                found.append(violation(NAME, what, [commit, ended], job_id=ended.job_id))
    return found


def _resumed(history: History) -> list[Violation]:
    """Recoveries that gave up more than they had to, or kept quiet about it."""
    ends = {one.job_id: one for one in of(history, JobEnded)}
    found = []
    for one in of(history, Incident):
        ended = ends.get(one.job_id)
        if ended is None or one.resume_step is None:
            continue
        saved = [
            step
            for step, generation in ended.checkpoint_generations.items()
            if generation <= one.generation and step not in ended.corrupt
        ]
        newest = max(saved, default=0)
        if one.resume_step < newest and not _fell_back(history, one.job_id):
            what = (
                f"generation {one.next_generation} of job {one.job_id} went on from step {one.resume_step}, though "
                f"checkpoint {newest} had been committed before"
            )
            found.append(violation(NAME, what, [one, ended], job_id=one.job_id))
        if one.steps_lost != max(0, one.highest_step - one.resume_step):
            what = (
                f"the incident of generation {one.generation} of job {one.job_id} tells of {one.steps_lost} lost "
                f"steps; it failed at {one.highest_step} and resumed at {one.resume_step}"
            )
            found.append(violation(NAME, what, [one], job_id=one.job_id))
    return found


def _fell_back(history: History, job_id: str) -> bool:
    """Whether a checkpoint of the job was found to be corrupt, then it may have been retired since."""
    return any(
        one.job_id == job_id and one.name == "checkpoint_corrupt" for one in of(history, EventSeen)
    )


def _order_of_steps(history: History) -> list[Violation]:
    found = []
    for stream in of(history, Streamed):
        if not stream.reference or stream.stream != "metrics":
            continue
        last: dict[tuple[int, int], int] = {}
        for item in stream.items:
            generation, rank, step, evaluated, _ = metric(item)
            before = last.get((generation, rank))
            if evaluated:
                continue
            if before is not None and step <= before:
                what = f"rank {rank} of generation {generation} of job {stream.job_id} told step {step} after step {before}"
                found.append(violation(NAME, what, job_id=stream.job_id, at_s=stream.at_s))
            last[generation, rank] = step
    return found
