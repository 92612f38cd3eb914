"""One worker process of this node: what is known of it, from its spawn to the last line of its log.

Takes the worker's messages into its ``WorkerFact`` and bounds what a worker (the user's code runs in it) can put
there; the supervisor decides what follows.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from distroml.model import Checkpoint, FailureKind
from distroml.reports import Former, Marks, WorkerFact, WorkerFailure, WorkerOutcome, WorkerPhase
from distroml.runtime import control
from distroml.runtime.assignment import Process
from distroml.runtime.control import (
    MAX_METRIC_NAME_CHARS,
    MAX_METRIC_NAMES,
    FromWorker,
    Join,
)
from distroml.runtime.key_exchange import generation_of
from distroml.runtime.log_tail import LogTail
from distroml.runtime.worker_server import WorkerLink

MAX_SHARDS = 64
"""Durable shards that a fact carries, the newest ones; the coordinator needs those of a few steps at most."""
MAX_ABANDONED = 4
"""Abandoned checkpoint steps that a fact carries."""
MAX_REASON_CHARS = 400
KEPT_RANKS = 4
"""Generations whose rank is remembered: a worker's last metrics of one may come late."""
MAX_RENDEZVOUS_BYTES = 1024 * 1024
"""Keys and values that one rank may publish; Gloo's take about 150 bytes per other rank."""


class Misbehaved(Exception):
    """A worker sent what no correct one does."""


class LocalWorker:
    """One worker process and its story.

    Args:
        now_s: monotonic seconds at its spawn.
        join: what it was spawned to become; None for a spare.
        from_end: what is in its log already was read by an earlier agent.
    """

    def __init__(
        self,
        fact: WorkerFact,
        log_path: Path,
        now_s: float,
        join: Join | None = None,
        *,
        from_end: bool = False,
    ) -> None:
        self.fact = fact
        self.tail = LogTail(log_path, from_end=from_end)
        self.spawned_s = now_s
        self.link: WorkerLink | None = None
        self.said_hello = False
        self.adopted = False
        """Whether an earlier agent spawned it."""
        self.stop_sent = False
        self._vacated = 0
        """The generation that it was last asked to end with a checkpoint."""
        self.killed_at_s: float | None = None
        self.exit_code: int | None = None
        """Set once the process is gone; its last frames may still be on their way."""
        self.excuse = ""
        """Why it ended, where the agent knows and the worker itself could not say."""
        self.patience_ends_s: float | None = None
        """When the supervisor stops waiting for what should follow (last frames, or the exit)."""
        self.heard_s = now_s
        """When it last said anything."""
        self.stopped_since_s: float | None = None
        """Since when its process was seen to be stopped."""
        self.stale_frames = 0
        """Frames of another generation than those that it may speak for."""
        self._told = join
        self._leaving: int | None = None
        """The generation that its run leaves by the planned change for which it was told to join."""
        self._told_committed = join.checkpoint if join else None
        self._ranks = {fact.generation: fact.rank}
        self._aborted = 0
        self._save_sent = (0, 0)
        self._keys_sent: set[str] = set()

    @property
    def is_stranger(self) -> bool:
        """An earlier agent spawned it, and it has yet to say where it stands."""
        return self.adopted and not self.said_hello and self.alive

    def introduce(self, hello: control.Hello) -> None:
        """A worker that an earlier agent spawned says where it stands."""
        if hello.generation > 0:
            self._told = Join(
                generation=hello.generation,
                rank=hello.rank,
                local_rank=0,
                world_size=0,
                checkpoint=None,
            )
        self._ranks = {hello.generation: hello.rank}
        phase = WorkerPhase.CONNECTING if hello.generation > 0 else WorkerPhase.SPARE
        self.update(generation=hello.generation, rank=hello.rank, step=hello.step, phase=phase)

    @property
    def alive(self) -> bool:
        """Until the end was settled."""
        return self.fact.ended_at is None

    @property
    def killable(self) -> bool:
        """Whether its pid still names its process group: known, and not reaped as far as this agent knows."""
        return self.alive and self.fact.pid is not None and self.exit_code is None

    @property
    def told(self) -> int:
        """Generation that it was told to join last; 0 for a spare."""
        return self._told.generation if self._told else 0

    @property
    def process(self) -> Process:
        """What the assignment needs to know of it."""
        fact, told = self.fact, self._told
        ending = self.exit_code is not None or self.killed_at_s is not None
        return Process(
            worker=fact.worker,
            told=self.told,
            rank=told.rank if told else fact.rank,
            joined=fact.generation,
            ranks=dict(self._ranks),
            phase=fact.phase,
            alive=self.alive,
            usable=self.alive and not ending and fact.failure is None and fact.outcome is None,
        )

    def observed(self, now_s: float) -> WorkerFact:
        """The fact with what only time tells."""
        if not self.alive:
            return self.fact
        stopped = 0.0 if self.stopped_since_s is None else now_s - self.stopped_since_s
        return msgspec.structs.replace(self.fact, silent_s=now_s - self.heard_s, stopped_s=stopped)

    def stopped_at(self, now_s: float | None) -> None:
        """Its process was seen to be stopped; None: it runs, or is thought to."""
        if now_s is None or self.stopped_since_s is None:
            self.stopped_since_s = now_s

    def rank_in(self, generation: int) -> int | None:
        """Which rank it had, or has, in one of its last generations."""
        return self._ranks.get(generation)

    def update(self, **changes: object) -> None:
        """Change the fact."""
        self.fact = msgspec.structs.replace(self.fact, **changes)

    # --- what it says ---

    def take(self, message: FromWorker) -> bool:
        """Take a message; returns whether others should hear of it soon.

        What is of another generation than the one that it is in, or was told to join, is counted and dropped.

        Raises:
            Misbehaved: it is out of all bounds.
        """
        generation = generation_in(message)
        former = self.fact.former
        if former is not None and generation == former.generation:
            return self._on_late_shard(former, message)
        if generation is not None and generation != self.fact.generation:
            if self._told is None or generation != self._told.generation:
                self.stale_frames += 1
                return False
            self._enter(self._told)
        match message:
            case control.Progress():
                return self._on_progress(message)
            case control.Parked():
                return self._on_parked(message)
            case control.Rendezvous(key=key, value=value):
                keys = {**self.fact.rendezvous, key: value}
                if sum(len(k) + len(v) for k, v in keys.items()) > MAX_RENDEZVOUS_BYTES:
                    raise Misbehaved(
                        f"its rendezvous keys take more than {MAX_RENDEZVOUS_BYTES} bytes"
                    )
                self.update(rendezvous=keys)
            case control.ShardDurable() | control.ShardAbandoned():
                self.update(**_saved(self.fact, message))
            case control.Failed(failure=failure, step=step):
                self.update(phase=WorkerPhase.FAILED, failure=failure, step=step)
            case control.Finished(outcome=outcome):
                bounded = _bounded(outcome)
                self.update(phase=WorkerPhase.FINISHED, outcome=bounded, step=outcome.step)
            case control.Hello() | control.Arrive() | control.NeedCheckpoint():
                return False
        return True

    def _on_late_shard(self, former: Former, message: FromWorker) -> bool:
        """What it began to save before a planned change; all else of that generation is stale."""
        if not isinstance(message, control.ShardDurable | control.ShardAbandoned):
            self.stale_frames += 1
            return False
        self.update(former=msgspec.structs.replace(former, **_saved(former, message)))
        return True

    def begin_copying(self, step: int) -> None:
        """Its shard of a checkpoint is durable on this node; others are to have it before it counts."""
        self.update(copying=(*self.fact.copying, step))

    def end_copying(
        self, step: int, message: control.ShardDurable | control.ShardAbandoned
    ) -> None:
        """Other nodes have the shard too, or it is given up; the worker itself may have ended, or moved on."""
        fact = self.fact
        left = list(fact.copying)
        if step in left:
            left.remove(step)
        self.update(copying=tuple(left))
        former = fact.former
        if message.generation == fact.generation:
            self.update(**_saved(fact, message))
        elif former is not None and message.generation == former.generation:
            self._on_late_shard(former, message)
        else:
            self.stale_frames += 1

    def _on_progress(self, message: control.Progress) -> bool:
        fact = self.fact
        if fact.phase is WorkerPhase.PARKED:
            return False  # where it was when it left, said once more: it lives
        entered = message.phase is not fact.phase
        at_work = message.phase is WorkerPhase.TRAINING
        stepped = message.step != fact.step or (entered and at_work)
        self.update(
            phase=message.phase,
            step=message.step,
            epoch=message.epoch,
            total_steps=message.total_steps or fact.total_steps,
            rendezvous={} if at_work else fact.rendezvous,
            marks=message.marks or fact.marks,
            timing=message.timing or fact.timing,
            waiting_s=message.waiting_s,
            evaluating=message.evaluating,
            step_at=time.time() if stepped else fact.step_at,
        )
        return entered or message.marks is not None

    def _on_parked(self, message: control.Parked) -> bool:
        fact = self.fact
        step = max(fact.step, message.step)
        self.update(has_state=fact.has_state or message.has_state)
        if message.generation == fact.generation:
            self.update(
                phase=WorkerPhase.PARKED,
                step=step,
                parked_at=message.at,
                parked_reason=message.reason[:MAX_REASON_CHARS],
                bereft=message.bereft,
                rendezvous={},
                waiting_s=0.0,
            )
            return True
        if fact.marks.left_at is None:
            marks = msgspec.structs.replace(fact.marks, left_at=message.at)
            self.update(step=step, marks=marks)
        return False

    def _enter(self, join: Join) -> None:
        """It belongs to another generation now; nothing that it said of the former one counts any more."""
        self._keys_sent.clear()
        self._ranks[join.generation] = join.rank
        while len(self._ranks) > KEPT_RANKS:
            del self._ranks[next(iter(self._ranks))]
        self.update(
            generation=join.generation,
            rank=join.rank,
            former=self.fact.former_of(self._leaving),
            phase=WorkerPhase.CONNECTING,
            marks=Marks(left_at=self.fact.parked_at),
            timing=None,
            parked_at=None,
            parked_reason="",
            bereft=False,
            shards=(),
            abandoned=(),
            rendezvous={},
            waiting_s=0.0,
        )

    # --- what it is told ---

    def tell(self, join: Join, *, leaving: int | None = None) -> bool:
        """Have it become that rank of that generation, unless it is so already; returns whether it was told now.

        One that has done its last step is told nothing: its outcome is that of the generation which it was in.

        Args:
            leaving: the generation that the run leaves by a planned change; what it saved there still counts.
        """
        told = self._told
        if self.fact.outcome is not None:
            return False
        if (self.fact.generation, self.fact.rank) == (join.generation, join.rank):
            return False
        known = told and (told.generation, told.rank, told.at_boundary)
        if self.link is None or known == (join.generation, join.rank, join.at_boundary):
            return False
        if known and told and told.generation == join.generation:
            # It was to leave after a whole step, and has left for a generation that is over as well.
            self.link.send(control.Abort(generation=join.generation - 1))
        self._told, self._told_committed = join, join.checkpoint
        self._leaving = leaving
        self.link.send(join)
        if not join.at_boundary:
            self._enter(join)
        return True

    def abort(self) -> None:
        """Have it leave the collectives of all that it was told to join, once."""
        told = max(self.told, self.fact.generation)
        parked = self.fact.phase is WorkerPhase.PARKED and self.told == self.fact.generation
        if self.link is not None and self._aborted < told and not parked:
            self._aborted = told
            self.link.send(control.Abort(generation=told))

    def send_keys(self, keys: Mapping[str, bytes]) -> None:
        """Pass on rendezvous keys that it does not have yet, of the generation that it was told to join."""
        new = {
            key: value
            for key, value in keys.items()
            if key not in self._keys_sent and key not in self.fact.rendezvous
        }
        if new and self.link is not None:
            self.link.send(control.RendezvousKeys(keys=new))
            self._keys_sent.update(new)

    def tell_committed(self, checkpoint: Checkpoint | None) -> None:
        """Have it know the newest good checkpoint of its run, unless it does."""
        if self.link is not None and self._told_committed != checkpoint:
            self._told_committed = checkpoint
            self.link.send(control.Committed(checkpoint=checkpoint))

    def send_stop(self) -> None:
        """Ask it, once, to stop at a step boundary."""
        if self.link is not None and not self.stop_sent:
            self.stop_sent = True
            self.link.send(control.Stop())

    def send_save(self, request: int) -> None:
        """Ask it, once per generation, to save a checkpoint."""
        asked = (self.fact.generation, request)
        if self.link is not None and self._save_sent < asked:
            self._save_sent = asked
            self.link.send(control.Save(generation=self.fact.generation, request=request))

    def send_vacate(self, generation: int) -> None:
        """Ask it, once, to end its generation with a checkpoint."""
        if self.link is not None and self._vacated < generation:
            self._vacated = generation
            self.link.send(control.Vacate(generation=generation))

    def forget_shards(self, committed: Collection[int]) -> None:
        """Shards of committed steps need not be reported any more."""
        kept = tuple(shard for shard in self.fact.shards if shard.step not in committed)
        if kept != self.fact.shards:
            self.update(shards=kept)
        former = self.fact.former
        if former is not None and any(shard.step in committed for shard in former.shards):
            left = tuple(shard for shard in former.shards if shard.step not in committed)
            self.update(former=msgspec.structs.replace(former, shards=left))

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


def generation_in(message: FromWorker) -> int | None:
    """The generation that a message is about; None for one that is taken whatever it says.

    Raises:
        Misbehaved: a rendezvous key names no generation.
    """
    match message:
        case control.Rendezvous(key=key):
            generation = generation_of(key)
            if generation is None:
                raise Misbehaved(f"its rendezvous key '{key[:80]}' names no generation")
            return generation
        case control.Hello() | control.Parked() | control.Failed() | control.NeedCheckpoint():
            return None
    return message.generation


def _saved(
    before: WorkerFact | Former, message: control.ShardDurable | control.ShardAbandoned
) -> dict[str, object]:
    """The shards or the abandoned steps with one more; the oldest go where there are too many."""
    if isinstance(message, control.ShardDurable):
        return {"shards": (*before.shards, message.shard)[-MAX_SHARDS:]}
    told = (message.step, message.reason[:MAX_REASON_CHARS])
    return {"abandoned": (*before.abandoned, told)[-MAX_ABANDONED:]}


def failure_of(error: str) -> WorkerFailure:
    """An error that the agent reports in the place of a worker."""
    return WorkerFailure(kind=FailureKind.ERROR, error=error, traceback="", at=time.time())


def _bounded(outcome: WorkerOutcome) -> WorkerOutcome:
    """The outcome enters the log, and its metrics come from the user's code."""
    metrics = {
        name[:MAX_METRIC_NAME_CHARS]: outcome.metrics[name]
        for name in sorted(outcome.metrics)[:MAX_METRIC_NAMES]
    }
    return msgspec.structs.replace(outcome, metrics=metrics)
