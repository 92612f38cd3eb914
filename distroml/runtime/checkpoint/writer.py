"""A worker's side of a checkpoint: hash, write and fsync this rank's shard while training goes on.

The step loop only copies the shard's tensors into the writer's host buffer, which is allocated once (touching
fresh memory costs more than the copy). One shard is in flight at a time. A shard that cannot be written after
some attempts is abandoned; training never stops for it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from distroml.errors import StoreError
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.manifest import checkpoint_directory
from distroml.runtime.checkpoint.shard_file import ShardNote, TensorBytes, encode_header
from distroml.runtime.checkpoint.store import Buffer, CheckpointStore

MAX_ATTEMPTS = 5
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0


class ShardIdentity(Struct, frozen=True, kw_only=True):
    """Whose shards a writer writes."""

    job_id: str
    run_id: str
    generation: int
    rank: int
    world_size: int
    strategy: str
    backend: str


class ShardWriter:
    """Writes the shards of one process, one after the other, in a thread.

    Args:
        on_durable: called in the writing thread when a shard is fsynced under its final name.
        on_abandoned: called in the writing thread with (identity, step, reason) when it was given up.
    """

    def __init__(
        self,
        store: CheckpointStore,
        on_durable: Callable[[ShardIdentity, ShardFact], None],
        on_abandoned: Callable[[ShardIdentity, int, str], None],
        wait_s: Callable[[float], Any] | None = None,
    ) -> None:
        self._store = store
        self._on_durable, self._on_abandoned = on_durable, on_abandoned
        self._wait_s = wait_s or threading.Event().wait
        self._buffer = bytearray()
        self._thread: threading.Thread | None = None
        self.durable: tuple[int, int] | None = None
        """Generation and step of the newest shard that is durable."""

    @property
    def busy(self) -> bool:
        """True while a shard is being written: the buffer must not be touched."""
        return self._thread is not None and self._thread.is_alive()

    def buffer(self, size_bytes: int) -> memoryview:
        """The host buffer, at least ``size_bytes`` long, for the next ``write``; only while not busy."""
        if len(self._buffer) < size_bytes:
            self._buffer = bytearray(size_bytes)
        return memoryview(self._buffer)[:size_bytes]

    def write(
        self,
        identity: ShardIdentity,
        step: int,
        cursor: DataCursor,
        tensors: Sequence[TensorBytes],
        values: dict[str, Any] | None,
    ) -> None:
        """Start writing the shard of ``step``; ``tensors`` lie in the buffer and stay untouched."""
        self._thread = threading.Thread(
            target=self._run,
            args=(identity, step, cursor, tensors, values),
            name="shard-write",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the shard in flight is durable or abandoned."""
        if self._thread is not None:
            self._thread.join()

    def _run(
        self,
        identity: ShardIdentity,
        step: int,
        cursor: DataCursor,
        tensors: Sequence[TensorBytes],
        values: dict[str, Any] | None,
    ) -> None:
        try:
            parts = self._parts(identity, step, cursor, tensors, values)
            fact = self._store_shard(identity, step, cursor, parts)
        except Exception as error:
            self._on_abandoned(identity, step, f"rank {identity.rank}: {error}")
            return
        self.durable = (identity.generation, step)
        self._on_durable(identity, fact)

    @staticmethod
    def _parts(
        me: ShardIdentity,
        step: int,
        cursor: DataCursor,
        tensors: Sequence[TensorBytes],
        values: dict[str, Any] | None,
    ) -> list[Buffer]:
        note = ShardNote(
            job_id=me.job_id,
            run_id=me.run_id,
            step=step,
            cursor=cursor,
            rank=me.rank,
            world_size=me.world_size,
            strategy=me.strategy,
            backend=me.backend,
            digests={t.name: hashlib.sha256(t.data).hexdigest() for t in tensors},
            values=values,
        )
        return [encode_header(tensors, note), *(t.data for t in tensors)]

    def _store_shard(
        self, me: ShardIdentity, step: int, cursor: DataCursor, parts: list[Buffer]
    ) -> ShardFact:
        backoff_s = FIRST_BACKOFF_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                file, size_bytes, sha256 = self._put(me, step, parts)
                return ShardFact(
                    step=step,
                    cursor=cursor,
                    rank=me.rank,
                    file=file,
                    size_bytes=size_bytes,
                    sha256=sha256,
                )
            except StoreError as error:
                if attempt == MAX_ATTEMPTS:
                    raise StoreError(
                        f"{error.detail} Given up after {attempt} attempts."
                    ) from error
                self._wait_s(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        raise AssertionError("unreachable")

    def _put(self, me: ShardIdentity, step: int, parts: list[Buffer]) -> tuple[str, int, str]:
        """Name, size and hash under which the bytes are now durable."""
        directory = checkpoint_directory(me.job_id, me.run_id, step)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        # Another generation may have died while writing other bytes under the plain name.
        for file in (
            f"worker_{me.rank}.safetensors",
            f"worker_{me.rank}.g{me.generation}.safetensors",
        ):
            stored = self._store.put_if_absent(f"{directory}/{file}", parts)
            if stored.sha256 == digest.hexdigest():
                return file, stored.size_bytes, stored.sha256
        raise StoreError(f"{directory}/{file} exists with other bytes.")
