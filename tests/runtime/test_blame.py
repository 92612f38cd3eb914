"""Whom a failure is blamed on: a process by its name, since a change may give its rank another number."""

from __future__ import annotations

from typing import Any

from distroml import commands as c
from distroml.model import Culprit
from distroml.reports import WorkerPhase
from distroml.runtime.assignment import Process, duties
from distroml.spec import JobSpec, Resources
from tests.builders import form, members
from tests.runtime.scenes import Scene, names, only

ON_A, ON_B = 5, 7
"""The names of the two processes."""


def shrinking(*where: str) -> Scene:
    """Rank 0 on a is to go, the last one, on b, is to be rank 0 of the next generation; all train as before."""
    where = where or ("a", "b")
    last = len(where) - 1
    scene = Scene(*where, slots=1)
    spec = JobSpec(resources=Resources(workers=len(where), min_workers=1))
    scene.log.ok(c.SubmitJob(job_id="job-1", run_id="run-job-1", spec=spec), at=scene.wall_s)
    scene.log.ok(form("job-1", 1, members(*where)), at=scene.wall_s)
    scene.turn()
    scene.train()
    scene.log.ok(c.MarkRunning(job_id="job-1", generation=1, total_steps=100), at=scene.wall_s)
    scene.hears("a", scene.worker(0, worker=ON_A), draining=True)
    scene.hears("b", scene.worker(last, worker=ON_B))
    decisions = scene.step()
    assert names(decisions) == ["SetNodeStatus", "FormGeneration"]
    planned = only(decisions, c.FormGeneration).generation
    assert [m.node for m in planned.members] == ["b", *where[1:last]]
    scene.hears("a", scene.worker(0, worker=ON_A, generation=1, step=10), draining=True)
    scene.hears("b", scene.worker(last, worker=ON_B, generation=1, step=10))
    return scene


def told_its_new_rank(worker: int, **fields: Any) -> Process:
    values: dict[str, Any] = {"told": 2, "rank": 0, "joined": 1, "phase": WorkerPhase.TRAINING}
    return Process(worker=worker, **(values | fields))


def test_the_last_survivor_is_kept_although_its_new_rank_is_that_of_the_one_that_died() -> None:
    scene = shrinking()
    scene.dies(0)
    failed = only(scene.step(), c.FailGeneration)
    assert (failed.cause.rank, failed.culprits) == (0, (Culprit("a", ON_A),))
    there = {"run-job-1": [told_its_new_rank(ON_B)]}
    share = duties(scene.log.state, "b", 1, there)["run-job-1"]
    assert (share.aborted, share.retired) == ((ON_B,), ())
    formed = only(scene.step(after_s=1.0), c.FormGeneration).generation
    assert "from the 10 steps that its survivors have" in formed.reason
    share = duties(scene.log.state, "b", 1, there)["run-job-1"]
    assert (share.ranks, share.retired) == ({0: ON_B}, ())


def test_one_that_hangs_is_killed_whatever_its_next_rank_was_to_be() -> None:
    scene = shrinking()
    scene.change(1, stopped_s=60.0)
    failed = only(scene.step(), c.FailGeneration)
    assert (failed.cause.rank, failed.culprits) == (1, (Culprit("b", ON_B),))
    share = duties(scene.log.state, "b", 1, {"run-job-1": [told_its_new_rank(ON_B)]})["run-job-1"]
    assert (share.aborted, share.retired) == ((), (ON_B,))


def test_who_does_not_change_over_with_the_others_is_to_blame_by_its_name() -> None:
    scene = shrinking("a", "c", "b")
    scene.hears("c", scene.worker(1, worker=6, phase=WorkerPhase.CONNECTING))
    scene.turn()
    failed = only(scene.turn(after_s=scene.settings.start_deadline_s), c.FailGeneration)
    assert (failed.cause.rank, failed.cause.node) == (0, "b")
    assert failed.culprits == (Culprit("b", ON_B),)
