"""The leader's loop: facts in, decisions of the pure functions out, proposed through the log.

Runs on every node and does nothing unless that node leads. It keeps nothing that a successor would miss: what it
remembers between turns (since when it sees what, which manifests it is writing) is rebuilt from reports and state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from msgspec import Struct

from distroml.commands import AnyCommand, CommitCheckpoint, Outcome
from distroml.consensus.replica import Replica
from distroml.errors import DistroMLError, Unavailable
from distroml.model import Event
from distroml.runtime.checkpoint.commit import publish_latest, write_manifest
from distroml.runtime.checkpoint.store import CheckpointStore
from distroml.runtime.decisions import Decision, WriteManifest
from distroml.runtime.facts import CheckpointKey, Facts, NodeFacts, Now, ReconcilerSettings, look
from distroml.runtime.failure_detector import DetectorSettings, Listening, assess
from distroml.runtime.observations import Observations
from distroml.runtime.reconciler import reconcile, waiting_reasons

TURN_S = 0.1
"""Longest pause between two turns; reports and applied entries start one at once."""
STALL_S = 1.0
"""A loop that stood still for longer has not listened: silence in that time proves nothing."""
PROPOSE_TIMEOUT_S = 5.0
WAITING_AGE_S = 0.25
"""How old the reasons may be that clients are told for waiting jobs."""
MAX_WRITE_FAILURES = 256

_log = logging.getLogger(__name__)


class _Raft(Protocol):
    @property
    def is_leader(self) -> bool: ...


class CoordinatorSettings(Struct, frozen=True, kw_only=True):
    """Thresholds of the pure functions."""

    detector: DetectorSettings = DetectorSettings()
    reconciler: ReconcilerSettings = ReconcilerSettings()


class Coordinator:
    """Leader-only duties: declare nodes lost, form generations, commit checkpoints, finish runs."""

    def __init__(
        self,
        *,
        node: str,
        raft: _Raft,
        replica: Replica,
        observations: Observations,
        propose: Callable[[AnyCommand, float], Awaitable[Outcome]],
        store: CheckpointStore,
        settings: CoordinatorSettings,
    ) -> None:
        self._node = node
        self._raft = raft
        self._replica = replica
        self._observations = observations
        self._propose = propose
        self._store = store
        self._settings = settings
        self._kicked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._facts: Facts | None = None
        self._watched: Facts | None = None
        self._waiting: dict[str, str] = {}
        self._waiting_at_s = float("-inf")
        self._leader_since_s = 0.0
        self._awake_since_s = 0.0
        self._writing: set[CheckpointKey] = set()
        self._write_failures: dict[CheckpointKey, str] = {}
        self.decisions: dict[str, int] = {}
        """Decisions taken by this node while it led, by command."""

    def start(self) -> None:
        """Begin the loop."""
        self._task = asyncio.create_task(self._run(), name="coordinator")

    async def stop(self) -> None:
        """End the loop; manifests that are being written are left to the next leader."""
        tasks = [task for task in (self._task, *self._background) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def kick(self) -> None:
        """Something changed: take a turn soon."""
        self._kicked.set()

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Replica listener: a committed checkpoint becomes the ``LATEST`` of its run."""
        if not self._raft.is_leader:
            return
        for event in events:
            if event.type == "checkpoint" and event.job_id is not None:
                self._start(self._publish_latest(event.job_id))

    def waiting(self) -> dict[str, str]:
        """Why each QUEUED or RECOVERING job does not go on, as this node sees it; any node may answer."""
        now = Now(time.time(), time.monotonic())
        if now.monotonic_s - self._waiting_at_s >= WAITING_AGE_S:
            before = self._facts or self._watched or Facts(nodes={})
            self._watched = self._look(before, now)
            self._waiting_at_s = now.monotonic_s
            self._waiting = waiting_reasons(
                self._replica.state, self._watched, now, self._settings.reconciler
            )
        return self._waiting

    async def _run(self) -> None:
        last_s = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):
                    await self._kicked.wait()
            self._kicked.clear()
            now_s = time.monotonic()
            if now_s - last_s > STALL_S:
                self._awake_since_s = now_s
            last_s = now_s
            try:
                await self._turn(Now(time.time(), now_s))
            except DistroMLError as error:
                _log.warning("a decision could not be proposed: %s", error)
            except Exception:  # a defect in one turn must not end coordination
                _log.exception("a turn of the coordinator failed")
            last_s = max(last_s, time.monotonic())

    async def _turn(self, now: Now) -> None:
        if not self._raft.is_leader:
            if self._facts is not None:
                self._step_down()
            return
        if self._facts is None:
            self._leader_since_s = now.monotonic_s
            _log.info("%s coordinates now", self._node)
        self._facts = self._look(self._facts, now)
        decisions = reconcile(self._replica.state, self._facts, now, self._settings.reconciler)
        for decision in decisions:
            await self._carry_out(decision)

    def _look(self, before: Facts | None, now: Now) -> Facts:
        state = self._replica.state
        registered = {name: node.incarnation for name, node in state.nodes.items()}
        verdicts = assess(
            self._observations.observations(registered).values(),
            now_s=now.monotonic_s,
            listening=Listening(
                own_node=self._node,
                leader_since_s=self._leader_since_s,
                awake_since_s=self._awake_since_s,
            ),
            settings=self._settings.detector,
        )
        nodes = {
            name: NodeFacts(
                health=verdict.health,
                reason=verdict.reason,
                incarnation=verdict.incarnation,
                report=self._observations.report(name),
                heard_at=now.wall_s - self._observations.age_s(name, now.monotonic_s),
            )
            for name, verdict in verdicts.items()
        }
        return look(
            before,
            state,
            nodes,
            now,
            writing=frozenset(self._writing),
            write_failures=self._write_failures,
        )

    async def _carry_out(self, decision: Decision) -> None:
        action = decision.action
        if isinstance(action, WriteManifest):
            key = (action.job_id, action.generation, action.step)
            if key not in self._writing:
                self._writing.add(key)
                self._start(self._commit(key, action))
            return
        name = type(action).__name__
        self.decisions[name] = self.decisions.get(name, 0) + 1
        _log.info("%s: %s", name, decision.reason)
        outcome = await self._propose(action, PROPOSE_TIMEOUT_S)
        if outcome.error:
            _log.warning("%s was refused (%s): %s", name, outcome.error, outcome.detail)

    def _step_down(self) -> None:
        _log.info("%s no longer coordinates", self._node)
        self._facts = None
        self._write_failures.clear()

    # --- checkpoints ---

    async def _commit(self, key: CheckpointKey, effect: WriteManifest) -> None:
        """Write the manifest, then propose the commit: the log entry is what counts."""
        try:
            checkpoint = await asyncio.to_thread(
                write_manifest,
                self._store,
                job_id=effect.job_id,
                run_id=effect.run_id,
                generation=effect.generation,
                shards=effect.shards,
                committed_at=time.time(),
            )
            command = CommitCheckpoint(
                job_id=effect.job_id, generation=effect.generation, checkpoint=checkpoint
            )
            outcome = await self._propose(command, PROPOSE_TIMEOUT_S)
            if outcome.error:
                self._give_up_writing(key, f"the commit was refused: {outcome.detail}")
        except Unavailable as error:
            _log.warning("commit of %s is tried again: %s", key, error)
        except (DistroMLError, OSError) as error:
            self._give_up_writing(key, str(error))
        finally:
            self._writing.discard(key)
            self.kick()

    def _give_up_writing(self, key: CheckpointKey, reason: str) -> None:
        _log.error("checkpoint %s could not be committed: %s", key, reason)
        while len(self._write_failures) >= MAX_WRITE_FAILURES:
            del self._write_failures[next(iter(self._write_failures))]
        self._write_failures[key] = reason

    async def _publish_latest(self, job_id: str) -> None:
        job = self._replica.state.jobs.get(job_id)
        newest = job.newest_checkpoint() if job else None
        if newest is None:
            return
        try:
            await asyncio.to_thread(publish_latest, self._store, newest)
        except (DistroMLError, OSError) as error:
            # LATEST is a convenience for people; the log is what recovery reads.
            _log.warning("LATEST of %s could not be updated: %s", job_id, error)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
