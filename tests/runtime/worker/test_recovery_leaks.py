"""A process that recovers again and again keeps its threads, descriptors and memory."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import CollectiveBroken

RECOVERIES = int(os.environ.get("RECOVERIES", "60"))
"""`RECOVERIES=1000` is the long run."""
WARM_UP = max(20, RECOVERIES // 4)
"""malloc gives each of many short threads an arena, and takes some hundred groups to have all that it will."""
LEFT_WITHIN_S = 30.0
MAX_GROWTH_BYTES = 16 * 1024 * 1024


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory_bytes() -> int:
    """Resident, without what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _one_generation(number: int) -> None:
    """Two ranks meet, one hangs, the other is called away from a collective that will never end."""
    groups: list[RankGroup] = []

    def publisher(rank: int) -> object:
        return lambda key, value: groups[1 - rank].store.feed({key: value})

    groups += [RankGroup(number, rank, 2, "127.0.0.1", publisher(rank)) for rank in range(2)]  # type: ignore[arg-type]
    waiting = threading.Event()
    broken: list[str] = []

    def stuck() -> None:
        groups[0].open()
        groups[0].all_gather(torch.ones(4))
        pending = groups[0].all_gather_async(torch.ones(100_000))
        waiting.set()
        with pytest.raises(CollectiveBroken) as caught:
            pending.wait()
        broken.append(str(caught.value))

    thread = threading.Thread(target=stuck, daemon=True)
    thread.start()
    groups[1].open()
    groups[1].all_gather(torch.ones(4))
    assert waiting.wait(LEFT_WITHIN_S)
    groups[0].abort("called away")
    thread.join(LEFT_WITHIN_S)
    assert broken == ["called away"]
    for group in groups:
        group.close()


def _settled(measure: object, most: int) -> int:
    """What was given up is closed in a thread, a moment later."""
    deadline = time.monotonic() + LEFT_WITHIN_S
    while (value := measure()) > most and time.monotonic() < deadline:  # type: ignore[operator]
        threading.Event().wait(0.02)
    return int(value)


@pytest.mark.timeout(900)
def test_recoveries_leave_nothing_behind() -> None:
    for number in range(WARM_UP):
        _one_generation(number + 1)
    threads, descriptors = _threads(), _descriptors()
    memory_bytes = _memory_bytes()
    for number in range(RECOVERIES):
        _one_generation(WARM_UP + number + 1)
    assert _settled(_threads, threads) <= threads
    assert _settled(_descriptors, descriptors) <= descriptors
    assert _memory_bytes() - memory_bytes < MAX_GROWTH_BYTES
