"""A small model of agents and their workers, driven by the real replicated state.

Time moves in ticks. Agents converge to the state with the real assignment: they spawn, tell, call off and kill.
Workers of a generation train in lockstep; when one is gone the others park one tick later, some of them having
completed one more step. Ranks that meet agree on the state as real ones do. ``sim_world`` puts a leader on top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from distroml.consensus.state import ClusterState
from distroml.model import ASSIGNED, CheckpointStatus, FailureKind, Job
from distroml.reports import (
    DataCursor,
    Marks,
    NodeReport,
    ShardFact,
    StepTiming,
    WorkerFact,
    WorkerFailure,
    WorkerOutcome,
    WorkerPhase,
)
from distroml.runtime.assignment import Process, duties, next_join
from distroml.runtime.control import Join
from distroml.runtime.facts import Now
from distroml.runtime.scheduler import is_alive
from tests.builders import Log

TICK_S = 0.1
KILL_TICKS = 2
"""From the decision to kill a worker to its end."""
SPAWN_TICKS = 2
TIMING = StepTiming(
    step_s=TICK_S,
    data_s=0.0,
    compute_s=TICK_S,
    communication_s=0.0,
    idle_s=0.0,
    slowest_s=TICK_S,
)

WorkerKey = tuple[str, int]
"""Run, name of the process on its node."""
_P = WorkerPhase
_IN_GENERATION = (_P.CONNECTING, _P.RESTORING, _P.TRAINING)


def digest_at(job_id: str, step: int) -> str:
    """What any correct execution of the job holds after ``step`` steps."""
    return hashlib.sha256(f"{job_id}:{step}".encode()).hexdigest()


class SimProcess(Struct):
    """One worker process: what its agent knows of it, and what only it knows itself."""

    fact: WorkerFact
    told: Join | None
    spawned_tick: int
    leaving: int | None = None
    """The generation that its run leaves by the planned change for which it was told to join."""
    ranks: dict[int, int] = {}
    """By generation, of all that it was in: its rank there."""
    has_state: bool = False
    former: int = 0
    """The newest generation that it began with the others."""
    met: bool = False
    """Whether it met the other ranks of its generation."""
    called_off: bool = False
    stopped_tick: int | None = None
    livelocked: bool = False
    doomed_tick: int | None = None

    @property
    def alive(self) -> bool:
        return is_alive(self.fact)

    @property
    def stands_still(self) -> bool:
        return self.stopped_tick is not None or self.livelocked

    def update(self, **changes: object) -> None:
        self.fact = replace(self.fact, **changes)

    def as_process(self) -> Process:
        fact, told = self.fact, self.told
        usable = self.alive and self.doomed_tick is None
        return Process(
            worker=fact.worker,
            told=told.generation if told else 0,
            rank=told.rank if told else 0,
            joined=fact.generation,
            ranks=self.ranks,
            phase=fact.phase,
            alive=fact.ended_at is None,
            usable=usable and fact.failure is None and fact.outcome is None,
        )

    def enter(self, join: Join) -> None:
        """It is in the generation now that it was told to join."""
        self.met = self.called_off = False
        self.ranks = {**self.ranks, join.generation: join.rank}
        self.update(
            generation=join.generation,
            rank=join.rank,
            former=self.fact.former_of(self.leaving),
            phase=_P.CONNECTING,
            marks=Marks(left_at=self.fact.parked_at),
            parked_at=None,
            parked_reason="",
            bereft=False,
            shards=(),
            abandoned=(),
        )


class SimNode:
    """One host with its agent."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = slots
        self.incarnation = 1
        self.up = True
        self.muted = False
        self.draining = False
        self.leaves_tick = 0
        self.agent_back_tick: int | None = None
        """When the agent, which crashed, will be back; its workers live on for a while."""
        self.workers_since = 0
        self.disk_full = False
        self.lag_ticks = 0
        self.sequence = 0
        self.spawns = 0
        self.workers: dict[WorkerKey, SimProcess] = {}
        self.view = ClusterState()

    def alive(self) -> list[WorkerKey]:
        return [key for key, process in self.workers.items() if process.alive]


class Fleet:
    """All nodes with their workers, and the log that they follow."""

    def __init__(self, nodes: dict[str, int]) -> None:
        self.log = Log(proposer="leader")
        self.nodes = {name: SimNode(name, slots) for name, slots in nodes.items()}
        self.ticks = 0
        self.world_sizes: dict[tuple[str, int], int] = {}
        self.resumed: dict[str, tuple[int, int]] = {}
        """By job: the newest generation whose ranks went on, and from which step."""
        self.corrupt: set[tuple[str, int]] = set()
        self.holders_away = False
        """Whether no checkpoint's files can be had."""
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
        for process in self._pick(index):
            self._end(process, exit_code=exit_code)

    def fail_worker(self, index: int, error: str = "ValueError: bad batch") -> None:
        """Let a worker tell of an error, then exit."""
        for process in self._pick(index):
            failure = WorkerFailure(
                kind=FailureKind.ERROR, error=error, traceback="…", at=self.wall_s
            )
            self._end(process, exit_code=1, failure=failure)

    def stop_process(self, index: int) -> None:
        """SIGSTOP."""
        for process in self._pick(index):
            process.stopped_tick = self.ticks

    def livelock(self, index: int) -> None:
        """A worker turns in circles; its control thread goes on talking."""
        for process in self._pick(index):
            process.livelocked = True

    def _pick(self, index: int) -> Iterator[SimProcess]:
        living = [
            process
            for sim in self.nodes.values()
            if sim.up
            for process in sim.workers.values()
            if process.alive
        ]
        if living:
            yield living[index % len(living)]

    def _end(
        self, process: SimProcess, *, exit_code: int, failure: WorkerFailure | None = None
    ) -> None:
        fact = process.fact
        failure = fact.failure or failure
        phase = _P.FAILED if failure else _P.EXITED
        process.update(
            phase=_P.FINISHED if fact.outcome else phase,
            exit_code=exit_code,
            failure=failure,
            ended_at=self.wall_s,
        )

    # --- agents ---

    def converge(self) -> None:
        """Agents spawn, tell, call off and kill."""
        for sim in self.nodes.values():
            if not sim.up or sim.agent_back_tick is not None:
                continue
            current = sim.lag_ticks <= 0
            if current:
                sim.view = self.state
            else:
                sim.lag_ticks -= 1
            self._kill_the_doomed(sim)
            self._share_out(sim)
            if current:
                crowd = [p for p in sim.workers.values() if p.alive and p.doomed_tick is None]
                assert len(crowd) <= sim.slots, (sim.name, [p.fact for p in crowd])

    def _kill_the_doomed(self, sim: SimNode) -> None:
        for process in sim.workers.values():
            due = process.doomed_tick is not None and process.doomed_tick <= self.ticks
            if due and process.alive:
                self._end(process, exit_code=-9)

    def _share_out(self, sim: SimNode) -> None:
        jobs = {job.run_id: job for job in sim.view.jobs.values()}
        known: dict[str, list[Process]] = {}
        for (run_id, _), process in sim.workers.items():
            known.setdefault(run_id, []).append(process.as_process())
        for run_id, share in duties(sim.view, sim.name, sim.incarnation, known).items():
            for worker in share.retired:
                self._retire(sim, (run_id, worker))
            for worker in share.aborted:
                process = sim.workers[run_id, worker]
                process.called_off = process.called_off or process.told is not None
            for rank, worker_or_none in share.ranks.items():
                if worker_or_none is None:
                    self._spawn(sim, jobs[run_id], next_join(jobs[run_id], rank))
                else:
                    self._direct(sim, jobs[run_id], rank, sim.workers[run_id, worker_or_none])
            for spare in share.spares:
                if spare is None:
                    self._spawn(sim, jobs[run_id], None)

    def _retire(self, sim: SimNode, key: WorkerKey) -> None:
        process = sim.workers[key]
        if not process.alive:
            del sim.workers[key]
        elif process.doomed_tick is None:
            process.doomed_tick = self.ticks + KILL_TICKS

    def _spawn(self, sim: SimNode, job: Job, join: Join | None) -> None:
        sim.spawns += 1
        worker = sim.incarnation * 1_000_000 + sim.spawns
        fact = WorkerFact(
            job_id=job.job_id,
            run_id=job.run_id,
            worker=worker,
            generation=join.generation if join else 0,
            rank=join.rank if join else 0,
            phase=_P.SPAWNING,
            pid=worker,
            total_steps=job.spec.steps,
            started_at=self.wall_s,
        )
        sim.workers[job.run_id, worker] = SimProcess(
            fact=fact,
            told=join,
            spawned_tick=self.ticks,
            ranks={fact.generation: fact.rank},
        )

    def _direct(self, sim: SimNode, job: Job, rank: int, process: SimProcess) -> None:
        done = {c.step for c in job.checkpoints if c.status is CheckpointStatus.COMMITTED}
        process.update(shards=tuple(s for s in process.fact.shards if s.step not in done))
        join = next_join(job, rank, process.as_process())
        fact, told = process.fact, process.told
        if (fact.generation, fact.rank) == (join.generation, join.rank) or not process.alive:
            return
        known = told and (told.generation, told.rank, told.at_boundary)
        if fact.phase is _P.SPAWNING or known == (
            join.generation,
            join.rank,
            join.at_boundary,
        ):
            return
        joining = job.generation.joining if job.generation else ()
        if join.at_boundary and not self._can_be_met(job, joining):
            return
        process.told = join
        process.leaving = job.outgoing.number if job.outgoing else None
        if not join.at_boundary:
            process.enter(join)

    def _can_be_met(self, job: Job, ranks: tuple[int, ...]) -> bool:
        """Whether these ranks of the newest generation have published where."""
        there = {
            process.fact.rank
            for sim in self.nodes.values()
            for process in sim.workers.values()
            if (process.fact.run_id, process.fact.generation) == (job.run_id, job.generation_number)
            and process.alive
            and process.fact.phase in _IN_GENERATION
        }
        return set(ranks) <= there

    def report(self) -> list[NodeReport]:
        """What all nodes that can be heard say now."""
        reports = []
        for sim in self.nodes.values():
            if not sim.up or sim.muted or sim.agent_back_tick is not None:
                continue
            sim.sequence += 1
            report = NodeReport(
                node=sim.name,
                incarnation=sim.incarnation,
                sequence=sim.sequence,
                at=self.wall_s,
                slots=sim.slots,
                workers=tuple(self._observed(sim.workers[key]) for key in sorted(sim.workers)),
                applied_index=sim.view.index,
                draining=sim.draining,
                workers_since=sim.workers_since,
            )
            reports.append(report)
        return reports

    def _observed(self, process: SimProcess) -> WorkerFact:
        stopped = process.stopped_tick
        still_s = 0.0 if stopped is None else (self.ticks - stopped) * TICK_S
        waiting_s = 0.0 if process.stands_still else TICK_S
        return replace(
            process.fact, stopped_s=still_s, silent_s=still_s, waiting_s=waiting_s, timing=TIMING
        )

    # --- workers ---

    def advance(self) -> None:
        """Workers come one tick further."""
        groups: dict[tuple[str, int], list[tuple[SimNode, SimProcess]]] = {}
        for sim in self.nodes.values():
            for key, process in sim.workers.items() if sim.up else ():
                self._come_up(process)
                groups.setdefault((key[0], process.fact.generation), []).append((sim, process))
        for (_, generation), group in groups.items():
            if generation > 0:
                self._advance(group)

    def _come_up(self, process: SimProcess) -> None:
        spawned = self.ticks - process.spawned_tick >= SPAWN_TICKS
        if process.alive and process.fact.phase is _P.SPAWNING and spawned:
            process.update(phase=_P.CONNECTING if process.told else _P.SPARE)

    def _advance(self, group: list[tuple[SimNode, SimProcess]]) -> None:
        processes = [process for _, process in group]
        for process in processes:
            able = process.fact.phase in _IN_GENERATION and not process.stands_still
            if process.called_off and able:
                self._park(process, "called off")
        at_work = [p for p in processes if p.alive and p.fact.phase in _IN_GENERATION]
        size = self._world_size(processes)
        met = [p for p in processes if p.met]
        there = [p for p in met if p.alive and p.fact.phase in _IN_GENERATION]
        done = [p for p in met if p.fact.outcome is not None]
        if met and len(there) + len(done) < size:
            self._break(there)
        elif any(process.stands_still for process in at_work):
            return
        elif done and not there:
            for process in done:
                if process.alive:
                    self._end(process, exit_code=0)
        elif met and all(p.fact.phase is _P.TRAINING for p in there):
            self._train(group)
        elif met:
            self._restore(there)
        elif len(at_work) == size and all(p.fact.phase is _P.CONNECTING for p in at_work):
            for process in at_work:
                process.met = True
                marks = replace(process.fact.marks, met_at=self.wall_s)
                process.update(phase=_P.RESTORING, marks=marks)

    def _world_size(self, processes: list[SimProcess]) -> int:
        """Ranks of the generation that these are in; remembered, since some may be told of the next one already."""
        fact = processes[0].fact
        for one in processes:
            if one.told and one.told.generation == fact.generation:
                self.world_sizes[fact.run_id, fact.generation] = one.told.world_size
        return self.world_sizes[fact.run_id, fact.generation]

    def _park(self, process: SimProcess, reason: str, *, bereft: bool = False) -> None:
        process.update(
            phase=_P.PARKED,
            parked_at=self.wall_s,
            parked_reason=reason,
            bereft=bereft,
            has_state=process.has_state,
        )
        process.met = False

    def _break(self, there: list[SimProcess]) -> None:
        """A rank is gone: the others' collectives break, some of which still came to their end."""
        trained = [p for p in there if p.fact.phase is _P.TRAINING]
        step = max((p.fact.step for p in trained), default=0)
        for process in there:
            if process.stands_still:
                continue
            fact = process.fact
            total = fact.total_steps or 1
            one_more = fact.rank % 2 == 0 and fact.phase is _P.TRAINING and fact.step == step
            if one_more and step + 1 < total:
                process.update(step=step + 1)
            self._park(process, "Connection closed by peer")

    def _restore(self, there: list[SimProcess]) -> None:
        """They agree on the state: that of who got furthest, else the checkpoint, else none."""
        source = next((p.told.checkpoint for p in there if p.told and p.told.checkpoint), None)
        saved = source.step if source else 0
        furthest = max((p.fact.step for p in there if p.has_state), default=-1)
        step = furthest if furthest >= saved else saved
        formerly = max((p.former for p in there if p.has_state and p.fact.step == step), default=-1)
        joins = [p.told for p in there if p.told and p.told.generation == p.fact.generation]
        wanted = max((join.resume_step for join in joins), default=0)
        bereft = step < wanted and formerly < there[0].fact.generation - 1
        if bereft:
            for process in there:
                self._park(process, f"no rank has the {wanted} steps any more", bereft=True)
            return
        self._check_nothing_done_twice(there[0].fact, step)
        for process in there:
            fact = process.fact
            reads = furthest < saved and source is not None
            corrupt = (fact.job_id, saved) in self.corrupt
            if reads and (corrupt or self.holders_away):
                away, broken = FailureKind.CHECKPOINT_AWAY, FailureKind.CORRUPT_CHECKPOINT
                failure = WorkerFailure(
                    kind=away if self.holders_away else broken,
                    error="worker_0.safetensors: no good copy",
                    traceback="",
                    at=self.wall_s,
                    checkpoint_step=saved,
                )
                self._end(process, exit_code=1, failure=failure)
                continue
            process.has_state, process.former = True, process.fact.generation
            marks = replace(
                fact.marks, restored_at=self.wall_s, resume_step=step, source=f"step {step}"
            )
            process.update(phase=_P.TRAINING, step=step, marks=marks, step_at=self.wall_s)

    def _check_nothing_done_twice(self, fact: WorkerFact, step: int) -> None:
        """Ranks that go on from ``step`` do nothing again that is committed, or will be of generations before theirs."""
        job = self.state.jobs[fact.job_id]
        if job.status not in ASSIGNED or fact.generation not in job.generation_numbers:
            return  # they have yet to hear that this is over
        newest = job.newest_checkpoint()
        assert newest is None or newest.generation >= fact.generation or newest.step <= step, (
            f"generation {fact.generation} of {fact.job_id} goes on from {step}, behind {newest.step}"
        )
        self.resumed[fact.job_id] = fact.generation, step

    def _train(self, group: list[tuple[SimNode, SimProcess]]) -> None:
        places = [(sim, p) for sim, p in group if p.met and p.alive and p.fact.outcome is None]
        stopping = all(_is_to_end(sim.view.jobs.get(p.fact.job_id), p.fact) for sim, p in places)
        leaving = any(
            p.told and p.told.generation > p.fact.generation and p.told.at_boundary
            for _, p in places
        )
        for sim, process in places:
            self._step(sim, process, stopping=stopping)
            if leaving and process.fact.outcome is None:
                self._change_over(sim, process)

    def _change_over(self, sim: SimNode, process: SimProcess) -> None:
        """It tells its agent, if there is one, that it has left, and joins what it has been told."""
        self._park(process, "the others changed over")
        if sim.agent_back_tick is None:
            self._share_out(sim)
        told = process.told
        if told and told.generation > process.fact.generation:
            process.enter(told)

    def _step(self, sim: SimNode, process: SimProcess, *, stopping: bool) -> None:
        fact = process.fact
        job = self.state.jobs.get(fact.job_id)
        if job is None:
            return
        total = fact.total_steps or 1
        step = fact.step if stopping else min(total, fact.step + 1)
        over = stopping or step == total
        saved, lost = fact.shards, fact.abandoned
        cp = job.spec.checkpointing
        saves = cp.enabled or (stopping and not job.stop_requested)
        due = saves and (over or step % cp.every_n_steps == 0)
        if due and sim.disk_full:
            lost = (*lost, (step, "No space left on device"))[-4:]
        elif due:
            saved = (*saved, _shard(fact, step))
        outcome = WorkerOutcome(
            step=step,
            epoch=0,
            state_digest=digest_at(fact.job_id, step),
            sample_digest=digest_at("samples", step),
            metrics={"loss": 1.0 / (1 + step)},
            stopped=stopping,
            checkpoint_step=step if saves and not sim.disk_full else None,
        )
        marks = fact.marks
        if marks.stepped_at is None:
            marks = replace(marks, stepped_at=self.wall_s)
        process.update(
            step=step,
            step_at=self.wall_s,
            shards=saved,
            abandoned=lost,
            outcome=outcome if over else None,
            marks=marks,
            phase=_P.FINISHED if over else fact.phase,
        )


def _is_to_end(job: Job | None, fact: WorkerFact) -> bool:
    """Whether a process is asked to stop at a step boundary, for good or to go on elsewhere."""
    if job is None or job.generation is None:
        return False
    vacated = job.generation.vacated and job.generation_number == fact.generation
    return job.stop_requested or vacated


def _shard(fact: WorkerFact, step: int) -> ShardFact:
    return ShardFact(
        step=step,
        cursor=DataCursor(0, step),
        rank=fact.rank,
        file=f"worker_{fact.rank}.safetensors",
        size_bytes=1,
        sha256=digest_at(fact.job_id, step),
    )
