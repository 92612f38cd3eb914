"""What many runs came to together: faults by kind, operations, recoveries, steps lost, violations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from chaos.records import FaultBegan, Incident, Operation, Record, Violation


class Tally(Struct, kw_only=True):
    """A sum over runs."""

    runs: int = 0
    invalid: int = 0
    """Runs in which too little happened."""
    faults: dict[str, int] = {}
    """Number by kind."""
    operations: dict[str, int] = {}
    """Number by outcome."""
    recoveries_ms: list[float] = []
    """Of each recovery that came to its end, where no node's clock had jumped meanwhile."""
    unfinished: int = 0
    """Recoveries that did not: another failure, or the end of the job, came first."""
    steps_lost: int = 0
    violations: dict[str, int] = {}
    """Number by checker."""
    failed_seeds: list[int] = []

    def add(self, seed: int, history: Iterable[Record], violations: Sequence[Violation]) -> None:
        """Count a run."""
        faults, operations, broken = Counter(self.faults), Counter(self.operations), Counter(self.violations)  # fmt: skip
        self.runs += 1
        for record in history:
            match record:
                case FaultBegan(kind=kind):
                    faults[kind] += 1
                case Operation(outcome=outcome):
                    operations[outcome.value] += 1
                case Incident(total_ms=total_ms, steps_lost=lost, recovered=recovered):
                    self.steps_lost += lost or 0
                    self.unfinished += not recovered
                    if total_ms is not None:
                        self.recoveries_ms.append(total_ms)
        broken.update(one.checker for one in violations)
        self.faults, self.operations, self.violations = dict(faults), dict(operations), dict(broken)
        if violations:
            self.failed_seeds.append(seed)

    def __str__(self) -> str:
        times = sorted(self.recoveries_ms)
        at = f", p50 {quantile(times, 0.5):.0f} ms, p99 {quantile(times, 0.99):.0f} ms" if times else ""  # fmt: skip
        lines = [
            f"runs:        {self.runs}{f', {self.invalid} of them invalid' if self.invalid else ''}",
            f"faults:      {sum(self.faults.values())}: {_listed(self.faults)}",
            f"operations:  {sum(self.operations.values())}: {_listed(self.operations)}",
            f"recoveries:  {len(times)}{at}; {self.unfinished} were overtaken",
            f"steps lost:  {self.steps_lost}",
            f"violations:  {sum(self.violations.values())}{': ' if self.violations else ''}{_listed(self.violations)}",
        ]
        if self.failed_seeds:
            lines.append(f"seeds:       {', '.join(map(str, self.failed_seeds))}")
        return "\n".join(lines)


def quantile(ordered: Sequence[float], part: float) -> float:
    """Of values in order, by nearest rank.

    Raises:
        ValueError: there are none.
    """
    if not ordered:
        raise ValueError("there is no value")
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def _listed(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered)
