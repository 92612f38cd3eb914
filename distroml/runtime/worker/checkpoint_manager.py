"""``CheckpointManager``: the checkpoints of this package in any training script, without its nodes.

The same files, written in the same way; only the commit differs, since there is no log: a checkpoint exists once its
manifest does, which rank 0 creates after all ranks have told that their shares are durable. The ranks are those of
``torch.distributed``, if that is initialised; each holds the whole state, as data parallel ones do, and writes a share.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distroml.errors import CorruptCheckpoint, DistroMLError, NotFound, StoreError
from distroml.model import Checkpoint
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.commit import publish_latest, recover, write_manifest
from distroml.runtime.checkpoint.manifest import checkpoint_directory, checkpoints_directory
from distroml.runtime.checkpoint.stores.interface import CheckpointStore
from distroml.runtime.checkpoint.stores.opening import LOCAL, Stores
from distroml.runtime.checkpoint.writer import ShardIdentity, ShardWriter
from distroml.runtime.worker.plain_values import from_plain, to_plain
from distroml.runtime.worker.snapshot import read_checkpoint, share_of
from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.tensor_bytes import buffer_bytes, copy_into

RUN = "run"
STATE_VALUE = "state"
MAX_CANDIDATES = 64
"""Checkpoints that a restore without a step tries, newest first."""
REPORT_BYTES = 4096
"""What a rank tells the others of its shard; its reason is cut to that."""
_MANIFEST = re.compile(r"ckpt_step_(\d{8,12})/manifest(?:\.g(\d{1,12}))?\.json\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


DAMAGE = (CorruptCheckpoint, NotFound)
"""Why ``restore`` takes an older checkpoint; a store that fails, or another version's format, is no reason."""


class _Report(msgspec.Struct, frozen=True):
    shard: ShardFact | None = None
    reason: str = ""


class _Trouble(msgspec.Struct, frozen=True):
    """Why a rank cannot read a checkpoint; no text: it can."""

    text: str
    damaged: bool
    """One of ``DAMAGE``."""


_trouble_decoder = msgspec.json.Decoder(_Trouble)


class CheckpointManager:
    """Saves and restores nested dicts of tensors and plain values.

    With ``torch.distributed`` initialised every rank makes one, and calls ``save_async``, ``wait`` and ``restore`` alike.

    Args:
        place: a directory, which all ranks see and which is made where it is missing, or the URL of a store:
            ``file:///directory`` (which is there), ``s3://bucket/prefix``, ``gs://…`` or ``az://…``.
        name: of what is trained; each name has checkpoints of its own.

    Raises:
        StoreError: there is no such kind of store.
        DistroMLError: ``name`` is not one.
    """

    def __init__(self, place: str | Path, *, name: str = "script") -> None:
        if not _NAME.match(name):
            raise DistroMLError(f"'{name}' is not a name: letters, digits, '.', '_' and '-' are.")
        self._store = _open(str(place))
        self._name = name
        self._writer = ShardWriter(self._store, self._durable, self._abandoned)
        self._failure = ""
        self._rank, self._world_size, self._group = 0, 1, None
        if dist.is_available() and dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            # A group of its own: what is told in the background must not mix with the script's collectives.
            self._group = dist.new_group(backend="gloo")
        (attempt, *_) = self._exchange(str(int(time.time())).encode())
        self._attempt = int(attempt)
        """Names what this attempt writes where an earlier one left other bytes under the plain name."""

    def save_async(self, state: dict[str, Any], step: int) -> None:
        """Copy ``state`` and save it in the background; returns once it may be changed again.

        One that is still being saved is waited for first. That it failed is a warning; ``wait`` raises it.

        Args:
            state: dicts, lists and tuples of tensors and plain values, as ``state_dict()`` gives them.
            step: 0 to 999,999,999,999; names the checkpoint.

        Raises:
            DistroMLError: there is something in ``state`` that cannot be saved; names it.
        """
        try:
            self.wait()
        except StoreError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        if not 0 <= step < 10**12:
            raise DistroMLError(f"step {step} is not from 0 to 999,999,999,999.")
        tensors: dict[str, Tensor] = {}
        try:
            values = msgspec.json.encode(to_plain(state, "", tensors))
        except TypeError as error:
            raise DistroMLError(f"The state cannot be saved: {error}.") from None
        share = share_of(StateBlob(tensors, {}), self._rank, self._world_size)
        copies = copy_into(self._writer.buffer(buffer_bytes(share)), share)
        me = ShardIdentity(
            job_id=self._name,
            run_id=RUN,
            generation=self._attempt,
            rank=self._rank,
            world_size=self._world_size,
            strategy="data_parallel",
            backend="gloo",
        )
        plain = {STATE_VALUE: msgspec.json.decode(values)} if self._rank == 0 else None
        self._writer.write(me, step, DataCursor(epoch=0, batch=step), copies, plain)

    def wait(self) -> None:
        """Return when nothing is being saved any more, on any rank.

        Raises:
            StoreError: the last save failed; says why, once.
        """
        self._writer.wait()
        failure, self._failure = self._failure, ""
        if failure:
            raise StoreError(failure)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, oldest first."""
        return sorted(self._manifests())

    def latest(self) -> int | None:
        """The newest step that can be restored; None if there is none yet."""
        return max(self._manifests(), default=None)

    def restore(self, step: int | None = None) -> dict[str, Any]:
        """The state as it was given to ``save_async``, verified, with tensors on the CPU.

        Args:
            step: None: the newest; if that is damaged on any rank's side, a warning, and the one before.

        Raises:
            NotFound: there is no such checkpoint.
            CorruptCheckpoint: it, or without ``step`` every one, is damaged; names file, place and hashes.
            StoreError: the store failed, or another version wrote it; an older one is not taken for that.
        """
        self.wait()
        manifests = self._manifests()
        wanted = sorted(manifests, reverse=True) if step is None else [step]
        if (
            self._group is not None
        ):  # what rank 0 sees counts: another may have been written meanwhile
            (told, *_) = self._exchange(msgspec.json.encode(wanted[:MAX_CANDIDATES]))
            wanted = msgspec.json.decode(told, type=list[int])
        damage: StoreError | NotFound | None = None
        for one in wanted:
            state, error = self._try(one, manifests)
            if error is None:
                return state
            if step is not None or not isinstance(error, DAMAGE):
                raise error
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            damage = error
        raise damage or NotFound(f"There is no checkpoint of '{self._name}' yet.")

    def close(self) -> None:
        """Wait for what is being saved."""
        self.wait()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._group is None:
            self._writer.wait()  # other ranks may be gone: nothing is waited for that needs them

    # --- the commit --------------------------------------------------------------------------------------------

    def _durable(self, me: ShardIdentity, shard: ShardFact) -> None:
        self._settle(_Report(shard=shard))

    def _abandoned(self, me: ShardIdentity, step: int, reason: str) -> None:
        self._settle(_Report(reason=reason[: REPORT_BYTES // 8]))

    def _settle(self, mine: _Report) -> None:
        """All ranks have written, or given up; in the writing thread."""
        try:
            told = [
                msgspec.json.decode(one, type=_Report)
                for one in self._exchange(msgspec.json.encode(mine))
            ]
            reason = "; ".join(one.reason for one in told if one.shard is None)
            if not reason and self._rank == 0:
                reason = self._commit([one.shard for one in told if one.shard is not None])
            # Only now is it listed, or known not to be, for all ranks alike.
            (outcome, *_) = self._exchange(reason[: REPORT_BYTES // 8].encode())
            self._failure = outcome.decode(errors="replace")
        except Exception as error:  # of the group: another rank is gone
            self._failure = f"rank {self._rank}: the other ranks cannot be told: {error}"

    def _commit(self, shards: list[ShardFact]) -> str:
        """Create the manifest; why not, if not."""
        try:
            checkpoint = write_manifest(
                self._store,
                job_id=self._name,
                run_id=RUN,
                generation=self._attempt,
                shards=shards,
                committed_at=time.time(),
            )
            publish_latest(self._store, checkpoint)
        except DistroMLError as error:
            return error.detail
        return ""

    def _exchange(self, mine: bytes) -> list[bytes]:
        """What each rank has to say, in their order."""
        if self._group is None:
            return [mine]
        if len(mine) > REPORT_BYTES:
            raise DistroMLError(f"{len(mine)} bytes are more than {REPORT_BYTES}")
        length = len(mine).to_bytes(4, "big")
        padded = bytearray(length + mine + bytes(REPORT_BYTES - len(mine)))
        rows = [torch.empty(len(padded), dtype=torch.uint8) for _ in range(self._world_size)]
        dist.all_gather(rows, torch.frombuffer(padded, dtype=torch.uint8), group=self._group)
        told = [bytes(row.numpy()) for row in rows]
        return [one[4 : 4 + int.from_bytes(one[:4], "big")] for one in told]

    # --- reading -----------------------------------------------------------------------------------------------

    def _manifests(self) -> dict[int, str]:
        """File name of the manifest of each step: of the latest attempt that trained it."""
        found: dict[int, tuple[int, str]] = {}
        for step, attempt, file in self._listed():
            found[step] = max(found.get(step, (-1, "")), (attempt, file))
        return {step: file for step, (_, file) in found.items()}

    def _listed(self) -> Iterator[tuple[int, int, str]]:
        parent = checkpoints_directory(self._name, RUN)
        for path in self._store.list(parent):
            match = _MANIFEST.match(path.removeprefix(f"{parent}/"))
            if match:
                yield int(match[1]), int(match[2] or 0), path.rpartition("/")[2]

    def _try(
        self, step: int, manifests: dict[int, str]
    ) -> tuple[dict[str, Any], StoreError | NotFound | None]:
        """The state of ``step`` if every rank can read it, else why not: one of ``DAMAGE`` on all ranks, or on none."""
        state: dict[str, Any] = {}
        failure: StoreError | NotFound | None = None
        try:
            state = self._read(step, manifests)
        except (StoreError, NotFound) as error:
            failure = error
        mine = _Trouble(
            (str(failure) if failure else "")[: REPORT_BYTES // 8],
            isinstance(failure, DAMAGE),
        )
        told = map(_trouble_decoder.decode, self._exchange(msgspec.json.encode(mine)))
        worst = min((one for one in told if one.text), key=lambda one: one.damaged, default=mine)
        if worst.text and (failure is None or (mine.damaged and not worst.damaged)):
            kind = CorruptCheckpoint if worst.damaged else StoreError
            failure = kind(f"Another rank cannot read step {step}: {worst.text}")
        return state, failure

    def _read(self, step: int, manifests: dict[int, str]) -> dict[str, Any]:
        if step not in manifests:
            there = ", ".join(map(str, sorted(manifests)[-10:])) or "none"
            raise NotFound(
                f"There is no checkpoint of step {step} of '{self._name}'; there are: {there}."
            )
        directory = checkpoint_directory(self._name, RUN, step)
        record: Checkpoint = recover(self._store, directory, manifests[step])
        manifest, blob = read_checkpoint(self._store, record)
        state: dict[str, Any] = from_plain(manifest.values[STATE_VALUE], blob.tensors)
        return state


def _open(place: str) -> CheckpointStore:
    if "://" not in place:
        return Stores(place).of(LOCAL)
    return Stores(".").of(place)
