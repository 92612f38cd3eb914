"""A rank asks for a checkpoint's files and waits, whatever becomes of its agent or its generation."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from distroml.errors import CheckpointAway, CorruptCheckpoint, StoreError
from distroml.model import FailureKind
from distroml.runtime.control import CheckpointHere, NeedCheckpoint
from distroml.runtime.worker.rendezvous import CollectiveBroken
from distroml.runtime.worker.supply import Supply
from tests.builders import checkpoint

WAIT_S = 20.0


class Agent:
    """Takes questions; the test answers."""

    def __init__(self) -> None:
        self.asked: list[NeedCheckpoint] = []
        self.got = threading.Semaphore(0)
        self.supply = Supply(self._take)

    def _take(self, need: NeedCheckpoint) -> None:
        self.asked.append(need)
        self.got.release()

    def wait(self) -> NeedCheckpoint:
        assert self.got.acquire(timeout=WAIT_S)
        return self.asked[-1]


def asking(ask: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def work() -> None:
        try:
            ask()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, errors


@pytest.mark.parametrize(
    ("problem", "kind", "raised"),
    [
        ("", FailureKind.ERROR, None),
        ("disk full", FailureKind.ERROR, StoreError),
        ("all broken", FailureKind.CORRUPT_CHECKPOINT, CorruptCheckpoint),
        ("b is away", FailureKind.CHECKPOINT_AWAY, CheckpointAway),
    ],
)
def test_the_answer_ends_the_wait(
    problem: str, kind: FailureKind, raised: type[Exception] | None
) -> None:
    agent = Agent()
    thread, errors = asking(lambda: agent.supply.need(checkpoint(10), mend=True))
    need = agent.wait()
    assert (need.checkpoint.step, need.mend, need.manifest_only) == (10, True, False)
    assert agent.supply.standing() == [need], "an agent that comes back hears it again"
    agent.supply.take(CheckpointHere(number=need.number + 1))
    agent.supply.take(CheckpointHere(number=need.number, problem=problem, kind=kind))
    thread.join(WAIT_S)
    assert [type(error) for error in errors] == ([raised] if raised else [])
    assert agent.supply.standing() == []


def test_the_end_of_the_generation_ends_the_wait() -> None:
    agent, over = Agent(), threading.Event()

    def check() -> None:
        if over.is_set():
            raise CollectiveBroken("the agent ended generation 1")

    thread, errors = asking(lambda: agent.supply.need(checkpoint(10), check=check))
    need = agent.wait()
    over.set()
    thread.join(WAIT_S)
    assert [type(error) for error in errors] == [CollectiveBroken]
    agent.supply.take(CheckpointHere(number=need.number))
    assert agent.supply.standing() == []
