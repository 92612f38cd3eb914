"""A worker's side of a checkpoint: hash, write and fsync this rank's shard while training goes on.

The step loop only copies the shard's tensors into the writer's host buffer, which is allocated once (touching
fresh memory costs more than the copy). One shard is in flight at a time. All that follows is done by threads of lower
priority than the step loop's. A shard that cannot be written after some attempts is abandoned; training never stops for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from msgspec import Struct

from distroml.errors import StoreError
from distroml.reports import DataCursor, ShardFact
from distroml.runtime.checkpoint.assembly import Assembly, Base
from distroml.runtime.checkpoint.host_memory import allocate, touch
from distroml.runtime.checkpoint.manifest import checkpoint_directory, file_names
from distroml.runtime.checkpoint.priority import give_way
from distroml.runtime.checkpoint.shard_check import is_shard
from distroml.runtime.checkpoint.shard_file import Codec, ShardNote, TensorBytes
from distroml.runtime.checkpoint.stores.interface import CheckpointStore, StagingStore, exists

MAX_ATTEMPTS = 5
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
SMALL_BYTES = 1024 * 1024
"""Less than this is done at once, before threads would have begun, and at normal priority."""
WRITE_THREADS = 2
"""Hashing and the page cache each keep about half a core busy at the speed of a fast disk."""


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
    """Writes the shards of one process, one after the other, in the background.

    Args:
        on_durable: called in the writing thread when a shard is fsynced under its final name.
        on_abandoned: called in the writing thread with (identity, step, reason) when it was given up.
        base: called in the writing thread with (identity, step): tensors of an earlier checkpoint that the shard may refer
            to; None: it refers to none.
        scattered: as of ``file_names``.
    """

    def __init__(
        self,
        store: CheckpointStore,
        on_durable: Callable[[ShardIdentity, ShardFact], None],
        on_abandoned: Callable[[ShardIdentity, int, str], None],
        wait_s: Callable[[float], Any] | None = None,
        *,
        codec: Codec = "none",
        base: Callable[[ShardIdentity, int], Base] | None = None,
        scattered: bool = False,
    ) -> None:
        self._store = store
        self._on_durable, self._on_abandoned = on_durable, on_abandoned
        self._wait_s = wait_s or threading.Event().wait
        self._codec: Codec = codec
        self._base = base
        self._scattered = scattered
        self._buffer = memoryview(b"")
        self._thread: threading.Thread | None = None
        self._toucher: threading.Thread | None = None
        self._enough = threading.Event()
        """Tells the toucher that the buffer is needed now."""
        self.durable: tuple[int, int] | None = None
        """Generation and step of the newest shard that is durable."""

    @property
    def busy(self) -> bool:
        """True while a shard is being written: the buffer must not be touched."""
        return self._thread is not None and self._thread.is_alive()

    def buffer(self, size_bytes: int) -> memoryview:
        """The host buffer, at least ``size_bytes`` long, for the next ``write``; only while not busy."""
        if self._toucher is not None:
            self._enough.set()
            self._toucher.join()
            self._toucher = None
        if len(self._buffer) < size_bytes:
            self._buffer = memoryview(b"")  # before the larger one is allocated
            self._buffer = allocate(size_bytes)
        return self._buffer[:size_bytes]

    def make_room(self, size_bytes: int) -> None:
        """Have ``buffer`` ready in the background, so that its first use costs no more than the later ones."""
        if self.busy or len(self._buffer) >= size_bytes:
            return
        buffer = self.buffer(size_bytes)
        self._enough.clear()
        self._toucher = threading.Thread(
            target=self._touch, args=(buffer,), name="shard-buffer", daemon=True
        )
        self._toucher.start()

    def _touch(self, buffer: memoryview) -> None:
        give_way()
        touch(buffer, self._enough.is_set)

    def write(
        self,
        identity: ShardIdentity,
        step: int,
        cursor: DataCursor,
        tensors: Sequence[TensorBytes],
        values: dict[str, Any] | None,
    ) -> None:
        """Start writing the shard of ``step``; ``tensors`` lie in the buffer and are the writer's until it is durable."""
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
        me: ShardIdentity,
        step: int,
        cursor: DataCursor,
        tensors: Sequence[TensorBytes],
        values: dict[str, Any] | None,
    ) -> None:
        note = ShardNote(
            job_id=me.job_id,
            run_id=me.run_id,
            step=step,
            cursor=cursor,
            rank=me.rank,
            world_size=me.world_size,
            strategy=me.strategy,
            backend=me.backend,
            digests={},
            values=values,
        )
        try:
            base = self._base(me, step) if self._base else None
            with _threads(sum(tensor.size_bytes for tensor in tensors)) as threads:
                shard = Assembly(note, tensors, threads, base=base, codec=self._codec)
                file = self._store_shard(me, step, shard)
            fact = ShardFact(
                step=step,
                cursor=cursor,
                rank=me.rank,
                file=file,
                size_bytes=shard.size_bytes,
                sha256=shard.header_sha256(),
            )
        except Exception as error:
            self._on_abandoned(me, step, f"rank {me.rank}: {error}")
            return
        self.durable = (me.generation, step)
        self._on_durable(me, fact)

    def _store_shard(self, me: ShardIdentity, step: int, shard: Assembly) -> str:
        backoff_s = FIRST_BACKOFF_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._put(me, step, shard)
            except StoreError as error:
                if attempt == MAX_ATTEMPTS:
                    raise StoreError(
                        f"{error.detail} Given up after {attempt} attempts."
                    ) from error
                self._wait_s(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        raise AssertionError("unreachable")

    def _put(self, me: ShardIdentity, step: int, shard: Assembly) -> str:
        """Name under which the shard is now durable."""
        directory = checkpoint_directory(me.job_id, me.run_id, step)
        plain = f"worker_{me.rank}.safetensors"
        # Another generation may have died while writing other bytes under the plain name.
        names = file_names(plain, me.generation, scattered=self._scattered)
        for file in dict.fromkeys((plain, *names)):
            path = f"{directory}/{file}"
            if not exists(self._store, path):
                if file not in names:
                    continue  # elsewhere it may be taken
                if self._create(path, shard):
                    return file
            shard.hash()
            if is_shard(self._store, path, shard.header()):
                return file
        raise StoreError(f"{directory}/{file} exists with other bytes.")

    def _create(self, path: str, shard: Assembly) -> bool:
        """Make the file; False where there is one by now."""
        if not isinstance(self._store, StagingStore):
            shard.hash()
            return self._store.put_if_absent(path, shard.parts()).created
        with self._store.stage(path, shard.size_bytes) as staged:
            shard.write(staged.write)
            staged.sync()
            return staged.publish()


class _Here(Executor):
    """Does the work at once, in the thread that asks for it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _threads(size_bytes: int) -> Executor:
    """What works on a shard of this size."""
    if size_bytes < SMALL_BYTES:
        return _Here()
    return ThreadPoolExecutor(WRITE_THREADS, "shard-write", initializer=give_way)
