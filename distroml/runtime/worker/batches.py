"""Where the step loop's batches come from: samples by index in our order, or the user's own data loader.

Batches come by logical shard, so who computes a shard changes nothing about what is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import default_collate

from distroml.errors import DistroMLError
from distroml.reports import DataCursor
from distroml.runtime.data.order import Schedule
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.ledger import NO_IDS, digest_ids
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
    """One logical shard of one global batch."""

    batch: Any
    samples: int
    """0 where ``batch`` is a stand-in that must not count."""
    batch_samples: int
    """Samples of the global batch."""
    epoch: int
    ends_epoch: bool
    ids_digest: tuple[float, float] = NO_IDS
    """Which samples are in it (see ``ledger``)."""


class BatchSource(Protocol):
    """Yields the batch of any step; steps are 0-based and mostly asked for in order."""

    digest: str
    """Names the data: equal on all ranks, or their copies differ."""
    batches_per_epoch: int
    has_ids: bool
    """Whether samples have names, so that a record of them can be kept."""

    def at(self, step: int, dist: Dist) -> list[LocalBatch]:
        """This rank's logical shards of the batch that step ``step`` consumes, in order."""
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
        self.has_ids = True

    def cursor(self, step: int) -> DataCursor:
        return self._schedule.cursor(step)

    def at(self, step: int, dist: Dist) -> list[LocalBatch]:
        cursor = self._schedule.cursor(step)
        return [self._shard(cursor, shard, dist.shards.count) for shard in dist.shards.mine]

    def _shard(self, cursor: DataCursor, shard: int, shards: int) -> LocalBatch:
        first, last = self._schedule.span(cursor)
        begin, end = self._schedule.rank_span(cursor, shard, shards)
        shown = (begin, end) if end > begin else (first, min(last, first + STAND_IN_SAMPLES))
        ids = self._order.indices(cursor.epoch, *shown)
        return LocalBatch(
            batch=self._dataset.batch(ids),
            samples=end - begin,
            batch_samples=last - first,
            epoch=cursor.epoch,
            ends_epoch=cursor.batch == self.batches_per_epoch - 1,
            ids_digest=digest_ids(ids.tobytes() if end > begin else b""),
        )


class _Loader:
    """One logical shard's data loader and where it stands."""

    def __init__(self, loader: Iterable[Any]) -> None:
        try:
            self.batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise DistroMLError(
                "build_dataloader must return an iterable with len(), the number of its batches; "
                f"{type(loader).__name__} has none."
            ) from None
        self.loader = loader
        self.iterator: Iterator[Any] = iter(())
        self.last: Any = None

    def draw(self) -> int:
        """Take the next batch; its samples, 0 at the end."""
        nothing = object()
        batch = next(self.iterator, nothing)
        if batch is nothing:
            return 0
        self.last = batch
        return samples_in(batch)


class LoadedBatches:
    """Batches of a user's data loaders, one per logical shard, which have a length and no index.

    An epoch has as many steps as the longest loader has batches; a shard that is through shows its last batch
    again, without weight. The sizes of a batch are agreed upon by one small collective per step.

    Args:
        build: makes the loader of a logical shard.
    """

    has_ids = False

    def __init__(self, build: Callable[[int], Iterable[Any]], seed: int, dist: Dist) -> None:
        self._loaders = {shard: _Loader(build(shard)) for shard in dist.shards.mine}
        most = max(loader.batches for loader in self._loaders.values())
        self.batches_per_epoch = int(max(row[0] for row in dist.all_gather([float(most)])))
        if self.batches_per_epoch == 0:
            raise DistroMLError("build_dataloader yields no batch on any rank: len() is 0.")
        self.digest = f"loader/{self.batches_per_epoch}"
        self._seed = seed
        self._next_step = -1

    def cursor(self, step: int) -> DataCursor:
        epoch, batch = divmod(step, self.batches_per_epoch)
        return DataCursor(epoch=epoch, batch=batch)

    def at(self, step: int, dist: Dist) -> list[LocalBatch]:
        cursor = self.cursor(step)
        samples = [self._draw_at(shard, step, cursor) for shard in self._loaders]
        self._next_step = step + 1
        batch_samples = int(sum(row[0] for row in dist.all_gather([float(sum(samples))])))
        return [
            LocalBatch(
                batch=loader.last,
                samples=count,
                batch_samples=batch_samples,
                epoch=cursor.epoch,
                ends_epoch=cursor.batch == self.batches_per_epoch - 1,
            )
            for loader, count in zip(self._loaders.values(), samples, strict=True)
        ]

    def _draw_at(self, shard: int, step: int, cursor: DataCursor) -> int:
        """Take the batch of ``step``; where the loader stands elsewhere, from the beginning of the epoch."""
        loader = self._loaders[shard]
        if cursor.batch == 0 or step != self._next_step:
            seed_all(self._seed, "epoch", cursor.epoch, shard)
            loader.iterator = iter(loader.loader)
            for skipped in range(step - cursor.batch, step):
                self._draw(loader, shard, skipped)
        samples = self._draw(loader, shard, step)
        if loader.last is None:
            raise DistroMLError(f"build_dataloader yields no batch at all for shard {shard}.")
        return samples

    def _draw(self, loader: _Loader, shard: int, step: int) -> int:
        seed_all(self._seed, "batch", step, shard)
        return loader.draw()


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
