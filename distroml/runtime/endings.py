"""How workers of this node end: those that exit, those that are killed, and those for which nobody waits any longer.

An exit is settled only when the worker's socket has been read to its end, or patience has. Whoever is to go is
killed with all that it started, for as long as the forkserver has not reported it reaped. The supervisor decides
who is to go, and converges again whenever an end was ``settled``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable

from distroml.reports import WorkerPhase
from distroml.runtime.control import PULSE_S
from distroml.runtime.local_worker import LocalWorker, failure_of
from distroml.runtime.process_state import is_stopped
from distroml.runtime.roster import Roster
from distroml.runtime.spawner import WorkerId
from distroml.runtime.worker_output import WorkerOutput

KILL_AGAIN_S = 2.0
LAST_FRAMES_S = 2.0
"""How long the last frames of a worker that exited may take to be read."""
LATE_HELLO_S = 0.3
"""How long a worker that exited by itself without a word may turn out to have connected."""
LINK_LOST_S = 2.0
"""How long a worker may live on without its control connection; it would train, but nobody could tell."""
SPAWN_TIMEOUT_S = 120.0
"""A forkserver that has not answered a spawn for this long hangs: it is replaced, and its workers with it."""
_WITHOUT_LINK = "it has no control connection and went on running"

_log = logging.getLogger(__name__)


class Endings:
    """Ends workers, and settles the ends of those that are gone.

    Args:
        settled: called after an end was settled, with which what is wanted of others may change.
        changed: called after every other change of a worker's fact.
        replace_spawner: called with the reason when the forkserver hangs.
        monotonic: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        roster: Roster,
        output: WorkerOutput,
        *,
        settled: Callable[[], None],
        changed: Callable[[], None],
        replace_spawner: Callable[[str], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._roster = roster
        self._workers = roster.workers
        self._output = output
        self._settled = settled
        self._changed = changed
        self._replace_spawner = replace_spawner
        self._monotonic = monotonic

    # --- ended by the agent ---

    def retire(self, worker: WorkerId) -> None:
        """A worker that is not wanted: killed if it lives, forgotten once it is gone."""
        local = self._workers[worker]
        if not local.alive:
            del self._workers[worker]
            self._changed()
            return
        # One that has no pid yet is killed when it gets it: the supervisor converges then.
        self.kill(local)

    def kill(self, local: LocalWorker) -> None:
        """SIGKILL, again after a while if need be."""
        now_s = self._monotonic()
        if not local.killable:
            return
        if local.killed_at_s is not None and now_s - local.killed_at_s < KILL_AGAIN_S:
            return
        local.killed_at_s = now_s
        kill_group(local.fact.pid)

    def give_up(self, local: LocalWorker, error: str) -> None:
        """End a worker that cannot be worked with, and say why in its place."""
        if local.fact.failure is None and local.fact.outcome is None:
            local.update(failure=failure_of(error), phase=WorkerPhase.FAILED)
            self._changed()
        self.kill(local)

    # --- ended ---

    def not_started(self, local: LocalWorker, why: object) -> None:
        """A worker that could not be forked."""
        local.excuse = f"the worker could not be started: {why}"
        self._end(local, exit_code=1)

    def gone(self, local: LocalWorker, exit_code: int) -> None:
        """The process is gone; settle it once its last frames were read."""
        local.exit_code = exit_code
        if local.link is not None:
            local.patience_ends_s = self._monotonic() + LAST_FRAMES_S
        elif not local.said_hello and exit_code >= 0:
            local.patience_ends_s = self._monotonic() + LATE_HELLO_S
        else:
            self._end(local)

    def all_gone(self) -> None:
        """The forkserver is gone, and with it all workers."""
        self._roster.all_ended()
        for local in list(self._workers.values()):
            if local.alive and local.exit_code is None:
                if local.fact.pid is not None:
                    kill_group(local.fact.pid)  # what the worker itself has started
                local.excuse = "the forkserver of its node ended, and all workers there with it"
                self.gone(local, -signal.SIGKILL)
        self._changed()

    def connected(self, local: LocalWorker) -> None:
        """It has a control connection, if need be for its last frames only."""
        local.patience_ends_s = None
        if local.exit_code is not None:
            local.patience_ends_s = self._monotonic() + LAST_FRAMES_S

    def disconnected(self, local: LocalWorker, reason: str) -> None:
        """It has none any more, because it closed it or because of ``reason``."""
        if local.exit_code is not None:
            self._end(local)
        elif local.alive:
            if reason:
                self.give_up(local, f"its control connection was closed: {reason}")
            local.patience_ends_s = self._monotonic() + LINK_LOST_S

    def _end(self, local: LocalWorker, *, exit_code: int | None = None) -> None:
        local.exit_code = local.exit_code if exit_code is None else exit_code
        self._output.ship_log(local, final=True)
        local.settle_end()
        self._settled()

    # --- patience ---

    def tend(self) -> None:
        """Read the logs, and stop waiting for what should long have happened."""
        now_s = self._monotonic()
        for worker, local in list(self._workers.items()):
            try:
                self._tend(local, now_s)
            except Exception:  # one worker's trouble must not keep the others unwatched
                _log.exception("worker %s could not be tended", worker)

    def _tend(self, local: LocalWorker, now_s: float) -> None:
        if not local.alive:
            return
        self._output.ship_log(local)
        silent = now_s - local.heard_s > 2 * PULSE_S
        local.stopped_at(
            now_s if silent and local.fact.pid and is_stopped(local.fact.pid) else None
        )
        if local.patience_ends_s is not None and now_s >= local.patience_ends_s:
            if local.exit_code is not None:
                self._end(local)
            else:
                self.give_up(local, _WITHOUT_LINK)
        unanswered = local.fact.pid is None and local.exit_code is None
        if local.alive and unanswered and now_s - local.spawned_s >= SPAWN_TIMEOUT_S:
            self._replace_spawner(f"a spawn was not answered for {SPAWN_TIMEOUT_S:g} s")


def kill_group(pid: int | None) -> None:
    """SIGKILL to a worker and what it started. Only for a pid that the forkserver has not reported reaped."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
