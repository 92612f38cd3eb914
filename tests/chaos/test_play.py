"""The player: each fault at its time, everything taken back whatever happens, and what found nothing is told."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos import play
from chaos.cluster import Cluster
from chaos.faults.disk import who_may_forget
from chaos.faults.strike import Inflicted, Strike, Unfit
from chaos.play import Player
from chaos.records import FaultBegan, FaultEnded, Record
from chaos.schedule import Planned, Schedule


class StubCluster:
    """A clock and a history; nothing to break."""

    network = None

    def __init__(self) -> None:
        self.objects = self
        self.healed: list[int] = []
        self.nodes: dict[str, Any] = {}
        self.lost_directories: set[str] = set()
        self.records: list[Record] = []
        self.history = self
        self._began_s = time.monotonic()

    def clock(self) -> float:
        return time.monotonic() - self._began_s

    async def heal(self, fault: int) -> int:
        self.healed.append(fault)
        return 0

    def write(self, record: Record) -> None:
        self.records.append(record)


class Faults:
    """What the player inflicts: it counts what is open."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.struck = asyncio.Event()

    async def inflict(self, strike: Strike) -> Inflicted:
        self.open.add(strike.fault)
        self.struck.set()

        async def take_back() -> str:
            self.open.discard(strike.fault)
            return "whole again"

        return Inflicted(nodes=("a",), detail={"was": 1}, take_back=take_back)

    async def find_nothing(self, strike: Strike) -> Inflicted:
        raise Unfit("there is no worker now")

    async def never_heal(self, strike: Strike) -> Inflicted:
        async def take_back() -> None:
            raise OSError("it stays broken")

        return Inflicted(nodes=("a",), detail={}, take_back=take_back)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    stub = Faults()
    table = {"disk-full": stub.inflict, "worker-kill": stub.find_nothing, "store-down": stub.never_heal}  # fmt: skip
    monkeypatch.setattr(play, "INFLICT", table)
    return stub


def _player(*planned: tuple[str, float, float]) -> tuple[Player, StubCluster]:
    cluster = StubCluster()
    schedule = Schedule(
        seed=1,
        duration_s=0.2,
        nodes=3,
        planned=tuple(
            Planned(kind=kind, at_s=at_s, lasts_s=lasts_s, choices={"node": "any"})
            for kind, at_s, lasts_s in planned
        ),
    )
    return Player(cast(Cluster, cluster), schedule), cluster


async def test_faults_overlap_and_end(faults: Faults) -> None:
    player, cluster = _player(("disk-full", 0.01, 0.1), ("disk-full", 0.02, 0.01))

    await player.play()

    assert player.inflicted == ["disk-full", "disk-full"]
    assert faults.open == set()
    assert [(type(one).__name__, getattr(one, "fault", None)) for one in cluster.records] == [
        ("FaultBegan", 0),
        ("FaultBegan", 1),
        ("FaultEnded", 1),
        ("FaultEnded", 0),
    ]
    began, ended = cluster.records[0], cluster.records[-1]
    assert isinstance(began, FaultBegan)
    assert began.detail == {"node": "any", "was": 1}
    assert isinstance(ended, FaultEnded)
    assert ended.note == "whole again"
    assert ended.at_s - began.at_s >= 0.1


async def test_a_fault_that_finds_nothing_is_told_and_not_recorded(faults: Faults) -> None:
    player, cluster = _player(("worker-kill", 0.01, 0.0), ("disk-full", 0.02, 0.0))

    await player.play()

    assert [(one.planned.kind, one.why) for one in player.missed] == [
        ("worker-kill", "there is no worker now")
    ]
    assert player.inflicted == ["disk-full"]
    assert len(cluster.records) == 2
    assert cluster.healed == [0], "what it may have begun is taken back"


async def test_a_run_that_is_broken_off_takes_everything_back(faults: Faults) -> None:
    player, cluster = _player(("disk-full", 0.0, 1000.0))
    playing = asyncio.create_task(player.play())
    await faults.struck.wait()

    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing

    assert faults.open == set()
    assert isinstance(cluster.records[-1], FaultEnded)


async def test_a_fault_that_cannot_be_taken_back_ends_the_run(faults: Faults) -> None:
    player, _ = _player(("store-down", 0.0, 0.01))

    with pytest.raises(ExceptionGroup) as ended:
        await player.play()

    assert ended.group_contains(OSError, match="it stays broken")


async def test_files_of_a_minority_only_are_lost_whatever_is_drawn() -> None:
    cluster = StubCluster()
    cluster.nodes = {name: SimpleNamespace(name=name, running=True) for name in "abc"}

    async def strikes(kind: str, pick: float) -> str:
        planned = Planned(at_s=0.0, kind=kind, lasts_s=1.0, pick=pick, choices={"node": "any"})
        node = await who_may_forget(Strike(cast(Cluster, cluster), planned, 0))
        return node.name

    first = await strikes("directory-stale", 0.0)
    assert {await strikes("directory-lost", pick / 20) for pick in range(20)} == {first}
    cluster.nodes[first].running = False
    with pytest.raises(Unfit, match="lost files before"):
        await strikes("directory-lost", 0.0)
