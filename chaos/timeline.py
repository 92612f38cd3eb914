"""What the picture of a run shows, as plain data: bars, points and counts on one axis of seconds.

Pure. ``report`` embeds it into the page, whose script only draws it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from chaos.checkers.facts import TERMINAL, History, of
from chaos.records import (
    Began,
    EventSeen,
    FaultBegan,
    FaultEnded,
    Incident,
    JobEnded,
    JobSeen,
    NodeSeen,
    Operation,
    Violation,
)
from chaos.specs import VICTIM

MAX_BINS = 600
"""Of client operations over time."""
MAX_STEPS_PER_JOB = 400
GAP_S = 0.2
"""Least distance of two jobs in one row, of ten minutes of run."""

Json = dict[str, Any]


def timeline(history: History, violations: list[Violation]) -> Json:
    """All rows of the picture."""
    end_s = max((_time(record) for record in history), default=1.0)
    return {
        "begin_s": min((round(one.at_s, 2) for one in of(history, NodeSeen)), default=0.0),
        "end_s": round(end_s, 2),
        "calm_s": _calm(history),
        "nodes": _nodes(history, end_s),
        "faults": _faults(history, end_s),
        "jobs": _jobs(history, end_s),
        "operations": _operations(history, end_s),
        "violations": [
            {"at_s": round(one.at_s, 2), "checker": one.checker, "what": one.what}
            for one in violations
            if one.at_s is not None
        ],
    }


def _time(record: Any) -> float:
    return float(record.at_s)


def _calm(history: History) -> float | None:
    """When the last fault had ended."""
    ends = [one.at_s for one in history if isinstance(one, FaultBegan | FaultEnded)]
    return round(max(ends), 2) if ends else None


def _nodes(history: History, end_s: float) -> list[Json]:
    """What each node was, from one look to the next."""
    bars: dict[str, list[Json]] = defaultdict(list)
    for one in of(history, NodeSeen):
        role = one.role if one.answers else "silent"
        own = bars[one.node]
        at_s = round(one.at_s, 2)
        if own and (own[-1]["role"], own[-1]["term"]) == (role, one.term):
            continue
        if own:
            own[-1]["end_s"] = at_s
        own.append(
            {"at_s": at_s, "end_s": end_s, "role": role, "term": one.term, "reason": one.reason}
        )
    return [{"name": name, "bars": found} for name, found in sorted(bars.items())]


def _faults(history: History, end_s: float) -> list[Json]:
    ended = {one.fault: one for one in of(history, FaultEnded)}
    found = []
    for one in of(history, FaultBegan):
        end = ended.get(one.fault)
        found.append(
            {
                "fault": one.fault,
                "kind": one.kind,
                "family": one.family,
                "nodes": list(one.nodes),
                "at_s": round(one.at_s, 2),
                "end_s": round(end.at_s if end else end_s, 2),
                "detail": one.detail,
                "during": one.during,
                "note": end.note if end else "it was not taken back",
            }
        )
    return found


def _jobs(history: History, end_s: float) -> list[Json]:
    looks: dict[str, list[JobSeen]] = defaultdict(list)
    for seen in of(history, JobSeen):
        looks[seen.job_id].append(seen)
    ends = {one.job_id: one for one in of(history, JobEnded)}
    undisturbed = {one.job_id for one in of(history, JobEnded) if one.undisturbed}
    over: dict[str, float] = {}
    for event in of(history, EventSeen):
        if event.job_id is not None and event.data.get("status") in TERMINAL:
            over.setdefault(event.job_id, event.at_s)
    commits: dict[str, dict[int, float]] = defaultdict(dict)
    corrupt: dict[str, dict[int, float]] = defaultdict(dict)
    for event in of(history, EventSeen):
        if event.job_id is not None and event.name in (
            "checkpoint_committed",
            "checkpoint_corrupt",
        ):
            into = commits if event.name == "checkpoint_committed" else corrupt
            into[event.job_id].setdefault(int(event.data["step"]), round(event.at_s, 2))
    incidents: dict[str, list[Incident]] = defaultdict(list)
    for incident in of(history, Incident):
        incidents[incident.job_id].append(incident)
    found = []
    for job_id, seen_of in looks.items():
        ended = ends.get(job_id)
        if job_id in undisturbed:
            continue
        found.append(
            {
                "job_id": job_id,
                "name": seen_of[0].name,
                "victim": seen_of[0].name == VICTIM,
                "total": ended.total_steps if ended else None,
                "state": ended.state if ended else seen_of[-1].state,
                "states": _states(seen_of, round(over.get(job_id, end_s), 2)),
                "generations": _generations(seen_of),
                "steps": _steps(seen_of),
                "commits": [[at_s, step] for step, at_s in sorted(commits[job_id].items())],
                "corrupt": [[at_s, step] for step, at_s in sorted(corrupt[job_id].items())],
                "incidents": [
                    {
                        "at_s": round(one.at_s, 2),
                        "reason": one.reason,
                        "total_ms": one.total_ms,
                        "steps_lost": one.steps_lost,
                    }
                    for one in incidents[job_id]
                ],
            }
        )
    return _rows(found)


def _by_log(seen: list[JobSeen]) -> list[JobSeen]:
    """Looks that show something newer than all before: a node that lags shows the past."""
    newest, found = -1, []
    for one in seen:
        if one.log_index is None or one.log_index >= newest:
            newest = one.log_index if one.log_index is not None else newest
            found.append(one)
    return found


def _states(seen: list[JobSeen], end_s: float) -> list[Json]:
    bars: list[Json] = []
    for one in _by_log(seen):
        at_s = round(one.at_s, 2)
        if bars and bars[-1]["state"] == one.state:
            continue
        if bars:
            bars[-1]["end_s"] = at_s
        if one.state in TERMINAL:
            break
        bars.append({"at_s": at_s, "end_s": end_s, "state": one.state})
    return bars


def _generations(seen: list[JobSeen]) -> list[list[float]]:
    found: list[list[float]] = []
    for one in _by_log(seen):
        if one.generation and (not found or one.generation > found[-1][1]):
            found.append([round(one.at_s, 2), one.generation])
    return found


def _steps(seen: list[JobSeen]) -> list[list[float]]:
    points = [[round(one.at_s, 2), one.step] for one in _by_log(seen)]
    stride = -(-len(points) // MAX_STEPS_PER_JOB)
    return points[:: max(1, stride)] + points[-1:]


def _rows(jobs: list[Json]) -> list[Json]:
    """Give each job a row of its own as long as it is there; victims have their own rows."""
    ends: dict[bool, list[float]] = {True: [], False: []}
    for job in sorted(jobs, key=lambda one: one["steps"][0][0]):
        taken = ends[job["victim"]]
        begins = job["steps"][0][0]
        finishes = job["states"][-1]["end_s"] if job["states"] else begins
        row = next((n for n, end in enumerate(taken) if end + GAP_S <= begins), len(taken))
        taken[row : row + 1] = [finishes]
        job["row"] = row
    return jobs


def _operations(history: History, end_s: float) -> Json:
    width_s = max(0.5, end_s / MAX_BINS)
    count = int(end_s / width_s) + 1
    bins: dict[str, list[int]] = {name: [0] * count for name in ("ok", "failed", "unknown")}
    for one in of(history, Operation):
        bins[one.outcome.value][min(count - 1, int(one.at_s / width_s))] += 1
    return {"width_s": width_s, **bins}


def began(history: History) -> Began | None:
    """The first record of a run."""
    found = of(history, Began)
    return found[0] if found else None
