"""Several ranks in one process, a thread each: real Gloo over loopback without forking."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from distroml.runtime.worker.process_group import RankGroup

TIMEOUT_S = 60.0
Result = TypeVar("Result")


def run_ranks(world_size: int, work: Callable[[RankGroup], Result]) -> list[Result]:
    """``work`` of each rank, in threads, on an open group; results in rank order."""
    groups: list[RankGroup] = []

    def publisher(rank: int) -> Callable[[str, bytes], None]:
        def publish(key: str, value: bytes) -> None:
            for other in groups:
                if other.rank != rank:
                    other.store.feed({key: value})

        return publish

    groups += [RankGroup(1, r, world_size, "127.0.0.1", publisher(r)) for r in range(world_size)]
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def live(group: RankGroup) -> None:
        try:
            group.open()
            results[group.rank] = work(group)
            group.barrier()
        except BaseException as error:
            errors.append(error)

    # One process has all ranks here: what is found by comparing descriptors would be the sockets of all of them.
    threads = [threading.Thread(target=live, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive() or errors, f"a rank did not end within {TIMEOUT_S:g} s"
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]
