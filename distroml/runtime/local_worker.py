"""One worker process of this node: what is known of it, from its spawn to the last line of its log.

Takes the worker's messages into its ``WorkerFact`` and bounds what a worker (the user's code runs in it) can put
there; the supervisor decides what follows.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from distroml.model import FailureKind
from distroml.reports import WorkerFact, WorkerFailure, WorkerOutcome, WorkerPhase
from distroml.runtime import control
from distroml.runtime.control import FromWorker
from distroml.runtime.log_tail import LogTail
from distroml.runtime.worker_server import WorkerLink

MAX_SHARDS = 64
"""Durable shards that a fact carries, the newest ones; the coordinator needs those of a few steps at most."""
MAX_ABANDONED = 4
"""Abandoned checkpoint steps that a fact carries."""
MAX_REASON_CHARS = 400
MAX_RENDEZVOUS_BYTES = 1024 * 1024
"""Keys and values that one rank may publish; Gloo's take about 150 bytes per other rank."""
MAX_OUTCOME_METRICS = 64
MAX_METRIC_NAME_CHARS = 128


class Misbehaved(Exception):
    """A worker sent what no correct one does."""


class LocalWorker:
    """One worker process and its story.

    Args:
        now_s: monotonic seconds at its spawn.
    """

    def __init__(self, fact: WorkerFact, log_path: Path, now_s: float) -> None:
        self.fact = fact
        self.tail = LogTail(log_path)
        self.spawned_s = now_s
        self.link: WorkerLink | None = None
        self.said_hello = False
        self.stop_sent = False
        self.killed_at_s: float | None = None
        self.exit_code: int | None = None
        """Set once the process is gone; its last frames may still be on their way."""
        self.excuse = ""
        """Why it ended, where the agent knows and the worker itself could not say."""
        self.patience_ends_s: float | None = None
        """When the supervisor stops waiting for what should follow (last frames, or the exit)."""
        self._keys_sent: set[str] = set()

    @property
    def alive(self) -> bool:
        """Until the end was settled."""
        return self.fact.ended_at is None

    @property
    def killable(self) -> bool:
        """Whether its pid still names its process group: known, and not reaped as far as this agent knows."""
        return self.alive and self.fact.pid is not None and self.exit_code is None

    def update(self, **changes: object) -> None:
        """Change the fact."""
        self.fact = msgspec.structs.replace(self.fact, **changes)

    # --- what it says ---

    def take(self, message: FromWorker) -> bool:
        """Take a message; returns whether others should hear of it soon.

        Raises:
            Misbehaved: it is out of all bounds.
        """
        match message:
            case control.Progress():
                return self._on_progress(message)
            case control.Rendezvous(key=key, value=value):
                keys = {**self.fact.rendezvous, key: value}
                if sum(len(k) + len(v) for k, v in keys.items()) > MAX_RENDEZVOUS_BYTES:
                    raise Misbehaved(
                        f"its rendezvous keys take more than {MAX_RENDEZVOUS_BYTES} bytes"
                    )
                self.update(rendezvous=keys)
            case control.ShardDurable(shard=shard):
                self.update(shards=(*self.fact.shards, shard)[-MAX_SHARDS:])
            case control.ShardAbandoned(step=step, reason=reason):
                told = (step, reason[:MAX_REASON_CHARS])
                self.update(abandoned=(*self.fact.abandoned, told)[-MAX_ABANDONED:])
            case control.Failed(failure=failure, step=step):
                self.update(phase=WorkerPhase.FAILED, failure=failure, step=step)
            case control.Finished(outcome=outcome):
                bounded = _bounded(outcome)
                self.update(phase=WorkerPhase.FINISHED, outcome=bounded, step=outcome.step)
            case control.Hello() | control.Arrive():
                return False
        return True

    def _on_progress(self, message: control.Progress) -> bool:
        entered = message.phase is not self.fact.phase
        self.update(
            phase=message.phase,
            step=message.step,
            epoch=message.epoch,
            total_steps=message.total_steps or self.fact.total_steps,
            rendezvous={} if message.phase is WorkerPhase.TRAINING else self.fact.rendezvous,
        )
        return entered

    # --- what it is told ---

    def send_keys(self, keys: Mapping[str, bytes]) -> None:
        """Pass on rendezvous keys that it does not have yet."""
        new = {
            key: value
            for key, value in keys.items()
            if key not in self._keys_sent and key not in self.fact.rendezvous
        }
        if new and self.link is not None:
            self.link.send(control.RendezvousKeys(keys=new))
            self._keys_sent.update(new)

    def send_stop(self) -> None:
        """Ask it, once, to stop at a step boundary."""
        if self.link is not None and not self.stop_sent:
            self.stop_sent = True
            self.link.send(control.Stop())

    def forget_shards(self, committed: Collection[int]) -> None:
        """Shards of committed steps need not be reported any more."""
        kept = tuple(shard for shard in self.fact.shards if shard.step not in committed)
        if kept != self.fact.shards:
            self.update(shards=kept)

    # --- its end ---

    def settle_end(self) -> None:
        """The process is gone and all that it said was taken: the fact's last word."""
        fact = self.fact
        failure = fact.failure
        if failure is None and fact.outcome is None and self.excuse:
            failure = failure_of(self.excuse)
        phase = WorkerPhase.EXITED
        if fact.outcome is not None:
            phase = WorkerPhase.FINISHED
        elif failure is not None:
            phase = WorkerPhase.FAILED
        self.link = None
        self.update(
            phase=phase,
            exit_code=self.exit_code,
            failure=failure,
            ended_at=time.time(),
            last_lines=self.tail.last_lines,
            rendezvous={},
        )


def failure_of(error: str) -> WorkerFailure:
    """An error that the agent reports in the place of a worker."""
    return WorkerFailure(kind=FailureKind.ERROR, error=error, traceback="", at=time.time())


def _bounded(outcome: WorkerOutcome) -> WorkerOutcome:
    """The outcome enters the log, and its metrics come from the user's code."""
    metrics = {
        name[:MAX_METRIC_NAME_CHARS]: outcome.metrics[name]
        for name in sorted(outcome.metrics)[:MAX_OUTCOME_METRICS]
    }
    return msgspec.structs.replace(outcome, metrics=metrics)
