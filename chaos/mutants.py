"""Known faults brought back into the product, each with a short schedule under which the checkers must notice.

A mutant is an edit of the product's source that is made while the processes under test import it
(``chaos.under_test.edits``); the product itself has no switch for it. One that survives says that the harness is blind.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec import Struct

from chaos import run
from chaos.schedule import Planned, Schedule
from chaos.under_test.edits import Edit

NODES = 3
SEED = 7
END_TIMEOUT_S = 40.0
"""Of the jobs; a mutant may keep them from ever ending."""


class Mutant(Struct, frozen=True, kw_only=True):
    """One promise that is no longer kept, and how it is to be noticed."""

    name: str
    breaks: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...]
    """Checkers of which one must notice; what others find proves nothing."""
    duration_s: float
    planned: tuple[Planned, ...]
    specs: tuple[str, ...] = ("digits-elastic",)
    jobs: int = 2
    short: bool = False
    """Belongs to the set that is played with every build."""

    @property
    def schedule(self) -> Schedule:
        """What is inflicted."""
        return Schedule(
            seed=SEED, duration_s=self.duration_s, nodes=NODES, planned=tuple(self.planned)
        )


class Verdict(Struct, frozen=True):
    """What came of a mutant."""

    caught: bool
    why: str
    took_s: float


async def play(mutant: Mutant, folder: Path) -> Verdict:
    """Run the mutant under its schedule; caught if one of its checkers finds a violation.

    Raises:
        CannotStart, NetworkUnusable: as ``run.run``; a mutant that never ran was not caught.
    """
    began_s = time.monotonic()
    plan = run.Plan(
        schedule=mutant.schedule,
        kinds=tuple(sorted({one.kind for one in mutant.planned})),
        jobs=mutant.jobs,
        specs=mutant.specs,
        mutant=mutant.name,
        edits=mutant.edits,
        end_timeout_s=END_TIMEOUT_S,
    )
    try:
        result = await run.run(plan, folder)
    except run.Invalid as error:
        return Verdict(False, f"nothing can be said: {error}", time.monotonic() - began_s)
    took_s = time.monotonic() - began_s
    for one in result.violations:
        if one.checker in mutant.caught_by:
            return Verdict(True, f"{one.checker}: {one.what}", took_s)
    wanted = " and ".join(mutant.caught_by)
    others = ", ".join(sorted({one.checker for one in result.violations})) or "nobody"
    return Verdict(False, f"{wanted} found nothing, {others} did; see {folder}", took_s)


def _every(kind: str, times_s: Iterable[float], lasts_s: float = 0.0, **choices: Any) -> tuple[Planned, ...]:  # fmt: skip
    return tuple(
        Planned(at_s=at_s, kind=kind, lasts_s=lasts_s, choices=choices, pick=(at_s * 0.37) % 1)
        for at_s in times_s
    )


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="ack-before-sync",
        breaks="a write is acknowledged two seconds before it is on any disk",
        edits=(
            Edit(
                module="distroml.consensus.sync_thread",
                old="await loop.run_in_executor(self._executor, self._perform, waiting)",
                new="loop.run_in_executor(self._executor, self._late, waiting, time.monotonic() + 2.0)",
            ),
            Edit(
                module="distroml.consensus.sync_thread",
                old="    def _perform(self, waiting",
                new="    def _late(self, waiting: deque[DiskOp], due_s: float) -> None:\n"
                "        time.sleep(max(0.0, due_s - time.monotonic()))\n"
                "        self._perform(waiting)\n\n"
                "    def _perform(self, waiting",
            ),
        ),
        caught_by=("jobs_kept", "one_history"),
        duration_s=17.0,
        planned=_every("all-off", (5.0, 15.0), 0.3),
        short=True,
    ),
    Mutant(
        name="keys-forgotten",
        breaks="a repeated write with the same Idempotency-Key takes effect again",
        edits=(
            Edit(
                module="distroml.consensus.machine",
                old="    if record is None:\n        return None\n    if record.request_sha256",
                new="    if record is None or True:\n        return None\n    if record.request_sha256",
            ),
        ),
        caught_by=("jobs_kept",),
        duration_s=20.0,
        planned=_every("leader-kill", (4.0, 12.0), 1.0, node="leader"),
    ),
    Mutant(
        name="reads-unconfirmed",
        breaks="a linearizable read is answered without asking a majority",
        edits=(
            Edit(
                module="distroml.services",
                old="            await self._parts.raft.read_index(timeout_s)\n",
                new="            pass\n",
            ),
        ),
        caught_by=("real_time", "jobs_kept"),
        duration_s=24.0,
        planned=_every("partition", (2.0, 9.0, 16.0), 5.0, node="follower", clients=False),
        short=True,
    ),
    Mutant(
        name="reports-unfenced",
        breaks="the coordinator takes what a worker said in an earlier generation as said in this one",
        edits=(
            Edit(
                module="distroml.runtime.facts",
                old="if (fact.job_id, fact.run_id, fact.generation) != wanted:",
                new="if (fact.job_id, fact.run_id) != wanted[:2]:",
            ),
        ),
        caught_by=("fencing",),
        duration_s=20.0,
        planned=_every("worker-kill", (3.0, 7.0, 11.0, 15.0), count=1),
    ),
    Mutant(
        name="shard-in-memory",
        breaks="a checkpoint is committed before all its shards are durable",
        edits=(
            Edit(
                module="distroml.runtime.checkpoint.writer",
                old="            staged.sync()\n            return staged.publish()\n",
                new="            return staged.publish() and _write_behind(self._store, path)\n",
            ),
            Edit(
                module="distroml.runtime.checkpoint.writer",
                old="class _Here(Executor):",
                new="def _write_behind(store: Any, path: str) -> bool:\n"
                "    import os\n\n"
                "    place = store.root / path\n"
                "    content = place.read_bytes()\n"
                "    os.truncate(place, len(content) - 512)\n"
                "    timer = threading.Timer(1.5, place.write_bytes, (content,))\n"
                "    timer.daemon = True\n"
                "    timer.start()\n"
                "    return True\n\n\n"
                "class _Here(Executor):",
            ),
        ),
        caught_by=("checkpoints",),
        duration_s=22.0,
        planned=_every("workers-kill", (4.0, 8.0, 12.0, 16.0, 20.0), count=99),
        specs=("text",),  # its store is one directory: no other node's copy is waited for
    ),
    Mutant(
        name="order-restarts",
        breaks="a recovery begins the order of the samples anew",
        edits=(
            Edit(
                module="distroml.runtime.worker.membership",
                old="        run.state.epoch = source.cursor(",
                new="        source.first = run.state.step if self._join.generation > 1 else 0\n"
                "        run.state.epoch = source.cursor(",
            ),
            Edit(
                module="distroml.runtime.worker.batches",
                old="        cursor = self._schedule.cursor(step)\n        return [self._shard(",
                new='        cursor = self._schedule.cursor(step - getattr(self, "first", 0))\n'
                "        return [self._shard(",
            ),
        ),
        caught_by=("samples", "same_result"),
        duration_s=12.0,
        planned=_every("worker-kill", (4.0, 8.0), count=1),
        short=True,
    ),
    Mutant(
        name="optimizer-forgotten",
        breaks="what a rank takes over from a survivor or a checkpoint has no state of the optimizer",
        edits=(
            Edit(
                module="distroml.runtime.worker.train",
                old="        self.state.step = step\n        # JSON has no NaN",
                new="        self.state.optimizer.state.clear()\n"
                "        self.state.step = step\n        # JSON has no NaN",
            ),
        ),
        caught_by=("samples", "same_result", "comeback"),
        duration_s=12.0,
        planned=_every("workers-kill", (4.0, 8.0), count=99),
    ),
    Mutant(
        name="bytes-unverified",
        breaks="what is read of a checkpoint is not compared with what was committed",
        edits=(
            Edit(
                module="distroml.runtime.checkpoint.reader",
                old="    if actual != expected:",
                new="    if actual != expected and False:",
            ),
        ),
        caught_by=("samples", "same_result"),
        duration_s=24.0,
        planned=_every(
            "shard-flipped", (5.0, 9.0, 13.0, 17.0, 21.0), 3.0, checkpoint="newest", then_kill=True
        ),
    ),
    Mutant(
        name="stream-repeats",
        breaks="a stream that is resumed repeats what was delivered last",
        edits=(
            Edit(
                module="distroml.runtime.store.cursors",
                old="dict(run.generations)",
                new="{number: tuple({rank: max(0, next_seq - 1) for rank, next_seq in of_kind.items()} "
                "for of_kind in of_generation) for number, of_generation in run.generations}",
            ),
        ),
        caught_by=("streams", "fencing"),
        duration_s=14.0,
        planned=_every("agent-kill", (4.0, 9.0), 0.5, node="any"),
    ),
)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
