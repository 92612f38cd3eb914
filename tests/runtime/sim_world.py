"""A whole cluster around the real state machine and the real reconciler.

Whoever leads takes one turn per tick: it hears the reports of ``sim_workers``, judges, decides and applies. ``World``
checks on the way that no decision is stale and that no slot is given twice; tests script the faults.
"""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from distroml import commands as c
from distroml.consensus.state import ClusterState
from distroml.model import ASSIGNED, Checkpoint, Generation, Job, JobStatus, NodeStatus
from distroml.reports import NodeReport, WorkerFact
from distroml.runtime.facts import CheckpointKey, Facts, NodeFacts, ReconcilerSettings, look
from distroml.runtime.failure_detector import Listening, NodeObservation, assess
from distroml.runtime.hang import HangSettings
from distroml.runtime.look_ahead import with_next_generations
from distroml.runtime.reconciler import Decision, WriteManifest, reconcile
from distroml.runtime.scheduler import may_go_on
from tests.builders import drain, node, submit
from tests.runtime.sim_workers import Fleet, SimNode

ELECTION_TICKS = 5
FAREWELL_TICKS = 30
SETTINGS = ReconcilerSettings(
    backoff_limit_s=1.0,
    start_deadline_s=30.0,
    stop_deadline_s=30.0,
    final_checkpoint_wait_s=10.0,
    hang=HangSettings(floor_s=3.0, ceiling_s=6.0),
)


class World(Fleet):
    """Nodes, the log and the leader."""

    def __init__(self, nodes: dict[str, int], settings: ReconcilerSettings = SETTINGS) -> None:
        super().__init__(nodes)
        self.settings = settings
        self.leader: str | None = next(iter(nodes))
        self.leaderless_ticks = 0
        self.leader_since_s = 0.0
        self.facts: Facts | None = None
        self.heard: dict[str, tuple[NodeReport, float]] = {}
        self.down_since_s: dict[str, float] = {}
        self.writing: dict[CheckpointKey, tuple[int, WriteManifest]] = {}
        self.write_failures: dict[CheckpointKey, str] = {}
        self.manifests_fail = False
        self.ended_by_request: set[str] = set()
        self.decisions: list[Decision] = []
        self.ghosts: list[tuple[int, list[Decision]]] = []
        for name, slots in nodes.items():
            self.log.ok(node(name, slots=slots), at=self.wall_s)

    # --- what tests do ---

    def submit(self, job_id: str, **fields: object) -> None:
        self.log.ok(submit(job_id, **fields), at=self.wall_s)  # type: ignore[arg-type]

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tick()

    def run_until_over(self, limit_ticks: int) -> None:
        """Go on until all jobs have ended."""
        for _ in range(limit_ticks):
            if all(job.terminal for job in self.state.jobs.values()):
                return
            self.tick()
        left = {j.job_id: (j.status, j.reason) for j in self.state.active_jobs()}
        raise AssertionError(
            f"waited {limit_ticks} ticks for all jobs to end; still active: {left}"
        )

    def run_until(self, job_id: str, *statuses: JobStatus, limit_ticks: int = 600) -> Job:
        for _ in range(limit_ticks):
            job = self.state.jobs[job_id]
            if job.status in statuses:
                return job
            self.tick()
        job = self.state.jobs[job_id]
        raise AssertionError(f"waited for {statuses}; {job_id} is {job.status}: {job.reason}")

    def take_down(self, name: str) -> None:
        """The whole host dies, with its workers."""
        sim = self.nodes[name]
        sim.up = False
        sim.agent_back_tick, sim.workers_since = None, 0
        sim.workers.clear()
        self.down_since_s.setdefault(name, self.now.monotonic_s)
        if self.leader == name:
            self.depose()

    def bring_up(self, name: str) -> None:
        """The host starts again as its next incarnation."""
        sim = self.nodes[name]
        if sim.up:
            return
        sim.up, sim.incarnation, sim.draining = True, sim.incarnation + 1, False
        self.down_since_s.pop(name, None)
        self.log.ok(node(name, incarnation=sim.incarnation, slots=sim.slots), at=self.wall_s)

    def stop(self, index: int) -> None:
        """A user asks for the ``index``-th active job to stop."""
        for job in self._active(index):
            self.ended_by_request.add(job.job_id)
            self.log.ok(c.StopJob(job_id=job.job_id, reason="stopped by request"), at=self.wall_s)

    def cancel(self, index: int) -> None:
        """A user cancels the ``index``-th active job."""
        for job in self._active(index):
            self.ended_by_request.add(job.job_id)
            self.log.ok(c.CancelJob(job_id=job.job_id, reason="cancelled"), at=self.wall_s)

    def crash_agent(self, name: str, ticks: int) -> None:
        """The agent dies and comes back; its workers go on meanwhile, if that does not take too long."""
        sim = self.nodes[name]
        if sim.up and sim.agent_back_tick is None:
            sim.agent_back_tick = self.ticks + ticks
            self.down_since_s.setdefault(name, self.now.monotonic_s)
            if self.leader == name:
                self.depose()

    def _agents_come_back(self) -> None:
        for name, sim in self.nodes.items():
            due = sim.agent_back_tick
            if not sim.up or due is None or due > self.ticks:
                continue
            sim.agent_back_tick, sim.draining = None, False
            sim.workers_since = sim.workers_since or sim.incarnation
            sim.incarnation += 1
            self.down_since_s.pop(name, None)
            back = node(
                name,
                incarnation=sim.incarnation,
                slots=sim.slots,
                workers_since=sim.workers_since,
            )
            self.log.ok(back, at=self.wall_s)

    def drain(self, name: str, *, undo: bool = False) -> None:
        """A user drains a node, or takes that back."""
        known = self.state.nodes[name]
        if undo or known.status in (NodeStatus.ALIVE, NodeStatus.DRAINING):
            self.log.ok(drain(name, undo=undo, incarnation=known.incarnation), at=self.wall_s)

    def shut_down(self, name: str) -> None:
        """A host is asked to stop: it says so, and is gone a little later."""
        sim = self.nodes[name]
        sim.draining = sim.up
        sim.leaves_tick = self.ticks + FAREWELL_TICKS

    def depose(self) -> None:
        """The leader is gone; another node takes over a little later, from state and reports alone."""
        self.leader, self.facts, self.leaderless_ticks = None, None, 0
        self.writing.clear()
        self.write_failures.clear()

    def haunt(self, delay_ticks: int) -> None:
        """A deposed leader's decisions of this moment reach the log later."""
        if self.facts is not None:
            stale = reconcile(self.state, self.facts, self.now, self.settings)
            self.ghosts.append((self.ticks + delay_ticks, stale))

    def heal(self) -> None:
        """End all faults that last."""
        for name, sim in self.nodes.items():
            self.bring_up(name)
            sim.agent_back_tick = None if sim.agent_back_tick is None else self.ticks
            self.drain(name, undo=True)
            sim.muted = sim.disk_full = sim.draining = False
            sim.lag_ticks = 0
        self.manifests_fail = self.holders_away = False

    # --- one tick ---

    def tick(self) -> None:
        self.ticks += 1
        self._agents_come_back()
        for sim in self.nodes.values():
            leaves = sim.draining and sim.agent_back_tick is None
            if sim.up and leaves and sim.leaves_tick <= self.ticks:
                self._leave(sim)
        self.converge()
        self.advance()
        for report in self.report():
            self.heard[report.node] = (report, self.now.monotonic_s)
        self._haunting()
        self._lead()

    def _leave(self, sim: SimNode) -> None:
        goodbye = c.SetNodeStatus(
            name=sim.name,
            incarnation=sim.incarnation,
            status=NodeStatus.LEFT,
            reason="stopped by request",
        )
        self.log(goodbye, at=self.wall_s)
        self.take_down(sim.name)

    def _active(self, index: int) -> list[Job]:
        active = self.state.active_jobs()
        return [active[index % len(active)]] if active else []

    # --- the leader ---

    def _lead(self) -> None:
        if self.leader is None:
            self.leaderless_ticks += 1
            up = [
                name for name, sim in self.nodes.items() if sim.up and sim.agent_back_tick is None
            ]
            if self.leaderless_ticks < ELECTION_TICKS or not up:
                return
            self.leader, self.leader_since_s = up[0], self.now.monotonic_s
        self._finish_writing()
        self.facts = look(
            self.facts,
            self.state,
            self._node_facts(),
            self.now,
            writing=frozenset(self.writing),
            write_failures=self.write_failures,
        )
        decisions = reconcile(self.state, self.facts, self.now, self.settings)
        self._check(decisions)
        decisions = with_next_generations(
            self.state, self.facts, self.now, self.settings, decisions
        )
        for decision in decisions:
            self.decisions.append(decision)
            if isinstance(decision.action, WriteManifest):
                effect = decision.action
                key = (effect.job_id, effect.generation, effect.step)
                self.writing[key] = (self.ticks + 2, effect)
            else:
                self.log.ok(decision.action, at=self.wall_s)

    def _node_facts(self) -> dict[str, NodeFacts]:
        observed = []
        for name, registered in self.state.nodes.items():
            report, at_s = self.heard.get(name, (None, None))
            observed.append(
                NodeObservation(
                    node=name,
                    incarnation=report.incarnation if report else registered.incarnation,
                    last_heard_s=at_s,
                    connected=name not in self.down_since_s,
                    down_since_s=self.down_since_s.get(name),
                )
            )
        assert self.leader is not None
        listening = Listening(own_node=self.leader, leader_since_s=self.leader_since_s)
        verdicts = assess(observed, now_s=self.now.monotonic_s, listening=listening)
        return {
            name: NodeFacts(
                health=verdict.health,
                reason=verdict.reason,
                incarnation=verdict.incarnation,
                report=self.heard[name][0] if name in self.heard else None,
                heard_at=self._heard_at(name),
                connected=name not in self.down_since_s,
            )
            for name, verdict in verdicts.items()
        }

    def _heard_at(self, name: str) -> float | None:
        if name not in self.heard:
            return None
        return self.wall_s - (self.now.monotonic_s - self.heard[name][1])

    def _finish_writing(self) -> None:
        for key, (due, effect) in list(self.writing.items()):
            if due > self.ticks:
                continue
            del self.writing[key]
            if self.manifests_fail:
                self.write_failures[key] = "Permission denied"
                continue
            checkpoint = Checkpoint(
                step=effect.step,
                epoch=0,
                generation=effect.generation,
                directory=f"ckpt_step_{effect.step:08d}",
                manifest=f"manifest-{effect.generation}.json",
                manifest_sha256=f"{effect.generation}-{effect.step}",
                size_bytes=1,
                shards=len(effect.shards),
                committed_at=self.wall_s,
            )
            # A job that was cancelled meanwhile refuses it, which is fine.
            self.corrupt.discard((effect.job_id, effect.step))
            committed = self.log(
                c.CommitCheckpoint(
                    job_id=effect.job_id, generation=effect.generation, checkpoint=checkpoint
                ),
                at=self.wall_s,
            )
            resumed, step = self.resumed.get(effect.job_id, (0, 0))
            late = not committed.outcome.error and effect.generation < resumed
            assert not late or effect.step <= step, f"{key} after {resumed} went on from {step}"

    def _haunting(self) -> None:
        for due, decisions in list(self.ghosts):
            if due <= self.ticks:
                self.ghosts.remove((due, decisions))
                for decision in decisions:
                    if not isinstance(decision.action, WriteManifest):
                        self.log(decision.action, at=self.wall_s)

    # --- what must hold at every turn ---

    def _check(self, decisions: list[Decision]) -> None:
        assert self.facts is not None
        assert decisions == reconcile(*self._shuffled(), self.now, self.settings)
        changed: set[str] = set()
        for decision in decisions:
            assert decision.reason
            action = decision.action
            if isinstance(
                action, c.FormGeneration | c.FailGeneration | c.FinishRun | c.MarkRunning
            ):
                assert action.job_id not in changed, decisions
                changed.add(action.job_id)
            if isinstance(action, c.FormGeneration):
                self._check_formation(action.generation, self.state.jobs[action.job_id])
            elif isinstance(action, c.FailGeneration | c.FinishRun | c.MarkRunning):
                assert action.generation == self.state.jobs[action.job_id].generation_number
            elif isinstance(action, WriteManifest):
                job = self.state.jobs[action.job_id]
                present = (job.generation, job.outgoing)
                assert action.generation in {one.number for one in present if one}
        self._check_slots(decisions)

    def _shuffled(self) -> tuple[ClusterState, Facts]:
        """The same state and facts with every dict in another order."""
        assert self.facts is not None
        state = replace(
            self.state,
            jobs=dict(reversed(self.state.jobs.items())),
            nodes=dict(reversed(self.state.nodes.items())),
        )
        facts = replace(
            self.facts,
            nodes=dict(reversed(self.facts.nodes.items())),
            sightings=dict(reversed(self.facts.sightings.items())),
        )
        return state, facts

    def _check_formation(self, generation: Generation, job: Job) -> None:
        newest = job.newest_checkpoint()
        resources = job.spec.resources
        ranks = [m.rank for m in generation.members]
        assert generation.number == job.generation_number + 1
        assert ranks == list(range(len(ranks)))
        assert resources.fewest <= len(ranks) <= resources.workers
        assert len(generation.spares) <= resources.spares
        assert generation.checkpoint_step == (newest.step if newest else None)
        assert generation.resume_step >= (newest.step if newest else 0)
        assert generation.planned == (
            job.status is not JobStatus.QUEUED and job.status is not JobStatus.RECOVERING
        )
        if generation.planned:
            assert set(generation.joining) < set(ranks), "somebody stays who has the state"

    def _check_slots(self, decisions: list[Decision]) -> None:
        """Ranks, plus processes that will not make room by themselves, never exceed the slots of a node."""
        formed = [d.action for d in decisions if isinstance(d.action, c.FormGeneration)]
        if not formed:
            return
        used = self.state.slots_used()
        for command in formed:
            generation, at_work = command.generation, self.state.jobs[command.job_id].at_work
            members = generation.members
            if generation.planned and at_work:
                # Who stays may have another rank from now on; the slot is the same.
                staying = Counter(m.node for m in members if m.rank not in generation.joining)
                assert staying <= Counter(m.node for m in at_work.members)
                members = tuple(m for m in members if m.rank in generation.joining)
            for member in members:
                used[member.node] = used.get(member.node, 0) + 1
        going_on = {job.run_id: job for job in self.state.active_jobs()}
        for name, sim in self.nodes.items():
            strays = [
                key
                for key in sim.alive()
                if sim.up and _is_stray(sim.workers[key].fact, name, going_on.get(key[0]))
            ]
            assert used.get(name, 0) + len(strays) <= sim.slots, (name, used, strays, decisions)


def _is_stray(fact: WorkerFact, node: str, job: Job | None) -> bool:
    """Whether a process holds a slot that no assignment counts, and will not make room by itself."""
    if job is None:
        return True
    assigned = job.status in ASSIGNED and fact.generation in job.generation_numbers
    return not assigned and not may_go_on(fact, node, job)
