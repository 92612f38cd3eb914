"""The same work on many files or ranges of a store, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MAX_AT_ONCE = 8
"""Enough for the latency of an object store, few enough for a disk."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def for_each(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """What ``work`` returns for each item, in their order; or the first failure, and the rest is left undone."""
    if len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(MAX_AT_ONCE, len(items)), "checkpoint-read") as threads:
        futures = [threads.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
