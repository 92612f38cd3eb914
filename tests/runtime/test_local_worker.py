"""What a worker says goes into its fact, bounded and under the generation that it is about."""

from __future__ import annotations

from pathlib import Path

from distroml.reports import Former, WorkerFact, WorkerPhase
from distroml.runtime import control
from distroml.runtime.control import Join
from distroml.runtime.local_worker import LocalWorker
from tests.runtime.scenes import shard


class Line:
    """A control connection that is only written to."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)


def join(generation: int, rank: int = 0, *, at_boundary: bool = False) -> Join:
    return Join(
        generation=generation,
        rank=rank,
        local_rank=0,
        world_size=2,
        checkpoint=None,
        at_boundary=at_boundary,
    )


def training(tmp_path: Path) -> LocalWorker:
    fact = WorkerFact(job_id="j", run_id="r", generation=1, rank=1, phase=WorkerPhase.TRAINING)
    local = LocalWorker(fact, tmp_path / "log", 0.0, join(1, 1))
    local.link = Line()  # type: ignore[assignment]
    return local


def progress(generation: int) -> control.Progress:
    return control.Progress(generation=generation, phase=WorkerPhase.CONNECTING, step=13, epoch=0)


def parks(local: LocalWorker) -> None:
    """It leaves its first generation in order, as the others do."""
    local.take(control.Parked(generation=1, step=13, at=50.0, reason="moves on"))


def test_what_a_rank_saved_before_a_planned_change_stays_known(tmp_path: Path) -> None:
    local = training(tmp_path)
    local.take(control.ShardDurable(generation=1, shard=shard(1, 6)))
    local.tell(join(2, 0, at_boundary=True), leaving=1)
    parks(local)
    local.tell(join(2, 0), leaving=1)
    local.take(progress(2))
    assert local.fact.shards == ()
    assert local.take(control.ShardDurable(generation=1, shard=shard(1, 12)))
    assert local.take(control.ShardAbandoned(generation=1, step=18, reason="no space"))
    assert local.fact.former == Former(
        generation=1, rank=1, shards=(shard(1, 6), shard(1, 12)), abandoned=((18, "no space"),)
    )
    local.forget_shards({6})
    assert local.fact.former is not None
    assert local.fact.former.shards == (shard(1, 12),)
    assert local.stale_frames == 0


def test_what_a_rank_saved_before_it_was_told_of_a_planned_change_stays_known(
    tmp_path: Path,
) -> None:
    local = training(tmp_path)
    local.take(control.ShardDurable(generation=1, shard=shard(1, 6)))
    parks(local)
    local.tell(join(2, 0), leaving=1)
    assert local.fact.former == Former(generation=1, rank=1, shards=(shard(1, 6),))


def test_what_a_rank_saved_stays_known_when_the_change_is_undone_after_it_has_left(
    tmp_path: Path,
) -> None:
    local = training(tmp_path)
    local.take(control.ShardDurable(generation=1, shard=shard(1, 6)))
    local.tell(join(2, 0, at_boundary=True), leaving=1)
    local.take(progress(2))
    local.tell(join(3, 1), leaving=1)
    assert (local.fact.generation, local.fact.rank) == (3, 1)
    assert local.fact.former == Former(generation=1, rank=1, shards=(shard(1, 6),))


def test_what_it_saved_in_a_generation_that_failed_is_stale(tmp_path: Path) -> None:
    local = training(tmp_path)
    local.tell(join(2))
    assert not local.take(control.ShardDurable(generation=1, shard=shard(1, 12)))
    assert (local.fact.former, local.stale_frames) == (None, 1)


def test_a_shard_whose_copies_are_made_later_counts_where_it_belongs(tmp_path: Path) -> None:
    local = training(tmp_path)
    for step in (6, 12, 18):
        local.begin_copying(step)
    assert local.fact.copying == (6, 12, 18)
    local.end_copying(6, control.ShardDurable(generation=1, shard=shard(1, 6)))
    assert (local.fact.shards, local.fact.copying) == ((shard(1, 6),), (12, 18))
    local.tell(join(2, 0, at_boundary=True), leaving=1)
    local.take(progress(2))
    local.end_copying(12, control.ShardDurable(generation=1, shard=shard(1, 12)))
    local.end_copying(18, control.ShardAbandoned(generation=1, step=18, reason="slow"))
    assert local.fact.former == Former(
        generation=1, rank=1, shards=(shard(1, 6), shard(1, 12)), abandoned=((18, "slow"),)
    )
    assert (local.fact.shards, local.fact.copying, local.stale_frames) == ((), (), 0)


def test_a_shard_is_stale_when_its_generation_failed_while_copies_were_made(
    tmp_path: Path,
) -> None:
    local = training(tmp_path)
    local.begin_copying(6)
    local.tell(join(2))
    local.end_copying(6, control.ShardDurable(generation=1, shard=shard(1, 6)))
    assert (local.fact.shards, local.fact.copying, local.stale_frames) == ((), (), 1)


def test_whether_it_holds_a_state_is_known_from_when_it_parked(tmp_path: Path) -> None:
    local = training(tmp_path)
    local.update(phase=WorkerPhase.CONNECTING)
    local.take(
        control.Parked(generation=1, step=13, at=50.0, reason="peers are gone", has_state=False)
    )
    assert not local.fact.has_state
    local.tell(join(2, 0))
    local.take(control.Parked(generation=2, step=14, at=51.0, reason="peers are gone"))
    assert local.fact.has_state
    local.tell(join(3, 0))
    assert local.fact.has_state, "it takes it along"


def test_it_is_asked_to_vacate_a_generation_once(tmp_path: Path) -> None:
    local = training(tmp_path)
    for _ in range(2):
        local.send_vacate(1)
    assert local.link is not None
    assert local.link.sent == [control.Vacate(generation=1)]  # type: ignore[attr-defined]
