"""Where the step loop's batches come from: samples by index in our order, or the user's own data loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import default_collate

from distroml.errors import DistroMLError
from distroml.reports import DataCursor
from distroml.runtime.data.order import Schedule
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.sample_order import Indices, SampleOrder
from distroml.runtime.worker.seeding import seed_all

STAND_IN_SAMPLES = 2
"""What a rank without samples computes on; BatchNorm needs more than one."""


@runtime_checkable
class Dataset(Protocol):
    """Samples addressed by index. An optional ``digest`` (str) names the content; it keys the order.

    A dataset with ``__getitem__`` instead of ``batch`` (such as a torch map-style dataset) works too.
    """

    def __len__(self) -> int:
        """Number of samples, equal on all ranks."""
        ...

    def batch(self, indices: Indices) -> Any:
        """The samples at int64 ``indices`` of shape [n] as one batch, such as a pair (inputs, targets)."""
        ...


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of one global batch."""

    batch: Any
    samples: int
    """0 where ``batch`` is a stand-in that must not count."""
    batch_samples: int
    """Samples of the global batch."""
    epoch: int
    ends_epoch: bool


class BatchSource(Protocol):
    """Yields the batch of any step; steps are 0-based and asked for in order."""

    digest: str
    """Names the data: equal on all ranks, or their copies differ."""
    batches_per_epoch: int

    def at(self, step: int, dist: Dist) -> LocalBatch:
        """This rank's part of the batch that step ``step`` consumes."""
        ...

    def cursor(self, step: int) -> DataCursor:
        """Where a state that has completed ``step`` steps goes on reading."""
        ...


class IndexedBatches:
    """Batches of a dataset in the deterministic order of ``runtime.data.order``."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        samples = len(dataset)
        if samples < 1:
            raise DistroMLError("The training dataset is empty: len(dataset) is 0.")
        self.digest: str = getattr(dataset, "digest", None) or _default_digest(dataset)
        self._dataset = dataset
        self._schedule = Schedule(samples, batch_size)
        self._order = SampleOrder(samples, self.digest, seed)
        self.batches_per_epoch = self._schedule.batches_per_epoch

    def cursor(self, step: int) -> DataCursor:
        return self._schedule.cursor(step)

    def at(self, step: int, dist: Dist) -> LocalBatch:
        cursor = self._schedule.cursor(step)
        first, last = self._schedule.span(cursor)
        begin, end = self._schedule.rank_span(cursor, dist.rank, dist.world_size)
        shown = (begin, end) if end > begin else (first, min(last, first + STAND_IN_SAMPLES))
        return LocalBatch(
            batch=self._dataset.batch(self._order.indices(cursor.epoch, *shown)),
            samples=end - begin,
            batch_samples=last - first,
            epoch=cursor.epoch,
            ends_epoch=cursor.batch == self.batches_per_epoch - 1,
        )


class LoadedBatches:
    """Batches of a user's data loader, which has one length per rank and no index.

    An epoch has as many steps as the longest loader has batches; a rank that is through shows its last batch
    again, without weight. The sizes of a batch are agreed upon by one small collective per step.
    """

    def __init__(self, loader: Iterable[Any], seed: int, dist: Dist) -> None:
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise DistroMLError(
                "build_dataloader must return an iterable with len(), the number of its batches; "
                f"{type(loader).__name__} has none."
            ) from None
        self.batches_per_epoch = int(max(row[0] for row in dist.all_gather([float(batches)])))
        if self.batches_per_epoch == 0:
            raise DistroMLError("build_dataloader yields no batch on any rank: len() is 0.")
        self.digest = f"loader/{self.batches_per_epoch}"
        self._loader, self._seed = loader, seed
        self._iterator: Iterator[Any] | None = None
        self._next_step = -1
        self._last: Any = None

    def cursor(self, step: int) -> DataCursor:
        epoch, batch = divmod(step, self.batches_per_epoch)
        return DataCursor(epoch=epoch, batch=batch)

    def at(self, step: int, dist: Dist) -> LocalBatch:
        cursor = self.cursor(step)
        if cursor.batch == 0 or step != self._next_step:
            seed_all(self._seed, "epoch", cursor.epoch, dist.rank)
            self._iterator = iter(self._loader)
            for skipped in range(step - cursor.batch, step):
                self._draw(skipped, dist)
        samples = self._draw(step, dist)
        self._next_step = step + 1
        if self._last is None:
            raise DistroMLError(f"build_dataloader yields no batch at all on rank {dist.rank}.")
        return LocalBatch(
            batch=self._last,
            samples=samples,
            batch_samples=int(sum(row[0] for row in dist.all_gather([float(samples)]))),
            epoch=cursor.epoch,
            ends_epoch=cursor.batch == self.batches_per_epoch - 1,
        )

    def _draw(self, step: int, dist: Dist) -> int:
        """Take the next batch, as it is drawn in ``step``; its samples, 0 at the end."""
        assert self._iterator is not None
        seed_all(self._seed, "batch", step, dist.rank)
        nothing = object()
        batch = next(self._iterator, nothing)
        if batch is nothing:
            return 0
        self._last = batch
        return samples_in(batch)


class CollatedDataset:
    """A dataset of single samples, collated into batches."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self._samples = samples
        self.digest: str | None = getattr(samples, "digest", None)

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, indices: Indices) -> Any:
        return default_collate([self._samples[int(index)] for index in indices])


def as_dataset(samples: Any) -> Dataset:
    """``samples`` itself where it gives batches, else wrapped so that it does.

    Raises:
        DistroMLError: it can neither be indexed nor give batches.
    """
    if not hasattr(samples, "__len__"):
        raise DistroMLError(f"A dataset needs __len__; {type(samples).__name__} has none.")
    if hasattr(samples, "batch"):
        dataset: Dataset = samples
        return dataset
    if hasattr(samples, "__getitem__"):
        return CollatedDataset(samples)
    raise DistroMLError(
        f"A dataset needs batch(indices) or __getitem__(index); {type(samples).__name__} has neither."
    )


def samples_in(batch: Any) -> int:
    """Samples of a batch: the first dimension of the first tensor in it.

    Raises:
        DistroMLError: there is no tensor in it.
    """
    if isinstance(batch, Tensor):
        return int(batch.shape[0])
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        for part in batch:
            try:
                return samples_in(part)
            except DistroMLError:
                continue
    raise DistroMLError(f"A batch must contain a tensor; {type(batch).__name__} has none.")


def _default_digest(dataset: object) -> str:
    inner = getattr(dataset, "_samples", dataset)
    name = f"{type(inner).__module__}.{type(inner).__qualname__}/{len(inner)}"  # type: ignore[arg-type]
    return hashlib.sha256(name.encode()).hexdigest()
