"""Rendezvous keys of present generations: where each rank of a run is to be met, whichever node it is on.

Ranks publish keys to their agent, agents carry them in their reports, and every agent hands its own ranks all that
it knows. Level-triggered like all reports: a key that was lost or came too early comes again with the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_KEYS = 4 * 1024
"""Keys kept of one generation; Gloo publishes one per rank."""

RunGeneration = tuple[str, int]
_GENERATION = re.compile(r"g([1-9][0-9]{0,17})/")


def generation_of(key: str) -> int | None:
    """The generation that a key belongs to; None where it is no rendezvous key."""
    found = _GENERATION.match(key)
    return int(found[1]) if found else None


def have_joined(keys: Mapping[str, bytes], generation: int, ranks: Iterable[int]) -> bool:
    """Whether each of these ranks has published where it is to be met (see ``worker.rendezvous``)."""
    return all(f"g{generation}/0/{rank}" in keys for rank in ranks)


class KeyExchange:
    """All keys known on this node."""

    def __init__(self) -> None:
        self._known: dict[RunGeneration, dict[str, bytes]] = {}

    def learn(self, run_id: str, generation: int, keys: Mapping[str, bytes]) -> bool:
        """Take keys; returns whether one of them was new."""
        known = self._known.setdefault((run_id, generation), {})
        new = {key: value for key, value in keys.items() if key not in known}
        room = MAX_KEYS - len(known)
        known.update(list(new.items())[:room])
        return bool(new) and room > 0

    def known(self, run_id: str, generation: int) -> Mapping[str, bytes]:
        """All keys of a generation."""
        return self._known.get((run_id, generation), {})

    def forget(self, present: Mapping[str, int]) -> None:
        """Keep what belongs to present generations or to next ones that this node has yet to learn of.

        Args:
            present: generation number of each run that has not ended.
        """
        self._known = {
            (run_id, generation): keys
            for (run_id, generation), keys in self._known.items()
            if generation >= present.get(run_id, generation + 1)
        }

    def __len__(self) -> int:
        return len(self._known)
