"""The life of a worker process, from its plan to its last frame.

connect → Hello → adapter, data and model → for each generation that it is told to join: meet the other ranks → agree on the
state → train → either the last step, or park and wait for the next one. A broken collective parks it: somebody else is
gone, and its state is worth keeping. Any other exception ends it with one Failed frame.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

import torch

from distroml.reports import CHECKPOINT_ERRORS, WorkerFailure, WorkerPhase, kind_of
from distroml.runtime.control import Failed, Finished, Hello, Join, Parked, Rendezvous, WorkerPlan
from distroml.runtime.worker.control_link import ControlLink, Position
from distroml.runtime.worker.membership import Membership, Prepared, prepare
from distroml.runtime.worker.orders import Orders
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import Bereft, CollectiveBroken

MAX_TRACEBACK_BYTES = 8 * 1024
MAX_ERROR_BYTES = 2 * 1024
MAX_REASON_BYTES = 400
FAILED_EXIT = 1


def main(plan: WorkerPlan) -> int:
    """Live the worker's life; the exit code of the process."""
    configure_torch(plan.threads)
    worker = Worker(plan)
    try:
        worker.live()
    except BaseException as error:
        traceback.print_exc()
        worker.link.send(Failed(failure=worker.failure(error), step=worker.step))
        worker.link.flush()
        return FAILED_EXIT
    worker.link.flush()
    if worker.link.dropped_metrics:
        count = worker.link.dropped_metrics
        print(f"{count} metrics were dropped: the agent did not read them", flush=True)
    return 0


def configure_torch(threads: int) -> None:
    """The same bits for the same inputs, on ``threads`` cores."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # else each torch.empty is filled, which costs a write of all memory it hands out
    torch.utils.deterministic.fill_uninitialized_memory = False


class Worker:
    """One process and the generations that it is part of."""

    def __init__(self, plan: WorkerPlan) -> None:
        self.plan = plan
        self.orders = Orders(self._group_of)
        self.join: Join | None = plan.join
        self.prepared: Prepared | None = None
        self._echo = False
        """Whether the generation was over already when an exception ended this process."""
        if plan.join is not None:
            self.orders.take(plan.join)
        self.link = ControlLink(
            plan.control_path, self.orders.take, self._waiting_s, hello=self._hello
        )

    @property
    def step(self) -> int:
        """Steps completed, those of earlier generations included."""
        if self.prepared is not None and self.prepared.run is not None:
            return self.prepared.run.state.step
        return self.join.steps_done if self.join else 0

    def live(self) -> None:
        """Until the run is over for this process.

        Raises:
            Exception: anything but a broken collective.
        """
        self.prepared = prepare(self.plan, self._tell_preparing)
        self.prepared.committed = lambda: self.orders.committed
        if self.plan.join is None:
            self.link.phase(Position(0, WorkerPhase.SPARE, 0, 0))
        while not self._one_generation(self.prepared):
            pass

    def _one_generation(self, prepared: Prepared) -> bool:
        """Be part of the next generation; True at the end of the run."""
        self.join, group = self.orders.wait_for_join()
        bereft = False
        membership = Membership(
            self.join,
            group,
            prepared,
            self.link,
            lambda: self.orders.flags,
            lambda: self.orders.save_request,
        )
        try:
            outcome = membership.live()
            if outcome is None:
                reason = "moves to the next generation"
            else:
                self.link.send(Finished(generation=group.generation, outcome=outcome))
                return True
        except CollectiveBroken as error:
            reason, bereft = _cut(str(error), MAX_REASON_BYTES), isinstance(error, Bereft)
        except BaseException:
            self._echo = group.broken is not None
            raise
        finally:
            membership.close()
        at = group.broken_at or time.time()
        print(
            f"parked at step {self.step} after generation {group.generation}: {reason}", flush=True
        )
        prepared.left_at = at
        self.link.send(
            Parked(
                generation=group.generation,
                step=self.step,
                at=at,
                reason=reason,
                has_state=prepared.run is not None,
                bereft=bereft,
            )
        )
        return False

    def failure(self, error: BaseException) -> WorkerFailure:
        """What the agent should know of ``error``."""
        kind = kind_of(error)
        unusable = kind in CHECKPOINT_ERRORS
        checkpoint = self.join.checkpoint if self.join else None
        text = "".join(traceback.format_exception(error))
        return WorkerFailure(
            kind=kind,
            error=_cut(f"{type(error).__name__}: {str(error) or repr(error)}", MAX_ERROR_BYTES),
            traceback=_cut(text, MAX_TRACEBACK_BYTES, keep_end=True),
            at=time.time(),
            collateral=self._echo and not unusable,
            checkpoint_step=checkpoint.step if unusable and checkpoint else None,
        )

    def _hello(self) -> Hello:
        join = self.join
        return Hello(
            run_id=self.plan.run_id,
            worker=self.plan.worker,
            pid=os.getpid(),
            generation=join.generation if join else 0,
            rank=join.rank if join else 0,
            step=self.step,
        )

    def _tell_preparing(self) -> None:
        if self.join is not None:
            self.link.phase(Position(self.join.generation, WorkerPhase.CONNECTING, self.step, 0))

    def _group_of(self, join: Join) -> RankGroup:
        return RankGroup(join.generation, join.rank, join.world_size, self.plan.host, self._publish)

    def _publish(self, key: str, value: bytes) -> None:
        self.link.send(Rendezvous(key=key, value=value))

    def _waiting_s(self) -> float:
        group = self.orders.present()
        since_s = group.blocked_since_s if group else None
        return 0.0 if since_s is None else time.monotonic() - since_s


def _cut(text: str, limit_bytes: int, keep_end: bool = False) -> str:
    data = text.encode(errors="replace")
    if len(data) <= limit_bytes:
        return text
    part = data[-limit_bytes:] if keep_end else data[:limit_bytes]
    return part.decode(errors="ignore")


if __name__ == "__main__":
    sys.exit("workers are forked by distroml.runtime.worker.forkserver")
