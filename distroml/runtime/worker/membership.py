"""A worker's part in one generation: meet, agree on the state, train, finish.

What outlives generations is ``Prepared``: adapter, data, the state and the memory of its checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from distroml.errors import CorruptCheckpoint
from distroml.model import Checkpoint
from distroml.reports import Marks, WorkerOutcome, WorkerPhase
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.control import Join, WorkerPlan
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import (
    BatchSource,
    Dataset,
    IndexedBatches,
    LoadedBatches,
    as_dataset,
)
from distroml.runtime.worker.builtin import load_adapter
from distroml.runtime.worker.control_link import ControlLink, Position
from distroml.runtime.worker.device import CPU, prepare_device
from distroml.runtime.worker.device_group import DeviceGroup
from distroml.runtime.worker.digest import state_digest
from distroml.runtime.worker.dist import BUSY, STOP, VACATE, Dist
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import Bereft, CollectiveBroken
from distroml.runtime.worker.seeding import seed_all
from distroml.runtime.worker.snapshot import (
    Checkpointer,
    check_same_model,
    model_of,
    read_checkpoint,
    read_weights,
)
from distroml.runtime.worker.state import TrainState
from distroml.runtime.worker.state_transfer import (
    NO_STATE,
    Standing,
    Transfer,
    check_agreement,
    choose_source,
    gather_standings,
    pack,
)
from distroml.runtime.worker.train import Run, Training


@dataclass
class Prepared:
    """All of a worker that does not depend on who else there is."""

    plan: WorkerPlan
    adapter: FrameworkAdapter
    dataset: Dataset | None
    """None: the adapter brings data loaders."""
    fresh: TrainState
    """A state that has completed no step."""
    stores: Stores
    run: Run | None = None
    """The state of the run, once this process has one."""
    checkpointer: Checkpointer | None = None
    committed: Callable[[], Checkpoint | None] = lambda: None
    """The log's newest good checkpoint, as far as this process has been told."""
    former: int = 0
    """The newest generation that it began with the others; 0: none."""
    left_at: float | None = None
    """When (Unix seconds) it left the generation before."""
    source: BatchSource | None = None


def prepare(plan: WorkerPlan, tell: Callable[[], None]) -> Prepared:
    """Load the user's code, its data and its model; everything slow that needs no other rank.

    Args:
        tell: called once the process is under way.
    """
    tell()
    adapter = load_adapter(plan.spec)
    adapter.device = prepare_device(plan.spec.distributed.backend)
    adapter.init_distributed(plan)
    loads = type(adapter).build_dataloader is not FrameworkAdapter.build_dataloader
    dataset = None if loads else as_dataset(adapter.build_dataset(plan.spec))
    _ = adapter.holdout  # built here, so that the other ranks do not wait for it in the first epoch
    seed_all(plan.spec.seed, "model")
    return Prepared(
        plan=plan,
        adapter=adapter,
        dataset=dataset,
        fresh=adapter.new_state(),
        stores=Stores(plan.store_dir, plan.stores),
    )


class Membership:
    """One rank of one generation.

    Args:
        flags: what this rank wishes for the next step boundary.
        save_request: the newest request for a checkpoint that it has heard of.
    """

    def __init__(
        self,
        join: Join,
        group: RankGroup,
        prepared: Prepared,
        link: ControlLink,
        flags: Callable[[], int],
        save_request: Callable[[], int] = lambda: 0,
    ) -> None:
        self._join, self._group, self._link = join, group, link
        self._prepared, self._flags = prepared, flags
        self._save_request = save_request
        self._spec = prepared.plan.spec
        self._dist = Dist(
            group,
            self._spec.resources.workers,
            meetings=link.meetings,
            local_rank=join.local_rank,
            device=prepared.adapter.device,
        )
        group.on_abort = partial(link.meetings.end, join.generation)
        self._marks = Marks(left_at=prepared.left_at)
        self._total_steps: int | None = None
        self._busy = self._any_busy = False
        """Whether this rank, and whether any, was still writing a shard when they met."""
        self._wishes = 0
        """Of all ranks, when they met."""

    def close(self) -> None:
        """Leave, in whatever state the group is."""
        try:
            self._group.close()  # first: what is under way ends by that
        finally:
            self._dist.close()

    def live(self) -> WorkerOutcome | None:
        """The outcome of the run, or None where the ranks left together for the next generation.

        Raises:
            CollectiveBroken: another rank is gone, or the agent ended the generation.
        """
        self._link.meetings.join(self._group.generation)
        self._tell(WorkerPhase.CONNECTING)
        self._group.open()
        line = self._device_group()
        self._mark(met_at=time.time())
        self._tell(WorkerPhase.RESTORING)
        # Not before: a planned change begins once the new ranks are ready to connect, and they would wait here for the others.
        self._prepared.adapter.set_up(self._dist)
        source = self._batches()
        self._total_steps = (
            self._spec.steps or self._spec.hyperparameters.epochs * source.batches_per_epoch
        )
        run = self._settle_state(source)
        self._dist.attach(
            run.state.model,
            self._spec.distributed.reduction,
            unused_allowed=self._prepared.adapter.find_unused_parameters,
            line=line,
        )
        self._tell(WorkerPhase.TRAINING)
        training = self._training(run, source)
        flags = training.train()
        if flags and not flags & (STOP | VACATE):
            self._part_in_order()
            return None
        print(
            "worker was asked to stop" if flags else "worker trained to its last step", flush=True
        )
        self._tell(WorkerPhase.FINISHING)
        if flags & VACATE and not flags & STOP and training.checkpointer is None:
            training.checkpointer = self._checkpointer()
        return self._finish(training, stopped=bool(flags))

    def _device_group(self) -> DeviceGroup | None:
        """The line between the GPUs of all ranks, where they have any and are several."""
        device = self._prepared.adapter.device
        if device == CPU or self._group.world_size == 1:
            return None
        line = DeviceGroup(self._group, device)
        line.open()
        return line

    # --- the state ---------------------------------------------------------------------------------------------

    def _batches(self) -> BatchSource:
        prepared, spec = self._prepared, self._spec
        if prepared.dataset is None:
            return LoadedBatches(self._loader, spec.seed, self._dist)
        if prepared.source is None:
            batch_size = spec.hyperparameters.batch_size
            prepared.source = IndexedBatches(prepared.dataset, batch_size, spec.seed)
        return prepared.source

    def _loader(self, shard: int) -> Iterable[Any]:
        loader = self._prepared.adapter.build_dataloader(self._spec, shard, self._dist.shards.count)
        if loader is None:
            raise NotImplementedError(
                "build_dataloader gave a loader for one shard and none for another"
            )
        return loader

    def _settle_state(self, source: BatchSource) -> Run:
        """Make this rank's state the one that all ranks go on from."""
        prepared, group = self._prepared, self._group
        assert self._total_steps is not None
        self._busy = prepared.checkpointer is not None and prepared.checkpointer.busy
        standings = gather_standings(
            group,
            Standing(
                position=prepared.run.position if prepared.run else NO_STATE,
                total_steps=self._total_steps,
                dataset=hashlib.sha256(source.digest.encode()).digest(),
                model=_model_sha256(prepared.run.state if prepared.run else prepared.fresh),
                flags=self._flags() | BUSY * self._busy,
                former=prepared.former,
            ),
        )
        check_agreement(standings)
        for one in standings:
            self._wishes |= one.flags & ~BUSY
            self._any_busy |= bool(one.flags & BUSY)
        checkpoint = self._join.checkpoint
        holder = choose_source(standings, 2 * self._join.steps_done if checkpoint else None)
        self._check_not_bereft(standings, holder)
        if holder is not None:
            told = f"rank {holder}"
            furthest = standings[holder].position
            behind = [rank for rank, one in enumerate(standings) if one.position != furthest]
            # Who has no state gets all records: those who told of them may have died before they were heard.
            least_done = min(one.position // 2 for one in standings)
            self._share(Transfer(group, holder, behind), holder, behind, least_done)
        elif checkpoint is not None:
            told = f"checkpoint of step {checkpoint.step}"
            self._read(checkpoint)
        else:
            told = "scratch"
            everybody_else = list(range(1, group.world_size))
            self._share(Transfer(group, 0, everybody_else), 0, everybody_else)
        run = prepared.run
        assert run is not None
        prepared.former = self._join.generation
        run.state.epoch = source.cursor(max(0, run.state.step - 1)).epoch
        self._mark(restored_at=time.time(), resume_step=run.state.step, source=told)
        if holder == group.rank and run.records:
            # Those that rank 0 reported last may have died with it; who has them already ignores them.
            self._link.progress(self._position(WorkerPhase.RESTORING), list(run.records))
        return run

    def _check_not_bereft(self, standings: list[Standing], holder: int | None) -> None:
        """Check that the ranks have what they were to go on with: all draw the same conclusion.

        Who was in the generation before has all that was ever whole there, if maybe not the last step of all.

        Raises:
            Bereft: who had it ended when this generation was being formed. The coordinator thinks that the checkpoints of the one
                before lie behind: one that the ranks would go back behind may be committed by now, or any moment.
        """
        step, formerly = self._join.steps_done, -1
        if holder is not None:
            position = standings[holder].position
            step = position // 2
            formerly = max(one.former for one in standings if one.position == position)
        if step < self._join.resume_step and formerly < self._join.generation - 1:
            with contextlib.suppress(CollectiveBroken):  # so that each can say why it leaves
                self._group.barrier()
            raise Bereft(
                f"no rank has the {self._join.resume_step} steps from which this generation was to go on any more"
            )

    def _share(
        self, transfer: Transfer, holder: int, behind: list[int], since_step: int = 0
    ) -> None:
        """The state of rank ``holder`` on the ranks ``behind`` it, with the records since ``since_step``."""
        rank = self._group.rank
        if rank == holder:
            run = self._begin_run()
            if behind:
                blob, records = run.blob(self._prepared.adapter), run.records_since(since_step)
                transfer.send(pack(blob, run.state.step, records))
        elif rank in behind:
            # Only what has arrived is a state: a transfer that breaks leaves this rank without one, or with the older one.
            arrived = transfer.receive()
            self._begin_run().take(self._prepared.adapter, *arrived)
        elif behind:
            transfer.attend()

    def _read(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint, whose files the agent has brought here where no store has them all."""
        supply, check = self._link.supply, self._group.check
        if checkpoint.store != LOCAL:
            self._take_from(checkpoint)
            return
        supply.need(checkpoint, check=check)
        try:
            self._take_from(checkpoint)
        except CorruptCheckpoint as error:
            print(f"{error} Other nodes may have a good copy.", flush=True)
            supply.need(checkpoint, mend=True, check=check)
            self._take_from(checkpoint)

    def _take_from(self, checkpoint: Checkpoint) -> None:
        store = self._prepared.stores.of(checkpoint.store)
        if self._join.weights_only:
            adapter, fresh = self._prepared.adapter, self._prepared.fresh
            blob = read_weights(store, checkpoint, Run(fresh).blob(adapter))
            self._begin_run().take(adapter, blob, 0)
            return
        manifest, blob = read_checkpoint(store, checkpoint)
        if not checkpoint.directory.startswith(f"{self._prepared.plan.job_id}/"):
            own = model_of(Run(self._prepared.fresh).blob(self._prepared.adapter))
            check_same_model(model_of(blob), own, checkpoint)
        self._begin_run().take(self._prepared.adapter, blob, manifest.step)

    def _begin_run(self) -> Run:
        """The run of this process; if it has none yet, from scratch."""
        prepared = self._prepared
        if prepared.run is None:
            prepared.run = Run(prepared.fresh)
        return prepared.run

    # --- training and after ------------------------------------------------------------------------------------

    def _training(self, run: Run, source: BatchSource) -> Training:
        prepared = self._prepared
        assert self._total_steps is not None
        return Training(
            adapter=prepared.adapter,
            run=run,
            source=source,
            dist=self._dist,
            link=self._link,
            checkpointer=self._checkpointer() if self._spec.checkpointing.enabled else None,
            total_steps=self._total_steps,
            flags=self._flags,
            wishes=self._wishes,
            busy=self._busy,
            any_busy=self._any_busy,
            save_request=self._save_request,
            on_first_step=self._on_first_step,
        )

    def _checkpointer(self) -> Checkpointer:
        """Of this process, for this rank of this generation."""
        prepared = self._prepared
        if prepared.checkpointer is None:
            store = prepared.stores.of(self._spec.checkpointing.store)
            prepared.checkpointer = Checkpointer(
                prepared.plan, store, self._link, prepared.committed
            )
        prepared.checkpointer.join(self._join)
        return prepared.checkpointer

    def _on_first_step(self) -> None:
        self._mark(stepped_at=time.time())
        self._tell(WorkerPhase.TRAINING)
        prepared = self._prepared
        if prepared.checkpointer is not None and prepared.run is not None:
            prepared.checkpointer.make_room(prepared.run.blob(prepared.adapter))

    def _part_in_order(self) -> None:
        """All ranks have completed the step; none should see another's sockets close before it knows that."""
        with contextlib.suppress(CollectiveBroken):  # its own step is done, and that is what counts
            self._group.barrier()
        self._prepared.left_at = time.time()

    def _finish(self, training: Training, *, stopped: bool) -> WorkerOutcome:
        """Save the last checkpoint and leave together."""
        checkpoint_step = training.save_last()
        self._group.barrier()
        run = training.run
        return WorkerOutcome(
            step=run.state.step,
            epoch=run.state.epoch,
            state_digest=state_digest(run.blob(training.adapter)),
            sample_digest=run.ledger,
            metrics=run.metrics,
            stopped=stopped,
            checkpoint_step=checkpoint_step,
        )

    # --- telling -----------------------------------------------------------------------------------------------

    def _mark(self, **marks: object) -> None:
        self._marks = msgspec.structs.replace(self._marks, **marks)

    def _tell(self, phase: WorkerPhase) -> None:
        self._link.phase(self._position(phase), self._marks)

    def _position(self, phase: WorkerPhase) -> Position:
        run, checkpoint = self._prepared.run, self._join.checkpoint
        step = self._join.steps_done
        epoch = checkpoint.epoch if checkpoint and step else 0
        if run is not None:
            step, epoch = run.state.step, run.state.epoch
        return Position(self._group.generation, phase, step, epoch, self._total_steps)


def _model_sha256(state: TrainState) -> bytes:
    """Of names, shapes and types: not of the values."""
    model = hashlib.sha256()
    for name, tensor in state.model.state_dict().items():
        model.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return model.digest()
