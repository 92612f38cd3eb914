"""A hand-made observation for table tests of the reconciler: say what is seen, take a turn, look at the decisions."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from distroml import commands as c
from distroml.model import FailureKind, Job
from distroml.reports import (
    DataCursor,
    NodeReport,
    ShardFact,
    WorkerFact,
    WorkerFailure,
    WorkerOutcome,
    WorkerPhase,
)
from distroml.runtime.facts import (
    CheckpointKey,
    Facts,
    NodeFacts,
    Now,
    ReconcilerSettings,
    look,
)
from distroml.runtime.failure_detector import Health
from distroml.runtime.reconciler import Decision, WriteManifest, reconcile, waiting_reasons
from tests.builders import Log, checkpoint, fail, form, members, node, submit

DIGEST = "d" * 64


class Scene:
    """Nodes with their workers as the leader sees them, around one log."""

    def __init__(self, *nodes: str, slots: int = 2) -> None:
        self.log = Log()
        self.wall_s = 5000.0
        self.monotonic_s = 100.0
        self.settings = ReconcilerSettings()
        self.facts: Facts | None = None
        self.health: dict[str, tuple[Health, str]] = {}
        self.cut_off: set[str] = set()
        self.reports: dict[str, NodeReport] = {}
        self.writing: set[CheckpointKey] = set()
        self.write_failures: dict[CheckpointKey, str] = {}
        for name in nodes:
            self.log.ok(node(name, slots=slots), at=self.wall_s)
            self.hears(name)

    # --- the past ---

    def job(self, job_id: str = "job-1") -> Job:
        return self.log.state.jobs[job_id]

    def submitted(self, job_id: str = "job-1", *, workers: int = 4, **fields: Any) -> Scene:
        self.log.ok(submit(job_id, workers=workers, **fields), at=self.wall_s)
        return self

    def starting(self, *where: str, **fields: Any) -> Scene:
        """One job in generation 1 on ``where`` (one node per rank), its workers training."""
        self.submitted(workers=len(where), **fields)
        self.log.ok(form("job-1", 1, members(*where)), at=self.wall_s)
        self.turn()
        self.train()
        return self

    def running(self, *where: str, **fields: Any) -> Scene:
        self.starting(*where, **fields)
        self.log.ok(c.MarkRunning(job_id="job-1", generation=1, total_steps=100), at=self.wall_s)
        self.turn()
        return self

    # --- what is seen ---

    def hears(self, name: str, *workers: WorkerFact, **fields: Any) -> None:
        """A node reports exactly these workers."""
        self.health[name] = (Health.ALIVE, "heard")
        values: dict[str, Any] = {
            "incarnation": 1,
            "sequence": 1,
            "at": self.wall_s,
            "slots": 2,
            "applied_index": self.log.state.index,
        }
        self.reports[name] = NodeReport(node=name, workers=workers, **(values | fields))

    def train(self, step: int = 10, **changes: Any) -> None:
        """Every rank of the newest generation trains, but for ``changes`` to all of them."""
        generation = self.job().generation
        assert generation is not None
        for name in self.reports:
            mine = [m for m in generation.members if m.node == name]
            self.hears(name, *(self.worker(m.rank, step=step, **changes) for m in mine))

    def worker(self, rank: int, **fields: Any) -> WorkerFact:
        job = self.job()
        values: dict[str, Any] = {
            "job_id": job.job_id,
            "run_id": job.run_id,
            "generation": job.generation_number,
            "rank": rank,
            "worker": 1 + rank,
            "phase": WorkerPhase.TRAINING,
            "pid": 100 + rank,
            "total_steps": 100,
            "started_at": self.wall_s,
        }
        return WorkerFact(**(values | fields))

    def change(self, rank: int, **changes: Any) -> None:
        """What is seen of one rank."""
        for name, report in self.reports.items():
            workers = tuple(replace(w, **changes) if w.rank == rank else w for w in report.workers)
            if workers != report.workers:
                self.reports[name] = replace(report, workers=workers)

    def dies(self, rank: int, exit_code: int = -9, after_s: float = 0.0, **changes: Any) -> None:
        at = self.wall_s + after_s
        values: dict[str, Any] = {
            "phase": WorkerPhase.EXITED,
            "exit_code": exit_code,
            "ended_at": at,
        }
        self.change(rank, **(values | changes))

    def fails(
        self,
        rank: int,
        error: str,
        *,
        after_s: float = 0.0,
        collateral: bool = False,
        **fields: Any,
    ) -> None:
        values: dict[str, Any] = {
            "kind": FailureKind.ERROR,
            "traceback": f"Traceback …\n{error}",
        } | fields
        failure = WorkerFailure(
            error=error, at=self.wall_s + after_s, collateral=collateral, **values
        )
        self.change(rank, phase=WorkerPhase.FAILED, failure=failure)

    def finish(self, rank: int, **fields: Any) -> None:
        values: dict[str, Any] = {
            "step": 100,
            "epoch": 1,
            "state_digest": DIGEST,
            "sample_digest": DIGEST,
            "metrics": {"loss": 0.25 + rank},
            "stopped": False,
            "checkpoint_step": None,
        }
        outcome = WorkerOutcome(**(values | fields))
        self.change(rank, phase=WorkerPhase.FINISHED, outcome=outcome, step=outcome.step)

    def saves(self, rank: int, *steps: int) -> None:
        """A rank has durable shards of these steps."""
        self.change(rank, shards=tuple(shard(rank, step) for step in steps))

    def lose(self, name: str, reason: str = "connection closed and silent for 0.6 s") -> None:
        self.health[name] = (Health.LOST, reason)

    # --- turns ---

    def turn(self, after_s: float = 0.1) -> list[Decision]:
        self.wall_s += after_s
        self.monotonic_s += after_s
        now = Now(self.wall_s, self.monotonic_s)
        nodes = {
            name: NodeFacts(
                health=health,
                reason=reason,
                incarnation=report.incarnation
                if report
                else self.log.state.nodes[name].incarnation,
                report=report,
                connected=name not in self.cut_off,
            )
            for name, (health, reason) in self.health.items()
            for report in (self.reports.get(name),)
        }
        self.facts = look(
            self.facts,
            self.log.state,
            nodes,
            now,
            writing=frozenset(self.writing),
            write_failures=self.write_failures,
        )
        return reconcile(self.log.state, self.facts, now, self.settings)

    def apply(self, decisions: list[Decision]) -> list[Decision]:
        """Carry the commands out; the log must accept each of them."""
        for decision in decisions:
            if not isinstance(decision.action, WriteManifest):
                self.log.ok(decision.action, at=self.wall_s)
        return decisions

    def step(self, after_s: float = 0.1) -> list[Decision]:
        """Take a turn and carry it out."""
        return self.apply(self.turn(after_s))


def shard(rank: int, step: int) -> ShardFact:
    return ShardFact(
        step=step,
        cursor=DataCursor(0, step),
        rank=rank,
        file=f"worker_{rank}.safetensors",
        size_bytes=10,
        sha256=DIGEST,
    )


def names(decisions: list[Decision]) -> list[str]:
    """The kinds of decisions, in order."""
    return [type(decision.action).__name__ for decision in decisions]


def reasons(decisions: list[Decision]) -> list[str]:
    """What is said about each decision, in order."""
    return [decision.reason for decision in decisions]


def only(decisions: list[Decision], kind: type[Any]) -> Any:
    """The action of the one decision of ``kind``."""
    found = [d.action for d in decisions if isinstance(d.action, kind)]
    assert len(found) == 1, decisions
    return found[0]


def failure(scene: Scene, after_s: float = 0.1) -> c.FailGeneration:
    """Take a turn in which the generation must fail."""
    found: c.FailGeneration = only(scene.turn(after_s), c.FailGeneration)
    return found


def why_waiting(scene: Scene) -> dict[str, str]:
    """What each waiting job waits for."""
    assert scene.facts is not None
    now = Now(scene.wall_s, scene.monotonic_s)
    return waiting_reasons(scene.log.state, scene.facts, now, scene.settings)


def recovering(scene: Scene, **fields: Any) -> Scene:
    """The first generation of a scene failed, and all its workers are gone."""
    scene.log.ok(fail("job-1", 1, **fields), at=scene.wall_s)
    for name in scene.reports:
        scene.hears(name)
    return scene


def commit(scene: Scene, effect: WriteManifest) -> None:
    """The coordinator wrote a manifest and its commit is in the log."""
    made = checkpoint(effect.step, effect.generation, f"manifest of {effect.step}")
    command = c.CommitCheckpoint(job_id="job-1", generation=effect.generation, checkpoint=made)
    scene.log.ok(command, at=scene.wall_s)
