"""How a node comes into the cluster and leaves it: two commands in the log, and the waits around them."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from distroml.commands import RegisterNode, SetNodeStatus
from distroml.config import NodeConfig
from distroml.consensus.proposer import Proposer
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import NotLeader, Overloaded
from distroml.consensus.replica import Replica
from distroml.errors import ConfigError, TooManyRequests, Unavailable
from distroml.model import NodeStatus
from distroml.runtime.assignment import ranks_here, saves_here

FAREWELL_TIMEOUT_S = 2.0
"""How long a node that stops tries to tell the cluster before it just goes."""
MOVE_TIMEOUT_S = 5.0
"""How long a node that stops waits for its ranks to go on elsewhere, after a whole step."""
SAVE_TIMEOUT_S = 20.0
"""How much longer it waits where ranks save their state first, since nobody else has it."""
LEAVE_MARGIN_S = 1.0
LEAVE_LIMIT_S = MOVE_TIMEOUT_S + SAVE_TIMEOUT_S + 2 * FAREWELL_TIMEOUT_S + LEAVE_MARGIN_S
"""``Registration.leave`` has returned by then: all its waits, and what lies between them."""
REGISTER_TIMEOUT_S = 5.0
REGISTER_PAUSE_S = 0.05
"""Between two attempts to register while there is no leader."""

_log = logging.getLogger("distroml.node")


class Reincarnate(Exception):
    """The cluster knows a higher incarnation of this node than its data directory does."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the cluster has seen incarnation {at_least - 1}")
        self.at_least = at_least


class Registration:
    """What the cluster knows of this incarnation of the node."""

    def __init__(
        self,
        config: NodeConfig,
        incarnation: int,
        *,
        raft: RaftNode,
        replica: Replica,
        proposer: Proposer,
    ) -> None:
        self._config = config
        self._incarnation = incarnation
        self._raft = raft
        self._replica = replica
        self._proposer = proposer
        self._applied = asyncio.Event()
        self.done = False
        """Whether the cluster has taken this incarnation in."""

    async def register(self, workers_since: int = 0) -> None:
        """Tell the cluster of this incarnation; until then it gets no ranks and proposes nothing else.

        Args:
            workers_since: the incarnation that spawned workers which still run; 0: there are none.

        Raises:
            Reincarnate: the cluster has seen this incarnation, or a later one, before.
            ConfigError: the cluster is full.
        """
        command = RegisterNode(
            name=self._config.name,
            incarnation=self._incarnation,
            http=self._config.http_url,
            slots=self._config.slots,
            workers_since=workers_since,
        )
        fresh, told = False, ""
        while not self.done:
            try:
                fresh = fresh or await self._is_fresh()
                outcome = await self._proposer.propose(command, REGISTER_TIMEOUT_S)
            except (Unavailable, TooManyRequests, NotLeader, Overloaded, TimeoutError) as error:
                if str(error) != told:
                    told = str(error)
                    _log.info("not registered yet: %s", told or "no answer from the leader")
                await asyncio.sleep(REGISTER_PAUSE_S)
                continue
            if outcome.error == TooManyRequests.slug:
                raise ConfigError(f"The cluster does not take this node in: {outcome.detail}")
            if outcome.error:
                raise Reincarnate(max(self._known_incarnation(), self._incarnation) + 1)
            self.done = self._proposer.registered = True

    async def _is_fresh(self) -> bool:
        """Make sure that nobody has used this incarnation before.

        A node whose data directory was lost counts from 1 again. Were it to go on under the names of its former
        life, it would be given the outcomes of that life's proposals, and its reports would be taken for old ones.
        """
        await self._raft.read_index(REGISTER_TIMEOUT_S)
        if self._known_incarnation() >= self._incarnation:
            raise Reincarnate(self._known_incarnation() + 1)
        return True

    def _known_incarnation(self) -> int:
        state, name = self._replica.state, self._config.name
        seen, proposer = state.nodes.get(name), state.proposers.get(name)
        return max(seen.incarnation if seen else 0, proposer.incarnation if proposer else 0)

    def on_applied(self) -> None:
        """The state is another one than before."""
        self._applied.set()

    def superseded(self) -> str | None:
        """Why this process must end: another one has registered under its name."""
        known = self._known_incarnation()
        if not self.done or known <= self._incarnation:
            return None
        return (
            f"another process has registered as '{self._config.name}' (incarnation {known}); "
            "names must be unique, and only one process may run per name"
        )

    async def leave(self) -> None:
        """Wait until this node's ranks were moved, say goodbye, and see that none is left.

        The leader knows from the reports that this node stops. It moves its ranks where there is room, has
        those save their state whose state nobody else has, and ends their generation at once otherwise.
        """
        with contextlib.suppress(TimeoutError):
            await self._ranks_taken_away(MOVE_TIMEOUT_S)
        if saves_here(self._replica.state, self._config.name, self._incarnation):
            with contextlib.suppress(TimeoutError):
                await self._ranks_taken_away(SAVE_TIMEOUT_S)
        goodbye = SetNodeStatus(
            name=self._config.name,
            incarnation=self._incarnation,
            status=NodeStatus.LEFT,
            reason="stopped by request",
        )
        with contextlib.suppress(Unavailable, TooManyRequests, TimeoutError):
            await self._proposer.propose(goodbye, FAREWELL_TIMEOUT_S)
            await self._ranks_taken_away(FAREWELL_TIMEOUT_S)

    async def _ranks_taken_away(self, timeout_s: float) -> None:
        """Wait until the leader, who may be this very node, has taken all ranks from here.

        So generations end because this node left, not because its workers were killed.
        """
        async with asyncio.timeout(timeout_s):
            while ranks_here(self._replica.state, self._config.name, self._incarnation):
                self._applied.clear()
                await self._applied.wait()
