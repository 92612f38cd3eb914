"""Who waits for a linearizable read on this node, and for what.

A read first waits for its read index (from the core), then until this node has applied that far.
"""

from __future__ import annotations

import asyncio
import random
from itertools import count
from typing import Final

from distroml.consensus.raft_types import NotLeader

_TOKEN_BITS: Final = 60


class ReadBarriers:
    def __init__(self, rng: random.Random) -> None:
        # A leader may still hold a read of this node's last life, whose index is too low for one of this life.
        self._tokens = count(rng.getrandbits(_TOKEN_BITS))
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._waiting: list[tuple[int, asyncio.Future[int]]] = []

    def ask(self) -> tuple[int, asyncio.Future[int]]:
        """A new read: the token to give to the core, and what to await."""
        token = next(self._tokens)
        answer = self._asked[token] = asyncio.get_running_loop().create_future()
        return token, answer

    def forget(self, token: int) -> bool:
        """Whether the core was still to answer this read."""
        return self._asked.pop(token, None) is not None

    def confirm(self, answers: list[tuple[int, int]], leader: str | None) -> None:
        """Takes (token, index) from the core; index 0 means that nobody could confirm."""
        for token, index in answers:
            answer = self._asked.pop(token, None)
            if answer is None or answer.done():
                continue
            if index:
                self._waiting.append((index, answer))
            else:
                answer.set_exception(NotLeader(leader))

    def release(self, applied_index: int) -> None:
        """Ends the reads whose index has been applied."""
        if not self._waiting:
            return
        waiting = []
        for index, answer in self._waiting:
            if answer.done():
                continue
            if index > applied_index:
                waiting.append((index, answer))
            else:
                answer.set_result(index)
        self._waiting = waiting

    def refuse_all(self) -> None:
        """This node can confirm nothing any more."""
        answers = [*self._asked.values(), *(answer for _, answer in self._waiting)]
        self._asked.clear()
        self._waiting.clear()
        for answer in answers:
            if not answer.done():
                answer.set_exception(NotLeader(None))
