"""What a run came to: ``report.json`` for programs, ``report.html`` (one file, nothing from elsewhere) for people."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chaos.checkers import CHECKERS
from chaos.checkers.facts import History, of
from chaos.records import (
    Ended,
    FaultBegan,
    Incident,
    JobEnded,
    JobSeen,
    LeaderSeen,
    MemorySeen,
    Operation,
    Outcome,
    Settled,
    Streamed,
    Violation,
)
from chaos.specs import VICTIM
from chaos.tally import quantile
from chaos.timeline import began, timeline

FORMAT = 1
_TEMPLATE = Path(__file__).with_name("report.html")
_PLACE = "/*DATA*/null"
TRAINS = frozenset({"RUNNING", "CHECKPOINTING"})

Json = dict[str, Any]


def write_report(folder: Path, history: History, violations: Sequence[Violation]) -> Json:
    """Write both files into the run's folder; what is in ``report.json``.

    Raises:
        OSError: the folder cannot be written to.
    """
    report = summary(history, violations)
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    page = {"report": report, "timeline": timeline(history, list(violations))}
    (folder / "report.html").write_text(_page(page), encoding="utf-8")
    return report


def _page(data: Json) -> str:
    # Inside of a script element only "</" could end it; "<" may always be escaped in JSON.
    text = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    template = _TEMPLATE.read_text(encoding="utf-8")
    if template.count(_PLACE) != 1:
        raise ValueError(f"{_TEMPLATE} must have {_PLACE} once")
    return template.replace(_PLACE, text)


def summary(history: History, violations: Sequence[Violation]) -> Json:
    """The tally of a run."""
    first = began(history)
    ends = of(history, JobEnded)
    references = {one.job_id for one in ends if one.undisturbed}
    ends = [one for one in ends if one.undisturbed or one.job_id not in references]
    return {
        "format": FORMAT,
        "run": msgspec.to_builtins(first) if first else {},
        "complete": bool(of(history, Ended)),
        "held": not violations,
        "violations": [msgspec.to_builtins(one) for one in violations],
        "checkers": {name: sum(one.checker == name for one in violations) for name in CHECKERS},
        "faults": _faults(history),
        "operations": _operations(history),
        "recoveries": _recoveries(of(history, Incident)),
        "goodput": _goodput(history),
        "leaders": {
            "terms": len({one.term for one in of(history, LeaderSeen)}),
            "changes": max(0, len(of(history, LeaderSeen)) - 1),
        },
        "jobs": [_job(one, history) for one in ends],
        "streams": _streams(of(history, Streamed)),
        "comeback": _comeback(of(history, Settled)),
        "memory": _memory(of(history, MemorySeen)),
    }


def _faults(history: History) -> Json:
    faults = of(history, FaultBegan)
    by_kind = Counter((one.family, one.kind) for one in faults)
    return {
        "total": len(faults),
        "by_family": dict(sorted(Counter(one.family for one in faults).items())),
        "by_kind": {kind: count for (_, kind), count in sorted(by_kind.items())},
    }


def _operations(history: History) -> Json:
    found: dict[str, Json] = {}
    groups: dict[str, list[Operation]] = defaultdict(list)
    for one in of(history, Operation):
        groups[f"{one.kind}, linearizable" if one.linearizable else one.kind].append(one)
    for kind, made in sorted(groups.items()):
        outcomes = Counter(one.outcome.value for one in made)
        took_ms = [1000 * (one.at_s - one.invoked_s) for one in made if one.outcome is Outcome.OK]
        found[kind] = {
            **{outcome.value: outcomes[outcome.value] for outcome in Outcome},
            **_spread(took_ms, "ms"),
        }
    return found


def _recoveries(incidents: list[Incident]) -> Json:
    phases: dict[str, list[float]] = defaultdict(list)
    for one in incidents:
        for phase, took_ms in one.phases_ms.items():
            phases[phase].append(took_ms)
    lost = [one.steps_lost for one in incidents if one.steps_lost is not None]
    return {
        "incidents": len(incidents),
        "recovered": sum(one.recovered for one in incidents),
        "total": _spread([one.total_ms for one in incidents if one.total_ms is not None], "ms"),
        "phases": {name: _spread(values, "ms") for name, values in phases.items()},
        "steps_lost": {
            "total": sum(lost),
            "most": max(lost, default=0),
            "none": sum(one == 0 for one in lost),
        },
    }


def _goodput(history: History) -> Json:
    """Steps that counts of all that were done, and the share of their lives in which jobs trained."""
    references = {one.job_id for one in of(history, JobEnded) if one.undisturbed}
    useful = sum(
        one.total_steps or 0
        for one in of(history, JobEnded)
        if one.state == "COMPLETED" and one.job_id not in references
    )
    again = sum(one.steps_lost or 0 for one in of(history, Incident))
    trained_s = lived_s = 0.0
    looks: dict[str, list[JobSeen]] = defaultdict(list)
    for seen in of(history, JobSeen):
        looks[seen.job_id].append(seen)
    for made in looks.values():
        begun = [one for one in made if one.state != "QUEUED"]
        for before, after in itertools.pairwise(begun):
            lived_s += after.at_s - before.at_s
            trained_s += (after.at_s - before.at_s) if before.state in TRAINS else 0.0
    done = useful + again
    return {
        "useful_steps": useful,
        "repeated_steps": again,
        "share_of_steps": round(useful / done, 5) if done else None,
        "share_of_time": round(trained_s / lived_s, 4) if lived_s else None,
    }


def _job(one: JobEnded, history: History) -> Json:
    incidents = [i for i in of(history, Incident) if i.job_id == one.job_id]
    return {
        "job_id": one.job_id,
        "name": one.spec_name,
        "undisturbed": one.undisturbed,
        "state": one.state,
        "reason": one.reason,
        "steps": None if one.spec_name == VICTIM else one.total_steps,
        "incidents": len(incidents),
        "steps_lost": sum(i.steps_lost or 0 for i in incidents),
        "checkpoints": len(one.checkpoints),
        "corrupt": len(one.corrupt),
        "model_sha256": one.model_sha256,
    }


def _streams(streams: list[Streamed]) -> Json:
    followed = [one for one in streams if not one.reference]
    return {
        "followed": len(followed),
        "ended": sum(one.ended for one in followed),
        "connections": sum(one.connections for one in followed),
        "items": sum(len(one.items) for one in followed),
    }


def _comeback(settled: list[Settled]) -> Json:
    if not settled:
        return {}
    took = [one for one in settled[-1].progress_s.values() if one is not None]
    return {
        "leader_s": settled[-1].leader_s,
        "progress_s": max(took, default=None),
        "jobs": len(settled[-1].progress_s),
    }


def _memory(samples: list[MemorySeen]) -> Json:
    by_node: dict[str, list[MemorySeen]] = defaultdict(list)
    for one in samples:
        by_node[one.node].append(one)
    return {
        node: {
            "most_bytes": max(one.rss_bytes for one in made),
            "last_bytes": made[-1].rss_bytes,
            "most_files": max(one.files for one in made),
            "processes": len({one.pid for one in made}),
        }
        for node, made in sorted(by_node.items())
    }


def _spread(values: Iterable[float], unit: str) -> Json:
    ordered = sorted(values)
    if not ordered:
        return {f"p50_{unit}": None, f"p99_{unit}": None, f"most_{unit}": None}
    return {
        f"p50_{unit}": round(quantile(ordered, 0.5), 1),
        f"p99_{unit}": round(quantile(ordered, 0.99), 1),
        f"most_{unit}": round(ordered[-1], 1),
    }
