"""Where a rank's time goes, step by step: samples, computing, communication, waiting for slower ranks."""

from __future__ import annotations

from collections import deque

from distroml.reports import StepTiming

_SHARE = 0.1
"""Weight of the newest step in the moving means."""
SLOWEST_OF = 64
"""Steps that ``StepTiming.slowest_s`` looks back on."""


class StepClock:
    """Moving means of the parts of a step."""

    def __init__(self) -> None:
        self._means: list[float] | None = None
        self._recent: deque[float] = deque(maxlen=SLOWEST_OF)

    def add(self, step_s: float, data_s: float, waited_s: float, least_waited_s: float) -> None:
        """A step took ``step_s``; of that ``data_s`` went to samples and ``waited_s`` to exchanges.

        What the rank that waited least had to wait (one step earlier: it travels with the note) is the price of the
        exchange itself; the rest is idleness, because others were late.
        """
        communication_s = min(waited_s, least_waited_s)
        parts = [
            step_s,
            data_s,
            max(0.0, step_s - data_s - waited_s),
            communication_s,
            waited_s - communication_s,
        ]
        self._recent.append(step_s)
        if self._means is None:
            self._means = parts
        else:
            self._means = [
                mean + _SHARE * (part - mean) for mean, part in zip(self._means, parts, strict=True)
            ]

    def saw_pause(self, seconds: float) -> None:
        """What lay between two steps (evaluation, the copy of a checkpoint): nobody may take it for a hang."""
        if self._recent:
            self._recent[-1] += seconds

    def timing(self) -> StepTiming | None:
        """The present means; None before the first step."""
        if self._means is None:
            return None
        step_s, data_s, compute_s, communication_s, idle_s = (round(m, 6) for m in self._means)
        return StepTiming(
            step_s=step_s,
            data_s=data_s,
            compute_s=compute_s,
            communication_s=communication_s,
            idle_s=idle_s,
            slowest_s=round(max(self._recent), 6),
        )
