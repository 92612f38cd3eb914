"""Has the agent bring the files of a checkpoint to this node, before a rank reads them.

In the store ``local`` each file is on some nodes only. The question is repeated to an agent that comes back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from distroml.errors import StoreError
from distroml.model import Checkpoint
from distroml.reports import CHECKPOINT_ERRORS
from distroml.runtime.control import CheckpointHere, NeedCheckpoint

LOOK_S = 0.1
"""How often a rank that waits looks whether its generation is over."""


class Supply:
    """What this process waits for; for any thread.

    Args:
        send: queues a frame to the agent.
    """

    def __init__(self, send: Callable[[NeedCheckpoint], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._numbers = 0
        self._asked: dict[int, NeedCheckpoint] = {}
        self._answers: dict[int, CheckpointHere] = {}

    def standing(self) -> list[NeedCheckpoint]:
        """What an agent that has come back should hear again."""
        with self._changed:
            return list(self._asked.values())

    def need(
        self,
        checkpoint: Checkpoint,
        *,
        manifest_only: bool = False,
        mend: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Return when the files are here.

        Args:
            check: called now and then; what it raises ends the wait.

        Raises:
            CorruptCheckpoint: no node has a good copy of one of them.
            CheckpointAway: no node that can be reached has one.
            StoreError: they cannot be had for another reason.
        """
        with self._changed:
            self._numbers += 1
            need = NeedCheckpoint(
                number=self._numbers, checkpoint=checkpoint, manifest_only=manifest_only, mend=mend
            )
            self._asked[need.number] = need
        try:
            self._send(need)
            with self._changed:
                while need.number not in self._answers:
                    self._changed.wait(LOOK_S)
                    check()
                answer = self._answers[need.number]
        finally:
            with self._changed:
                del self._asked[need.number]
                self._answers.pop(need.number, None)
        if answer.problem:
            error = CHECKPOINT_ERRORS.get(answer.kind, StoreError)
            raise error(answer.problem, checkpoint_step=checkpoint.step)

    def take(self, answer: CheckpointHere) -> None:
        """The agent answered; called in the reading thread."""
        with self._changed:
            if answer.number in self._asked:
                self._answers[answer.number] = answer
                self._changed.notify_all()
