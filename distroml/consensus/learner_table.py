"""The learners that a node's links know, beside the peers of its settings.

A learner says in its hello where it listens; it is then dialed like any peer. It is forgotten once it has been away
for long, so the table stays small. Names are unique: a second living node of one name is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from distroml.consensus.frames import Address, Hello

MAX_LEARNERS: Final = 512
FORGET_S: Final = 600.0
"""A learner that has not been connected for this long is forgotten; it may come back as if it were new."""


class LearnerTable:
    """`connected` tells whether a learner has an established connection to this node now."""

    def __init__(self, connected: Callable[[str], bool]) -> None:
        self._connected = connected
        self._addresses: dict[str, Address] = {}
        self._seen_at: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._addresses

    def __len__(self) -> int:
        return len(self._addresses)

    def address(self, name: str) -> Address:
        """Raises KeyError for a name that is not in the table."""
        return self._addresses[name]

    def refusal(self, hello: Hello) -> str | None:
        """Why a learner is not let in, as a counter's name, or None."""
        try:
            address = Address.parse(hello.learner_at or "")
        except ValueError:
            return "learner_address"
        known = self._addresses.get(hello.name)
        if known is None:
            return "too_many_learners" if len(self._addresses) >= MAX_LEARNERS else None
        if known != address and self._connected(hello.name):
            return "name_taken"
        return None

    def enter(self, hello: Hello, now: float) -> bool:
        """Takes a learner in that has proved itself; True if it must be dialed anew."""
        address = Address.parse(hello.learner_at or "")
        changed = self._addresses.get(hello.name) != address
        self._addresses[hello.name] = address
        self._seen_at[hello.name] = now
        return changed

    def forgettable(self, now: float) -> list[str]:
        """Who has been away for `FORGET_S`; whoever is connected counts as seen now."""
        for name in self._addresses:
            if self._connected(name):
                self._seen_at[name] = now
        return [name for name, at in self._seen_at.items() if now - at > FORGET_S]

    def forget(self, name: str) -> None:
        self._addresses.pop(name, None)
        self._seen_at.pop(name, None)
