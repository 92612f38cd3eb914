"""Small makers of entries and states for tests of the pure parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from distroml import commands as c
from distroml.consensus import machine
from distroml.consensus.state import ClusterState
from distroml.model import Cause, Checkpoint, FailureKind, Generation, Member, NodeStatus
from distroml.spec import JobSpec, Resources


class Log:
    """A one-proposer log: ``log(command)`` applies the next entry and returns what came of it."""

    def __init__(self, proposer: str = "a", incarnation: int = 1) -> None:
        self.state = ClusterState()
        self.proposer = proposer
        self.incarnation = incarnation
        self.sequence = 0
        self.applied: list[machine.Applied] = []

    def __call__(self, command: c.AnyCommand, at: float | None = None) -> machine.Applied:
        self.sequence += 1
        entry = c.Entry(
            self.proposer,
            self.incarnation,
            self.sequence,
            self.sequence,
            float(self.sequence) if at is None else at,
            command,
        )
        return self.entry(entry)

    def entry(self, entry: c.Entry) -> machine.Applied:
        applied = machine.apply_entry(self.state, self.state.index + 1, entry)
        self.state = applied.state
        self.applied.append(applied)
        return applied

    def ok(self, command: c.AnyCommand, at: float | None = None) -> machine.Applied:
        applied = self(command, at)
        assert not applied.outcome.error, applied.outcome
        return applied

    def job(self, job_id: str = "job-1") -> Any:
        return self.state.jobs[job_id]


def node(
    name: str, *, incarnation: int = 1, slots: int = 4, workers_since: int = 0
) -> c.RegisterNode:
    return c.RegisterNode(
        name=name,
        incarnation=incarnation,
        http=f"http://127.0.0.1/{name}",
        slots=slots,
        workers_since=workers_since,
    )


def drain(name: str, *, undo: bool = False, incarnation: int = 1) -> c.SetNodeStatus:
    return c.SetNodeStatus(
        name=name,
        incarnation=incarnation,
        status=NodeStatus.ALIVE if undo else NodeStatus.DRAINING,
        reason="asked",
        drained=not undo,
    )


def submit(job_id: str = "job-1", *, workers: int = 2, **fields: Any) -> c.SubmitJob:
    spec = JobSpec(**({"resources": Resources(workers=workers)} | fields))
    return c.SubmitJob(job_id=job_id, run_id=f"run-{job_id}", spec=spec)


def members(*nodes: str, incarnation: int = 1) -> tuple[Member, ...]:
    local: dict[str, int] = {}
    made = []
    for rank, name in enumerate(nodes):
        made.append(Member(rank, local.get(name, 0), name, incarnation))
        local[name] = local.get(name, 0) + 1
    return tuple(made)


def form(job_id: str, number: int, where: Iterable[Member], **fields: Any) -> c.FormGeneration:
    """From the steps of the checkpoint that it names, unless ``resume_step`` says that survivors have more."""
    fields.setdefault("resume_step", fields.get("checkpoint_step") or 0)
    generation = Generation(
        number=number,
        members=tuple(where),
        reason=f"generation {number}",
        **({"formed_at": 0.0} | fields),
    )
    return c.FormGeneration(job_id=job_id, generation=generation)


def fail(job_id: str, generation: int, **fields: Any) -> c.FailGeneration:
    defaults: dict[str, Any] = {
        "cause": Cause(kind=FailureKind.EXIT, rank=0, node="a", signal="SIGKILL"),
        "collateral": (1,),
        "observed_at": 0.0,
        "highest_step": 10,
        "reason": f"generation {generation}: worker 0 on node a killed by SIGKILL",
        "backoff_s": 0.1,
    }
    return c.FailGeneration(job_id=job_id, generation=generation, **(defaults | fields))


def checkpoint(step: int, generation: int = 1, digest: str = "ab" * 32) -> Checkpoint:
    return Checkpoint(
        step=step,
        epoch=0,
        generation=generation,
        directory=f"job-1/run-job-1/checkpoints/ckpt_step_{step:08d}",
        manifest="manifest.json",
        manifest_sha256=digest,
        size_bytes=100,
        shards=2,
        committed_at=0.0,
    )


def commit(step: int, generation: int = 1, **fields: Any) -> c.CommitCheckpoint:
    made = replace(checkpoint(step, generation), **fields)
    return c.CommitCheckpoint(job_id="job-1", generation=generation, checkpoint=made)


def imports(job_id: str, *steps: int, digest: str = "ab" * 32) -> c.ImportCheckpoints:
    found = tuple(checkpoint(step, digest=digest) for step in steps)
    return c.ImportCheckpoints(
        job_id=job_id, run_id=f"run-{job_id}", spec=JobSpec(), checkpoints=found
    )


def running(log: Log, job_id: str = "job-1", **fields: Any) -> Log:
    """Two nodes, one job of two workers, RUNNING in generation 1."""
    log.ok(node("a"))
    log.ok(node("b"))
    log.ok(submit(job_id, **fields))
    log.ok(form(job_id, 1, members("a", "b")))
    log.ok(c.MarkRunning(job_id=job_id, generation=1, total_steps=100))
    return log
