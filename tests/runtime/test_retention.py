"""What is kept, what goes, and that no order of commits, retirements, crashes and deletions loses what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from distroml import commands as c
from distroml.model import Cause, Checkpoint, CheckpointStatus, FailureKind, JobStatus
from distroml.runtime.garbage import begun_with, directories_in, garbage, needed
from distroml.runtime.retention import describe_policy, kept, surplus
from distroml.spec import Checkpointing, InitFrom
from tests.builders import Log, checkpoint, commit, fail, form, imports, members, running, submit


def saved(*steps: int, **fields: Any) -> list[Checkpoint]:
    return [replace(checkpoint(step), **fields) for step in steps]


def measured(*values: float | None) -> list[Checkpoint]:
    return [replace(checkpoint(10 * n), metric=value) for n, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (Checkpointing(keep_last=2), {40, 50}),
        (Checkpointing(keep_last=9), {10, 20, 30, 40, 50}),
        (Checkpointing(keep_last=1, keep_every_n_steps=20), {20, 40, 50}),
        (Checkpointing(keep_last=1, keep_best=2), {20, 30, 50}),
        (Checkpointing(keep_last=1, keep_best=2, best_is="max"), {40, 10, 50}),
    ],
)
def test_the_policy(policy: Checkpointing, steps: set[int]) -> None:
    assert kept(measured(3.0, 1.0, 1.0, 4.0, None), policy) == steps


def test_a_corrupt_one_takes_nobodys_place_and_goes_with_those_around_it() -> None:
    found = saved(10, 20, 30, 40)
    found[2] = replace(found[2], status=CheckpointStatus.CORRUPT)
    assert kept(found, Checkpointing(keep_last=2)) == {20, 30, 40}
    assert kept([*found, checkpoint(50)], Checkpointing(keep_last=2)) == {40, 50}


def test_the_policy_in_words() -> None:
    policy = Checkpointing(keep_last=3, keep_every_n_steps=100, keep_best=2, best_metric="acc")
    for part in ("last 3", "every 100 steps", "2 with the minimum acc"):
        assert part in describe_policy(policy)


def test_another_jobs_beginning_is_no_surplus() -> None:
    log = running(Log())
    for step in (10, 20, 30, 40, 50, 60):
        log.ok(commit(step))
    log.ok(submit("job-2", init_from=InitFrom(job="job-1", step=10)))
    assert surplus(log.state, log.job()) == ()
    log.ok(c.CancelJob(job_id="job-2", reason="r"))
    assert [one.step for one in surplus(log.state, log.job())] == [10]


def corrupted(log: Log, step: int) -> c.MarkCheckpointCorrupt:
    one = next(one for one in log.job().checkpoints if one.step == step)
    return c.MarkCheckpointCorrupt(
        job_id="job-1", step=step, manifest_sha256=one.manifest_sha256, reason="bad"
    )


class TestGarbage:
    def listed(self, log: Log, *steps: int) -> dict[str, int]:
        job = log.job()
        paths = [f"{checkpoint(step).directory}/worker_0.safetensors" for step in steps]
        return directories_in([*paths, "job-1/run-job-1/checkpoints/LATEST", "other/x"], job)

    def gone(self, log: Log, found: dict[str, int], now_s: float = 0.0) -> dict[int, str]:
        held = needed(log.job(), begun_with(log.state))
        seen = dict.fromkeys(found, 0.0)
        told = garbage(log.job(), found, held, seen, now_s, grace_s=60.0)
        return {found[one.directory]: one.reason for one in told}

    def test_below_the_newest_what_is_not_listed_goes_and_above_it_nothing(self) -> None:
        log = running(Log())
        log.ok(commit(20))
        log.ok(commit(30, refers_to=(checkpoint(20).directory,)))
        assert list(self.gone(log, self.listed(log, 10, 20, 25, 30, 40), 1e9)) == [10, 25]

    def test_what_a_run_left_open_goes_after_a_grace(self) -> None:
        log = running(Log())
        log.ok(commit(20))
        found = self.listed(log, 20, 40)
        log.ok(c.CancelJob(job_id="job-1", reason="r"))
        assert self.gone(log, found, 59.0) == {}
        assert list(self.gone(log, found, 60.0)) == [40]

    def test_of_an_imported_job_only_what_was_removed_by_request(self) -> None:
        log = Log()
        log.ok(imports("job-1", 20, 30))
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=30))
        assert self.gone(log, self.listed(log, 10, 20, 30, 40), 1e9) == {30: "removed by request"}

    def test_a_removed_step_that_the_run_comes_to_again_is_open(self) -> None:
        log = running(Log())
        log.ok(commit(20))
        log.ok(commit(30))
        log.ok(corrupted(log, 30))
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=30))
        found = self.listed(log, 20, 30)
        assert self.gone(log, found, 1e9) == {}, "its files may be those that are being written now"
        log.ok(commit(40))
        assert self.gone(log, found) == {30: "removed by request"}
        log.ok(c.CancelJob(job_id="job-1", reason="r"))
        assert self.gone(log, found) == {30: "removed by request"}

    def test_a_removed_step_of_a_run_that_has_ended_goes_at_once(self) -> None:
        log = running(Log())
        log.ok(commit(20))
        log.ok(c.CancelJob(job_id="job-1", reason="r"))
        log.ok(c.RemoveCheckpoint(job_id="job-1", step=20))
        assert self.gone(log, self.listed(log, 20)) == {20: "removed by request"}

    def test_what_another_job_begins_with_stays(self) -> None:
        log = running(Log())
        log.ok(commit(20))
        log.ok(c.CancelJob(job_id="job-1", reason="r"))
        log.ok(submit("job-2", init_from=InitFrom(job="job-1")))
        forgotten = replace(log.job(), checkpoints=())
        held = needed(forgotten, begun_with(log.state))
        found = self.listed(log, 20)
        assert garbage(forgotten, found, held, dict.fromkeys(found, 0.0), 1e9, grace_s=0) == ()


def step_of(directory: str) -> int:
    return int(directory.rpartition("_")[2])


class World:
    """One run, the directories that its store has, and a collector whose steps the test takes one by one."""

    def __init__(self, policy: Checkpointing) -> None:
        self.log = Log()
        running(self.log)
        job = replace(self.log.job(), spec=replace(self.log.job().spec, checkpointing=policy))
        self.log.state = replace(self.log.state, jobs={"job-1": job})
        self.at = 0
        self.disk: dict[str, set[int]] = {}
        """The generations that have files in each directory; later ones give theirs other names."""
        self.ever: list[str] = []
        self.pending: list[c.CommitCheckpoint] = []
        self.collector: Iterator[None] | None = None

    @property
    def number(self) -> int:
        return int(self.log.job().generation_number)

    def write(self) -> None:
        self.at += 1
        self.disk.setdefault(checkpoint(self.at).directory, set()).add(self.number)

    def manifest(self, refers: int) -> None:
        """All files of the newest step are there. It may refer to any that was ever committed, as stale ranks would."""
        directory = checkpoint(self.at).directory
        if self.number not in self.disk.get(directory, ()):
            return
        chosen = tuple(self.ever[-refers:]) if refers else ()
        refers_to = tuple(one for one in chosen if one != directory)
        made = replace(checkpoint(self.at, self.number), refers_to=refers_to)
        command = c.CommitCheckpoint(job_id="job-1", generation=self.number, checkpoint=made)
        self.pending.append(command)

    def commit(self, at: int = 0) -> None:
        """What was whole then enters the log, however late."""
        if self.pending:
            command = self.pending.pop(at)
            if not self.log(command).outcome.error:
                self.ever.append(command.checkpoint.directory)

    def late(self, refers: int) -> None:
        """A checkpoint whose commit takes its time."""
        self.write()
        self.manifest(refers)

    def save(self, refers: int) -> None:
        self.write()
        self.manifest(refers)
        self.commit(-1)

    def retire(self, stale: int) -> None:
        """What a leader decided, maybe one that was deposed meanwhile: any steps may be named."""
        steps = tuple(one.step for one in surplus(self.log.state, self.log.job()))
        named = steps or tuple(range(1, stale + 1))
        self.log.ok(c.RetireCheckpoints(job_id="job-1", steps=named, reason="r"))

    def fail(self) -> None:
        """All ranks die; the run goes on from the newest checkpoint and comes by the same steps again."""
        newest = self.log.job().newest_checkpoint()
        self.at = newest.step if newest else 0
        self.log.ok(fail("job-1", self.number, cause=Cause(kind=FailureKind.EXIT)))
        step = newest.step if newest else None
        where = members("a", "b")
        self.log.ok(form("job-1", self.number + 1, where, checkpoint_step=step))
        self.log.ok(c.MarkRunning(job_id="job-1", generation=self.number, total_steps=99))

    def corrupt(self) -> None:
        """The newest turns out to be unusable where there is another one, and those that began with it end."""
        if self.mark():
            self.fail()

    def mark(self) -> bool:
        """That of ``corrupt`` which is in the log before the generation ends."""
        whole = [o for o in self.log.job().checkpoints if o.status is CheckpointStatus.COMMITTED]
        users = {name for one in whole for name in one.refers_to}
        if len(whole) < 2 or whole[-1].directory in users:
            return False
        self.log.ok(corrupted(self.log, whole[-1].step))
        return True

    def remove(self, at: int) -> None:
        """A person asks for one of them to go, from the newest on: a corrupt one too."""
        listed = self.log.job().checkpoints
        if listed:
            step = listed[-1 - at % len(listed)].step
            self.log(c.RemoveCheckpoint(job_id="job-1", step=step))

    def collect(self, steps: int = 1) -> None:
        """The next steps of the collector: list, decide, each deletion."""
        for _ in range(steps):
            self.collector = self.collector or self._collecting()
            if next(self.collector, "over") == "over":
                self.collector = None

    def crash(self) -> None:
        self.collector = None

    def _collecting(self) -> Iterator[None]:
        found = {name: step_of(name) for name in self.disk}
        yield
        for one in self._garbage(found):
            yield
            if self._garbage({one: found[one]}):
                seen = set(self.disk[one])
                yield  # the deletion has begun, and takes its time
                self.disk[one] -= seen
                if not self.disk[one]:
                    del self.disk[one]

    def _garbage(self, found: dict[str, int]) -> list[str]:
        job = self.log.job()
        held = needed(job, begun_with(self.log.state))
        told = garbage(job, found, held, dict.fromkeys(found, 0.0), 1e9, grace_s=1.0)
        return [one.directory for one in told]

    def check(self) -> None:
        job = self.log.job()
        for one in job.checkpoints:
            for name in (one.directory, *one.refers_to):
                assert name in self.disk, f"step {one.step} needs {name}"
            assert one.generation in self.disk[one.directory]
        whole = [one for one in job.checkpoints if one.status is CheckpointStatus.COMMITTED]
        assert whole or not self.ever
        policy = kept(job.checkpoints, job.spec.checkpointing)
        assert {one.step for one in surplus(self.log.state, job)}.isdisjoint(policy)


_OPERATIONS = st.one_of(
    st.tuples(st.just("write")),
    st.tuples(st.just("late"), st.integers(0, 3)),
    st.tuples(st.just("commit")),
    *[st.tuples(st.just("save"), st.integers(0, 3))] * 4,
    st.tuples(st.just("retire"), st.integers(0, 9)),
    st.tuples(st.just("collect"), st.integers(1, 8)),
    st.tuples(st.just("collect"), st.integers(1, 8)),
    st.tuples(st.just("crash")),
    st.tuples(st.just("fail")),
    st.tuples(st.just("corrupt")),
    st.tuples(st.just("mark")),
    st.tuples(st.just("remove"), st.integers(0, 3)),
)


@settings(max_examples=400, deadline=None)
@given(
    st.builds(
        Checkpointing,
        keep_last=st.integers(1, 3),
        keep_every_n_steps=st.none() | st.integers(2, 5),
    ),
    st.lists(_OPERATIONS, min_size=30, max_size=100),
)
def test_no_history_loses_what_is_needed(
    policy: Checkpointing, operations: list[tuple[Any, ...]]
) -> None:
    world = World(policy)
    for name, *arguments in operations:
        getattr(world, name)(*arguments)
        world.check()
    for _ in range(2):  # undisturbed, the collector leaves no litter below the newest
        world.crash()
        world.collect()
        while world.collector is not None:
            world.collect()
    newest = world.log.job().newest_checkpoint()
    held = needed(world.log.job(), frozenset())
    litter = [n for n in world.disk if newest and step_of(n) < newest.step and n not in held]
    assert litter == []
    world.log.ok(
        c.FinishRun(
            job_id="job-1", generation=world.number, status=JobStatus.COMPLETED, reason="done"
        )
    )
    world.check()
