"""What the demo found, for people and as JSON, and whether every expectation held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from distroml.cli.context import print_table, size
from distroml.cli.incidents import print_incidents
from distroml.client import Json
from distroml.demo.story import Facts

LEAST_ACCURACY = 0.85


class Verdict(Struct, frozen=True):
    """One expectation and what became of it."""

    expected: str
    held: bool
    found: str


Copies = Callable[[str], Sequence[Path]]
"""Where a file of the store is on the nodes' disks."""


def judge(facts: Facts, copies: Copies) -> list[Verdict]:
    """All expectations of the demo against what it saw and what is on disk."""
    job, reached = facts.job, accuracy(facts.job)
    recovered = [one for one in facts.incidents if one["recovered_at"] is not None]
    by_worker, by_leader = _caused_by_worker(facts), _caused_by_leader(facts)
    whole = [one for one in facts.checkpoints if _manifest_is_whole(copies, one)]
    restarts = sum(one["steps_lost"] or 0 for one in recovered)
    return [
        Verdict("the job is COMPLETED", job.get("status") == "COMPLETED", _status(job)),
        Verdict("the worker's death was recovered from", _over(by_worker), _told(by_worker)),
        Verdict("the leader's death was recovered from", _over(by_leader), _told(by_leader)),
        Verdict(
            "a new leader was elected",
            facts.new_leader not in (None, facts.killed_leader),
            f"{facts.killed_leader or '-'} → {facts.new_leader or '-'}",
        ),
        Verdict("the killed node came back", facts.node_back, facts.killed_leader or "-"),
        Verdict(
            f"accuracy is above {LEAST_ACCURACY}",
            reached is not None and reached > LEAST_ACCURACY,
            "-" if reached is None else f"{reached:.4f}",
        ),
        Verdict(
            "checkpoints are committed, their manifests whole on disk",
            0 < len(whole) == len(facts.checkpoints),
            f"{len(whole)} of {len(facts.checkpoints)}",
        ),
        Verdict(
            "every step was done",
            job.get("step") == facts.steps,
            f"{job.get('step')} of {facts.steps}, {restarts} of them twice",
        ),
    ]


def show(facts: Facts, verdicts: list[Verdict]) -> None:
    """Checkpoints, incidents, numbers and verdicts as tables."""
    _heading("Committed checkpoints")
    print_table(
        ("STEP", "EPOCH", "GENERATION", "SHARDS", "SIZE", "MANIFEST"),
        (
            (
                *(one[name] for name in ("step", "epoch", "generation", "shards")),
                size(one["size_bytes"]),
                f"{one['directory'].rpartition('/')[2]}/{one['manifest']}",
            )
            for one in facts.checkpoints
        ),
        empty="none",
        right=("STEP", "EPOCH", "GENERATION", "SHARDS", "SIZE"),
    )
    _heading("Incidents")
    print_incidents(facts.incidents)
    _heading("Numbers")
    numbers = {
        "final accuracy": _number(accuracy(facts.job)),
        "state digest": (facts.job.get("result") or {}).get("state_digest", "-"),
        **{
            name.replace("_", " ") + " s": f"{value:.2f}" for name, value in facts.timings_s.items()
        },
        "wall time s": f"{facts.wall_s:.1f}",
    }
    print_table(("WHAT", "VALUE"), numbers.items(), empty="")
    _heading("Verdict")
    print_table(
        ("", "EXPECTED", "FOUND"),
        (("✓" if one.held else "✗", one.expected, one.found) for one in verdicts),
        empty="",
    )


def write_json(file: Path, facts: Facts, verdicts: list[Verdict]) -> None:
    """Everything that was found, for programs."""
    document: dict[str, Any] = {
        "held": bool(verdicts) and all(one.held for one in verdicts),
        "accuracy": accuracy(facts.job),
        "verdicts": verdicts,
        **msgspec.to_builtins(facts),
    }
    file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def accuracy(job: Json) -> float | None:
    """The final accuracy on held-out data, None where the job left none."""
    metrics = (job.get("result") or {}).get("metrics", {})
    return next((float(v) for name, v in metrics.items() if "accuracy" in name), None)


def _caused_by_worker(facts: Facts) -> Json | None:
    victim = facts.killed_worker or {}
    return next(
        (one for one in facts.incidents if one["cause"].get("pid") == victim.get("pid", -1)), None
    )


def _caused_by_leader(facts: Facts) -> Json | None:
    # the first sign of it may be the node's silence or its worker's end
    worker = _caused_by_worker(facts)
    others = [one for one in facts.incidents if one is not worker]
    return next((one for one in others if one["cause"].get("node") == facts.killed_leader), None)


def _manifest_is_whole(copies: Copies, checkpoint: Json) -> bool:
    """Whether some node has it, and each that does has it whole."""
    files = copies(f"{checkpoint['directory']}/{checkpoint['manifest']}")
    try:
        hashes = {_sha256(file) for file in files}
    except OSError:
        return False
    return hashes == {checkpoint["manifest_sha256"]}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _over(incident: Json | None) -> bool:
    return incident is not None and incident["recovered_at"] is not None


def _told(incident: Json | None) -> str:
    if incident is None:
        return "no such incident"
    total = incident["phases_ms"].get("total")
    took = "not over" if total is None else f"{total:.0f} ms"
    return f"{took}: {incident['reason']}"


def _status(job: Json) -> str:
    return f"{job.get('status', 'never submitted')}: {job.get('reason', '')}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _heading(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")
