"""Leadership handed over on request (Raft dissertation, 3.10), asked for at any node.

The asking node repeats its request to whoever leads until it sees another leader or runs out of time. The leader itself
gives a successor up that does not take over (`raft_core.TRANSFER_LIMIT_S`), so nobody has to take a request back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from distroml.consensus.frames import Channel
from distroml.consensus.messages import TransferRequest, encode
from distroml.consensus.raft_core import RaftCore
from distroml.consensus.raft_types import NotLeader

ASK_AGAIN_S: Final = 0.25


class _Links(Protocol):
    def send(self, peer: str, channel: Channel, body: bytes) -> bool: ...


class _Node(Protocol):
    @property
    def core(self) -> RaftCore: ...
    @property
    def leader(self) -> str | None: ...
    @property
    def is_leader(self) -> bool: ...


class Handover:
    """`post` runs an action at the start of the node's next turn."""

    def __init__(
        self, node: _Node, links: _Links, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._node, self._links, self._post = node, links, post
        self._waiters: set[asyncio.Future[None]] = set()

    def on_role_change(self) -> None:
        """Whoever waits looks again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def run(self, target: str | None, timeout_s: float) -> str | None:
        """The new leader, or None where it did not change in time. Raises NotLeader where none is known."""
        before: str | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    leader = self._node.leader
                    before = before or leader
                    if leader is not None and (leader == target if target else leader != before):
                        return leader
                    if leader is not None and not await self._ask(target, leader):
                        return None
                    await self._role_change()
        except TimeoutError:
            self._post(self._node.core.cancel_transfer)
            if before is None:
                raise NotLeader(None) from None
            return None

    async def _ask(self, target: str | None, leader: str) -> bool:
        """False where this node leads and nobody is there to take over."""
        if not self._node.is_leader:
            self._links.send(leader, Channel.RAFT, encode(TransferRequest(target)))
            return True
        begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._post(partial(self._begin, target, begun))
        return await begun

    def _begin(self, target: str | None, begun: asyncio.Future[bool]) -> None:
        core = self._node.core
        try:
            possible = core.handing_over or core.transfer(target) is not None
        except NotLeader:
            possible = True  # it has just changed, which the caller is about to see
        if not begun.done():
            begun.set_result(possible)

    async def _role_change(self) -> None:
        """Waits for a change, or until it is time to ask again."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait((waiter,), timeout=ASK_AGAIN_S)
        finally:
            self._waiters.discard(waiter)
