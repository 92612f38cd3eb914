"""What the agent last told this worker, where the control link's thread leaves it and the step loop finds it.

Orders are fenced by their generation: a newer one replaces an older one, and what came late changes nothing. An order
that cannot wait for a step boundary aborts the present group from here, which frees the step loop wherever it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from distroml.model import Checkpoint
from distroml.runtime.control import (
    Abort,
    Committed,
    Join,
    RendezvousKeys,
    Save,
    Stop,
    ToWorker,
    Vacate,
)
from distroml.runtime.worker.dist import MOVE, STOP, VACATE
from distroml.runtime.worker.process_group import RankGroup

MAX_EARLY_KEYS = 4096
"""Keys of generations that this worker has not been told of yet."""


class Orders:
    """Takes messages in the link's thread; everything else is for the main thread.

    Args:
        make_group: makes the (closed) group of a ``Join``, which can take keys from then on.
    """

    def __init__(self, make_group: Callable[[Join], RankGroup]) -> None:
        self._make_group = make_group
        self._changed = threading.Condition()
        self._next: tuple[Join, RankGroup] | None = None
        self._present: RankGroup | None = None
        self._over = 0
        """This generation and all before it are over."""
        self._newest = 0
        self._early_keys: dict[str, bytes] = {}
        self._stop = False
        self._leave = False
        self._save = (0, 0)
        """The newest request for a checkpoint: its generation and number."""
        self._vacated = 0
        """The newest generation that is to end with a checkpoint."""
        self.committed: Checkpoint | None = None
        """The newest good checkpoint of the log, as far as this worker has been told."""

    def take(self, message: ToWorker) -> None:
        """A message of the agent."""
        with self._changed:
            match message:
                case Join():
                    self._take_join(message)
                case Abort(generation=generation):
                    self._end(generation, f"the agent ended generation {generation}")
                case RendezvousKeys(keys=keys):
                    self._take_keys(keys)
                case Stop():
                    self._stop = True
                case Save(generation=generation, request=request):
                    self._save = max(self._save, (generation, request))
                case Vacate(generation=generation):
                    self._vacated = max(self._vacated, generation)
                case Committed(checkpoint=checkpoint):
                    self.committed = checkpoint
            self._changed.notify_all()

    def wait_for_join(self) -> tuple[Join, RankGroup]:
        """The next generation to be part of, once there is one that is not over."""
        with self._changed:
            self._present, self._leave = None, False
            self._changed.wait_for(lambda: self._next is not None)
            assert self._next is not None
            (join, group), self._next = self._next, None
            self._present = group
            return join, group

    def present(self) -> RankGroup | None:
        """The group that this worker is in, if it is in one; may be called from any thread."""
        return self._present

    @property
    def flags(self) -> int:
        """What this rank wishes for the next step boundary."""
        present = self._present
        vacated = present is not None and present.generation == self._vacated
        stop, move = STOP if self._stop else 0, MOVE if self._leave else 0
        return stop | move | (VACATE if vacated else 0)

    @property
    def save_request(self) -> int:
        """The newest request for a checkpoint that the present generation is to answer; 0: there is none."""
        generation, request = self._save
        present = self._present
        return request if present is not None and present.generation == generation else 0

    def _take_join(self, join: Join) -> None:
        if join.generation <= max(self._newest, self._over):
            return
        self._newest = join.generation
        self.committed = join.checkpoint
        group = self._make_group(join)
        group.store.feed(self._early_keys)
        self._early_keys = {}
        self._next = (join, group)
        if self._present is None:
            return
        if join.at_boundary:
            self._leave = True
        else:
            self._present.abort(f"generation {join.generation} follows")

    def _end(self, generation: int, reason: str) -> None:
        self._over = max(self._over, generation)
        if self._next is not None and self._next[0].generation <= generation:
            self._next = None
        if self._present is not None and self._present.generation <= generation:
            self._present.abort(reason)

    def _take_keys(self, keys: dict[str, bytes]) -> None:
        for group in (self._present, self._next[1] if self._next else None):
            if group is not None:
                group.store.feed(keys)
        room = MAX_EARLY_KEYS - len(self._early_keys)
        early = {k: v for k, v in keys.items() if _generation_of(k) > self._newest}
        self._early_keys |= dict(list(early.items())[:room])


def _generation_of(key: str) -> int:
    """Of a key such as ``g12/0/3``."""
    number = key.partition("/")[0].removeprefix("g")
    return int(number) if number.isdigit() else 0
