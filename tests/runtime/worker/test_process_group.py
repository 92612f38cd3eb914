from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch

from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import CollectiveBroken, RendezvousStore
from tests.runtime.worker.rank_threads import TIMEOUT_S, run_ranks


def test_collectives_are_in_rank_order() -> None:
    def work(group: RankGroup) -> tuple[list[list[int]], list[int]]:
        mine = torch.tensor([group.rank, 10 * group.rank])
        gathered = group.all_gather(mine).tolist()
        group.broadcast(mine, 2)
        return gathered, mine.tolist()

    for gathered, broadcast in run_ranks(3, work):
        assert gathered == [[0, 0], [1, 10], [2, 20]]
        assert broadcast == [2, 20]


def test_a_single_rank_needs_nobody() -> None:
    group = RankGroup(1, 0, 1, "127.0.0.1", lambda key, value: pytest.fail("nothing to publish"))
    group.open()
    assert group.all_gather(torch.tensor([1, 2])).tolist() == [[1, 2]]
    group.barrier()


def test_keys_of_other_generations_are_not_seen() -> None:
    published: list[tuple[str, bytes]] = []
    store = RendezvousStore(4, lambda key, value: published.append((key, value)))
    store.set("0/0", b"mine")
    assert published == [("g4/0/0", b"mine")]
    store.feed({"g3/0/1": b"stale"})
    assert not store.check(["0/1"])
    with pytest.raises(CollectiveBroken, match=r"no address of other ranks within 0.01 s"):
        store.wait(["0/1"], timedelta(seconds=0.01))
    store.feed({"g4/0/1": b"theirs"})
    store.wait(["0/1"], timedelta(seconds=1))
    assert store.get("0/1") == b"theirs"


def test_abort_frees_whoever_waits() -> None:
    store = RendezvousStore(1, lambda key, value: None)
    failure: list[BaseException] = []

    def wait() -> None:
        try:
            store.wait(["0/1"])
        except CollectiveBroken as error:
            failure.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    store.abort()
    thread.join(TIMEOUT_S)
    assert len(failure) == 1


def test_an_abort_ends_the_rendezvous_at_once() -> None:
    group = RankGroup(1, 0, 2, "127.0.0.1", lambda key, value: group.abort("called away"))
    with pytest.raises(CollectiveBroken, match="called away"):
        group.open()
    with pytest.raises(CollectiveBroken, match="called away"):
        group.all_gather(torch.zeros(1))
    assert group.broken == "called away"


def test_an_aborted_world_of_one_is_over_too() -> None:
    group = RankGroup(1, 0, 1, "127.0.0.1", lambda key, value: None)
    group.open()
    group.abort("called away")
    with pytest.raises(CollectiveBroken, match="called away"):
        group.all_gather(torch.zeros(1))


def test_an_abort_frees_a_blocked_collective() -> None:
    """Rank 1 never comes to the collective that rank 0 waits in."""
    entered, left = threading.Event(), threading.Event()

    def work(group: RankGroup) -> str | None:
        if group.rank == 1:
            assert entered.wait(TIMEOUT_S)
            groups[0].abort("rank 1 hangs")
            assert left.wait(TIMEOUT_S), "the abort freed nobody"
            return None
        groups.append(group)
        pending = group.all_gather_async(torch.zeros(1_000_000))
        entered.set()
        try:
            pending.wait()
        except CollectiveBroken as error:
            return str(error)
        finally:
            left.set()
        return None

    groups: list[RankGroup] = []
    with pytest.raises(CollectiveBroken, match="rank 1 hangs"):
        run_ranks(2, work)
