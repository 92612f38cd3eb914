"""The leader's loop: facts in, decisions of the pure functions out, proposed through the log.

Runs on every node and does nothing unless that node leads. It keeps nothing that a successor would miss: what it
remembers between turns (since when it sees what, which manifests it is writing) is rebuilt from reports and state.

A turn never waits. The decisions on one job or node are proposed in order, those on different ones side by side, so
that one slow proposal holds up nobody else. While they are under way that job or node gets no further decisions;
afterwards the next turn looks at what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec import Struct

from distroml.commands import AnyCommand, Outcome, RegisterNode, SetNodeStatus
from distroml.consensus.replica import Replica
from distroml.consensus.state import ClusterState
from distroml.errors import DistroMLError
from distroml.model import Event
from distroml.runtime.checkpoint.stores.opening import Stores
from distroml.runtime.committing import Committer
from distroml.runtime.decisions import Decision, WriteManifest
from distroml.runtime.facts import Facts, NodeFacts, Now, ReconcilerSettings, look
from distroml.runtime.failure_detector import DetectorSettings, Listening, assess
from distroml.runtime.look_ahead import with_next_generations
from distroml.runtime.observations import Observations
from distroml.runtime.queue_window import queue_window
from distroml.runtime.reconciler import reconcile, waiting_reasons

TURN_S = 0.1
"""Longest pause between two turns; reports and applied entries start one at once."""
PAUSE_PER_TURN = 3.0
"""Pause after a turn in parts of its own duration: with thousands of jobs, turns take a quarter of the loop at most."""
FREE_TURN_S = 0.01
"""Shorter turns need no pause: a recovery waits for the next one."""
MAX_PAUSE_S = 0.5
STALL_S = 1.0
"""A loop that stood still for longer has not listened: silence in that time proves nothing."""
PROPOSE_TIMEOUT_S = 5.0
MAX_UNDER_WAY = 256
"""Jobs and nodes with proposals under way; the others wait for the next turn."""
REFUSED_PAUSE_S = 0.5
"""How long a job or node is left alone after a proposal that failed or was refused, lest it be repeated at full speed."""
WAITING_AGE_S = 0.25
"""How old the reasons may be that clients are told for waiting jobs; more where they take long to find."""

_log = logging.getLogger(__name__)


class _Raft(Protocol):
    @property
    def is_leader(self) -> bool: ...
    @property
    def term(self) -> int: ...


class Propose(Protocol):
    """``Proposer.propose``."""

    def __call__(
        self, command: AnyCommand, timeout_s: float, *, term: int | None = None
    ) -> Awaitable[Outcome]: ...


class CoordinatorSettings(Struct, frozen=True, kw_only=True):
    """Thresholds of the pure functions."""

    detector: DetectorSettings = DetectorSettings()
    reconciler: ReconcilerSettings = ReconcilerSettings()


class Coordinator:
    """Leader-only duties: declare nodes lost, form generations, commit checkpoints, finish runs.

    Args:
        may_decide: False while this node, although it leads, can propose nothing yet.
        is_deleting: as of ``Committer``.
    """

    def __init__(
        self,
        *,
        node: str,
        raft: _Raft,
        replica: Replica,
        observations: Observations,
        propose: Propose,
        stores: Stores,
        settings: CoordinatorSettings,
        may_decide: Callable[[], bool] = lambda: True,
        is_deleting: Callable[[str], bool] = lambda directory: False,
    ) -> None:
        self._node = node
        self._raft = raft
        self._replica = replica
        self._observations = observations
        self._propose = propose
        self._settings = settings
        self._may_decide = may_decide
        self._kicked = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        """Runs from ``start`` to ``stop``."""
        self._background: set[asyncio.Task[None]] = set()
        self._committer = Committer(
            stores,
            state=lambda: replica.state,
            propose=propose,
            done=self.kick,
            is_deleting=is_deleting,
        )
        self._window: tuple[ClusterState, ClusterState] | None = None
        """A state and what turns look at of it."""
        self._facts: Facts | None = None
        self._watched: Facts | None = None
        self._waiting: dict[str, str] = {}
        self._waiting_until_s = float("-inf")
        self._under_way: set[str] = set()
        self._left_alone: dict[str, float] = {}
        """Until when (monotonic seconds) jobs and nodes get no proposals."""
        self._term = 0
        self._leader_since_s = 0.0
        self._awake_since_s = 0.0
        self.decisions: dict[str, int] = {}
        """Decisions taken by this node while it led, by command."""

    def start(self) -> None:
        """Begin the loop."""
        self.task = asyncio.create_task(self._run(), name="coordinator")

    async def stop(self) -> None:
        """End the loop; manifests that are being written are left to the next leader."""
        tasks = [task for task in (self.task, *self._background) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._committer.stop()

    def kick(self) -> None:
        """Something changed: take a turn soon."""
        self._kicked.set()

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Replica listener: the newest checkpoint is the ``LATEST`` of its run, also when a newer one was removed."""
        if not self._raft.is_leader:
            return
        for event in events:
            if event.job_id is not None and _moves_latest(event, self._replica.state):
                self._committer.committed(event.job_id)

    def waiting(self) -> dict[str, str]:
        """Why QUEUED and RECOVERING jobs do not go on, as this node sees it; any node may answer.

        Of a long queue those at its head have a reason.
        """
        now = Now(time.time(), time.monotonic())
        if now.monotonic_s >= self._waiting_until_s:
            before = self._facts or self._watched or Facts(nodes={})
            self._watched = self._look(before, now)
            self._waiting = waiting_reasons(
                self._seen_state(), self._watched, now, self._settings.reconciler
            )
            took_s = time.monotonic() - now.monotonic_s
            self._waiting_until_s = now.monotonic_s + WAITING_AGE_S + PAUSE_PER_TURN * took_s
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
            try:
                self._turn(Now(time.time(), now_s))
            except Exception:  # a defect in one turn must not end coordination
                _log.exception("a turn of the coordinator failed")
            last_s = time.monotonic()
            took_s = last_s - now_s
            if took_s > STALL_S:
                self._awake_since_s = last_s
            pause_s = PAUSE_PER_TURN * took_s if took_s > FREE_TURN_S else 0.0
            await asyncio.sleep(min(pause_s, MAX_PAUSE_S))

    def _turn(self, now: Now) -> None:
        if self._facts is not None and not (self._raft.is_leader and self._raft.term == self._term):
            self._step_down()
        if not self._raft.is_leader or not self._may_decide():
            return
        if self._facts is None:
            self._term = self._raft.term
            self._leader_since_s = now.monotonic_s
            _log.info("%s coordinates now (term %d)", self._node, self._term)
        self._facts = self._look(self._facts, now)
        state, settings = self._seen_state(), self._settings.reconciler
        decisions = reconcile(state, self._facts, now, settings)
        decisions = with_next_generations(state, self._facts, now, settings, decisions)
        self._carry_out(decisions, now.monotonic_s)

    def _seen_state(self) -> ClusterState:
        state = self._replica.state
        if self._window is None or self._window[0] is not state:
            self._window = (state, queue_window(state))
        return self._window[1]

    def _look(self, before: Facts | None, now: Now) -> Facts:
        state = self._seen_state()
        registered = {name: node.incarnation for name, node in state.nodes.items()}
        observed = self._observations.observations(registered)
        verdicts = assess(
            observed.values(),
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
                connected=observed[name].connected,
                heard_at=now.wall_s - self._observations.age_s(name, now.monotonic_s),
            )
            for name, verdict in verdicts.items()
        }
        return look(
            before,
            state,
            nodes,
            now,
            writing=self._committer.writing,
            write_failures=self._committer.failures,
        )

    # --- decisions ---

    def _carry_out(self, decisions: Sequence[Decision], now_s: float) -> None:
        """Start what was decided, in order per job and node."""
        proposals: dict[str, list[list[tuple[AnyCommand, str]]]] = {}
        for decision in decisions:
            action = decision.action
            if isinstance(action, WriteManifest):
                self._committer.commit(action)
            else:
                chain = proposals.setdefault(_subject(action), [])
                if not (decision.together and chain):
                    chain.append([])
                chain[-1].append((action, decision.reason))
        self._left_alone = {one: at for one, at in self._left_alone.items() if at > now_s}
        for subject, chain in proposals.items():
            if subject in self._under_way or subject in self._left_alone:
                continue
            if len(self._under_way) >= MAX_UNDER_WAY:
                break
            self._under_way.add(subject)
            self._start(self._propose_chain(subject, chain, self._term))

    async def _propose_chain(
        self, subject: str, chain: Sequence[Sequence[tuple[AnyCommand, str]]], term: int
    ) -> None:
        try:
            for together in chain:
                # In this order: a task begins with what it does until it waits, which is to hand the entry over.
                proposing = [self._propose_one(subject, *one, term) for one in together]
                for outcome in await asyncio.gather(*proposing, return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
        except DistroMLError as error:
            _log.warning("%s: a decision could not be proposed: %s", subject, error)
            self._leave_alone(subject)
        except Exception:
            _log.exception("%s: a decision could not be proposed", subject)
            self._leave_alone(subject)
        finally:
            self._under_way.discard(subject)
            self.kick()

    async def _propose_one(self, subject: str, command: AnyCommand, reason: str, term: int) -> None:
        name = type(command).__name__
        self.decisions[name] = self.decisions.get(name, 0) + 1
        _log.info("%s: %s: %s", subject, name, reason)
        # With the term: what this leader saw must not be handed to a successor who may see otherwise.
        outcome = await self._propose(command, PROPOSE_TIMEOUT_S, term=term)
        if outcome.error:
            _log.warning("%s: %s was refused: %s", subject, name, outcome.detail or outcome.error)
            self._leave_alone(subject)

    def _leave_alone(self, subject: str) -> None:
        self._left_alone[subject] = time.monotonic() + REFUSED_PAUSE_S

    def _step_down(self) -> None:
        _log.info("%s no longer coordinates", self._node)
        self._facts = None
        self._left_alone.clear()
        self._committer.forget_failures()

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _moves_latest(event: Event, state: ClusterState) -> bool:
    if event.type != "checkpoint_retired":
        return event.type == "checkpoint"
    newest = state.jobs[event.job_id].newest_checkpoint() if event.job_id in state.jobs else None
    return newest is not None and event.data.get("step", 0) > newest.step


def _subject(command: AnyCommand) -> str:
    """What a decision is about; decisions on one subject are carried out in order."""
    if isinstance(command, SetNodeStatus | RegisterNode):
        return f"node {command.name}"
    return f"job {command.job_id}"
