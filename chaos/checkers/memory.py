"""Promise: an agent's memory, and the number of its open files, are bounded.

Judged by samples of each process. None may ever exceed the limits. Where one lived long enough after its warm-up, the median
of the last quarter is compared with that of the second: what it grew, per hour, is bounded too. Medians, since single
samples swing with what happens to be under way.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from chaos.checkers.facts import History, Limits, of, violation
from chaos.records import MemorySeen, Violation

NAME = "memory"
LEAST_SAMPLES = 40
LEAST_SPAN_S = 300.0
"""A shorter life says nothing of growth per hour."""


def check(history: History, limits: Limits) -> list[Violation]:
    """All agents that used too much, or ever more."""
    lives: dict[tuple[str, int], list[MemorySeen]] = defaultdict(list)
    for one in of(history, MemorySeen):
        lives[one.node, one.pid].append(one)
    found = []
    for samples in lives.values():
        found += _most(samples, limits)
        found += _growth(samples, limits)
    return found


def _most(samples: list[MemorySeen], limits: Limits) -> list[Violation]:
    found = []
    largest = max(samples, key=lambda one: one.rss_bytes)
    if largest.rss_bytes > limits.rss_bytes:
        what = f"the agent of node {largest.node} used {_mib(largest.rss_bytes)}; the limit is {_mib(limits.rss_bytes)}"
        found.append(violation(NAME, what, [largest]))
    most = max(samples, key=lambda one: one.files)
    if most.files > limits.files:
        what = f"the agent of node {most.node} had {most.files} files open; the limit is {limits.files}"
        found.append(violation(NAME, what, [most]))
    return found


def _growth(samples: list[MemorySeen], limits: Limits) -> list[Violation]:
    warm = [one for one in samples if one.at_s - samples[0].at_s >= limits.warm_up_s]
    if len(warm) < LEAST_SAMPLES or warm[-1].at_s - warm[0].at_s < LEAST_SPAN_S:
        return []
    quarter = len(warm) // 4
    early, late = warm[quarter : 2 * quarter], warm[-quarter:]
    span_h = (late[quarter // 2].at_s - early[quarter // 2].at_s) / 3600
    grew_bytes = median(one.rss_bytes for one in late) - median(one.rss_bytes for one in early)
    found = []
    if grew_bytes > limits.rss_growth_bytes_per_hour * max(span_h, 0.25):
        what = (
            f"the agent of node {late[0].node} (pid {late[0].pid}) grew by {_mib(grew_bytes)} within {60 * span_h:.0f} "
            "minutes, warm-up apart"
        )
        found.append(violation(NAME, what, [early[0], late[-1]]))
    more = median(one.files for one in late) - median(one.files for one in early)
    if more > limits.files_growth:
        what = f"the agent of node {late[0].node} (pid {late[0].pid}) has {more:g} more files open than before"
        found.append(violation(NAME, what, [early[0], late[-1]]))
    return found


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 1024**2:.0f} MiB"
