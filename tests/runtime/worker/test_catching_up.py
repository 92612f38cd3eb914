"""What a generation saves of the step that it starts from: all of its ranks, or none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distroml.runtime.worker.dist import MOVE, STOP, VACATE
from distroml.runtime.worker.train import Training


class Saver:
    """Notes what it is told."""

    busy = False

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def save(self, blob: object, step: int, *_: object) -> None:
        self.told.append(("save", step))

    def leave_out(self, step: int) -> None:
        self.told.append(("leave out", step))


def caught_up(saver: Saver, **facts: Any) -> list[tuple[str, int]]:
    """A generation that goes on from step 10, at which a checkpoint is due."""
    run = SimpleNamespace(state=SimpleNamespace(step=10), evaluated=10, blob=lambda adapter: None)
    source = SimpleNamespace(cursor=lambda step: SimpleNamespace(batch=5))
    checkpointing = SimpleNamespace(every_n_steps=5)
    adapter = SimpleNamespace(spec=SimpleNamespace(checkpointing=checkpointing))
    training = Training(
        adapter=cast(Any, adapter),
        run=cast(Any, run),
        source=cast(Any, source),
        dist=cast(Any, None),
        link=cast(Any, None),
        checkpointer=cast(Any, saver),
        total_steps=100,
        flags=lambda: 0,
        **facts,
    )
    training._catch_up()
    return saver.told


def test_a_step_that_may_have_been_cut_short_before_its_checkpoint_is_saved() -> None:
    assert caught_up(Saver()) == [("save", 10)]


@pytest.mark.parametrize("mine", [True, False])
def test_no_rank_saves_while_one_still_writes_and_that_one_says_so(mine: bool) -> None:
    expected = [("leave out", 10)] if mine else []
    assert caught_up(Saver(), busy=mine, any_busy=True) == expected


@pytest.mark.parametrize("wishes", [STOP, MOVE, VACATE])
def test_ranks_that_are_about_to_leave_save_then(wishes: int) -> None:
    """Given up here because of a shard that is being written, it would be given up there as well."""
    assert caught_up(Saver(), wishes=wishes, busy=True, any_busy=True) == []
