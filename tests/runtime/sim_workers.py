"""A small model of agents and their workers, driven by the real replicated state.

Time moves in ticks. Agents converge to the state: they spawn and kill. Workers of a generation train in lockstep;
when one ends early the others fail with an echo one tick later. ``sim_world`` puts a leader on top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from msgspec.structs import replace

from distroml.consensus.state import ClusterState
from distroml.model import ASSIGNED, CheckpointStatus, FailureKind, Job
from distroml.reports import (
    DataCursor,
    NodeReport,
    ShardFact,
    WorkerFact,
    WorkerFailure,
    WorkerOutcome,
    WorkerPhase,
)
from distroml.runtime.facts import Now
from distroml.runtime.scheduler import is_alive
from tests.builders import Log

TICK_S = 0.1
KILL_TICKS = 2
"""From the decision to kill a worker to its end."""

WorkerKey = tuple[str, int, int]
"""Run, generation, rank."""
_ORDER = [
    WorkerPhase.SPAWNING,
    WorkerPhase.CONNECTING,
    WorkerPhase.RESTORING,
    WorkerPhase.TRAINING,
]


def digest_at(job_id: str, step: int) -> str:
    """What any correct execution of the job holds after ``step`` steps."""
    return hashlib.sha256(f"{job_id}:{step}".encode()).hexdigest()


class SimNode:
    """One host with its agent."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = slots
        self.incarnation = 1
        self.up = True
        self.muted = False
        self.disk_full = False
        self.lag_ticks = 0
        self.sequence = 0
        self.workers: dict[WorkerKey, WorkerFact] = {}
        self.doomed: dict[WorkerKey, int] = {}
        self.view = ClusterState()

    def alive(self) -> list[WorkerKey]:
        return [key for key, fact in self.workers.items() if is_alive(fact)]


class Fleet:
    """All nodes with their workers, and the log that they follow."""

    def __init__(self, nodes: dict[str, int]) -> None:
        self.log = Log(proposer="leader")
        self.nodes = {name: SimNode(name, slots) for name, slots in nodes.items()}
        self.ticks = 0
        self.corrupt: set[tuple[str, int]] = set()
        """Job and step of checkpoints whose bytes went bad."""

    @property
    def state(self) -> ClusterState:
        return self.log.state

    @property
    def wall_s(self) -> float:
        return 1_000_000.0 + self.ticks * TICK_S

    @property
    def now(self) -> Now:
        return Now(self.wall_s, self.ticks * TICK_S)

    # --- faults ---

    def crash_worker(self, index: int, exit_code: int = -9) -> None:
        """Kill the ``index``-th living worker, if there is one."""
        for sim, key in self._pick(index):
            self._end(sim, key, exit_code=exit_code)

    def fail_worker(self, index: int, error: str = "ValueError: bad batch") -> None:
        """Let a worker tell of an error, then exit."""
        for sim, key in self._pick(index):
            failure = WorkerFailure(
                kind=FailureKind.ERROR, error=error, traceback="…", at=self.wall_s
            )
            self._end(sim, key, exit_code=1, failure=failure)

    def _pick(self, index: int) -> Iterator[tuple[SimNode, WorkerKey]]:
        living = [(sim, key) for sim in self.nodes.values() if sim.up for key in sim.alive()]
        if living:
            yield living[index % len(living)]

    def _end(
        self,
        sim: SimNode,
        key: WorkerKey,
        *,
        exit_code: int,
        failure: WorkerFailure | None = None,
    ) -> None:
        fact = sim.workers[key]
        failure = fact.failure or failure
        phase = WorkerPhase.FAILED if failure else WorkerPhase.EXITED
        sim.workers[key] = replace(
            fact,
            phase=WorkerPhase.FINISHED if fact.outcome else phase,
            exit_code=exit_code,
            failure=failure,
            ended_at=self.wall_s,
        )
        sim.doomed.pop(key, None)

    # --- agents ---

    def converge(self) -> None:
        """Agents spawn and kill."""
        for sim in self.nodes.values():
            if not sim.up:
                continue
            if sim.lag_ticks > 0:
                sim.lag_ticks -= 1
            else:
                sim.view = self.state
            wanted = dict(self._wanted(sim))
            for key in list(sim.workers):
                if key in wanted:
                    self._drop_committed(sim, key, wanted[key])
                elif not is_alive(sim.workers[key]):
                    del sim.workers[key]
                else:
                    sim.doomed.setdefault(key, self.ticks + KILL_TICKS)
            for key, due in list(sim.doomed.items()):
                if due <= self.ticks:
                    self._end(sim, key, exit_code=-9)
            for key, job in wanted.items():
                if key not in sim.workers:
                    sim.workers[key] = self._spawned(sim, key, job)

    def _wanted(self, sim: SimNode) -> Iterator[tuple[WorkerKey, Job]]:
        for job in sim.view.jobs.values():
            if job.status in ASSIGNED and job.generation is not None:
                for m in job.generation.members:
                    if (m.node, m.incarnation) == (sim.name, sim.incarnation):
                        yield (job.run_id, job.generation.number, m.rank), job

    def _spawned(self, sim: SimNode, key: WorkerKey, job: Job) -> WorkerFact:
        assert job.generation is not None
        return WorkerFact(
            job_id=job.job_id,
            run_id=key[0],
            generation=key[1],
            rank=key[2],
            phase=WorkerPhase.SPAWNING,
            pid=self.ticks * 100 + len(sim.workers),
            step=job.generation.resume_step,
            total_steps=job.spec.steps,
            started_at=self.wall_s,
        )

    def _drop_committed(self, sim: SimNode, key: WorkerKey, job: Job) -> None:
        done = {c.step for c in job.checkpoints if c.status is CheckpointStatus.COMMITTED}
        fact = sim.workers[key]
        sim.workers[key] = replace(fact, shards=tuple(s for s in fact.shards if s.step not in done))

    def report(self) -> list[NodeReport]:
        """What all nodes that can be heard say now."""
        reports = []
        for sim in self.nodes.values():
            if not sim.up or sim.muted:
                continue
            sim.sequence += 1
            report = NodeReport(
                node=sim.name,
                incarnation=sim.incarnation,
                sequence=sim.sequence,
                at=self.wall_s,
                slots=sim.slots,
                workers=tuple(sim.workers[key] for key in sorted(sim.workers)),
                applied_index=sim.view.index,
            )
            reports.append(report)
        return reports

    # --- workers ---

    def advance(self) -> None:
        """Workers come one tick further."""
        groups: dict[tuple[str, int], dict[int, tuple[SimNode, WorkerKey]]] = {}
        for sim in self.nodes.values():
            for key in sim.workers if sim.up else ():
                groups.setdefault(key[:2], {})[key[2]] = (sim, key)
        for places in groups.values():
            self._advance(places)

    def _advance(self, places: dict[int, tuple[SimNode, WorkerKey]]) -> None:
        facts = {rank: sim.workers[key] for rank, (sim, key) in places.items()}
        example = next(iter(facts.values()))
        job = self.state.jobs.get(example.job_id)
        world_size = job.spec.resources.workers if job else 0
        whole = len(facts) == world_size
        trained = any(fact.phase in _ORDER[3:] for fact in facts.values())
        broken = any(
            fact.outcome is None and (not is_alive(fact) or fact.failure) for fact in facts.values()
        )
        if job is None or broken or (not whole and trained):
            self._echo(places)
        elif all(f.outcome is not None for f in facts.values()):
            for sim, key in places.values():
                if is_alive(sim.workers[key]):
                    self._end(sim, key, exit_code=0)
        elif whole and all(f.phase is WorkerPhase.TRAINING for f in facts.values()):
            self._train(job, places)
        elif whole:
            self._start(job, places)

    def _echo(self, places: dict[int, tuple[SimNode, WorkerKey]]) -> None:
        for sim, key in places.values():
            fact = sim.workers[key]
            if is_alive(fact) and fact.outcome is None and fact.phase is WorkerPhase.TRAINING:
                failure = WorkerFailure(
                    kind=FailureKind.ERROR,
                    error="Connection closed by peer",
                    traceback="",
                    at=self.wall_s,
                    collateral=fact.rank % 2 == 0,  # some do not notice that it is an echo
                )
                self._end(sim, key, exit_code=1, failure=failure)

    def _start(self, job: Job, places: dict[int, tuple[SimNode, WorkerKey]]) -> None:
        at = min(_ORDER.index(sim.workers[key].phase) for sim, key in places.values())
        for sim, key in places.values():
            fact = sim.workers[key]
            source = job.generation.checkpoint_step if job.generation else None
            if _ORDER[at] is WorkerPhase.RESTORING and (job.job_id, source) in self.corrupt:
                failure = WorkerFailure(
                    kind=FailureKind.CORRUPT_CHECKPOINT,
                    error="worker_0.safetensors: the hash differs",
                    traceback="",
                    at=self.wall_s,
                    checkpoint_step=source,
                )
                self._end(sim, key, exit_code=1, failure=failure)
            elif _ORDER.index(fact.phase) == at:
                sim.workers[key] = replace(fact, phase=_ORDER[at + 1])

    def _train(self, job: Job, places: dict[int, tuple[SimNode, WorkerKey]]) -> None:
        stopping = all(
            (seen := sim.view.jobs.get(job.job_id)) is not None and seen.stop_requested
            for sim, _ in places.values()
        )
        total = job.spec.steps or 1
        for sim, key in places.values():
            fact = sim.workers[key]
            step = fact.step if stopping else min(total, fact.step + 1)
            over = stopping or step == total
            saved, lost = fact.shards, fact.abandoned
            cp = job.spec.checkpointing
            due = cp.enabled and (over or step % cp.every_n_steps == 0)
            if due and sim.disk_full:
                lost = (*lost, (step, "No space left on device"))[-4:]
            elif due:
                saved = (*saved, _shard(fact, step))
            outcome = WorkerOutcome(
                step=step,
                epoch=0,
                state_digest=digest_at(job.job_id, step),
                metrics={"loss": 1.0 / (1 + step)},
                stopped=stopping,
                checkpoint_step=step if cp.enabled and not sim.disk_full else None,
            )
            sim.workers[key] = replace(
                fact,
                step=step,
                shards=saved,
                abandoned=lost,
                outcome=outcome if over else None,
                phase=WorkerPhase.FINISHED if over else fact.phase,
            )


def _shard(fact: WorkerFact, step: int) -> ShardFact:
    return ShardFact(
        step=step,
        cursor=DataCursor(0, step),
        rank=fact.rank,
        file=f"worker_{fact.rank}.safetensors",
        size_bytes=1,
        sha256=digest_at(fact.job_id, step),
    )
