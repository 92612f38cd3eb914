"""The client of the HTTP API: ``AsyncClient`` (``client_async``), and ``Client``, its synchronous face."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from distroml.client_async import LONG_TIMEOUT_S, SAVE_TIMEOUT_S, AsyncClient, Json
from distroml.client_transport import DEFAULT_TIMEOUT_S
from distroml.spec import JobSpec

__all__ = ["SAVE_TIMEOUT_S", "AsyncClient", "Client", "Json"]

_T = TypeVar("_T")

CLOSE_TIMEOUT_S = 5.0


class Client:
    """The synchronous face of ``AsyncClient``: the same methods, run in a loop thread of its own.

    Safe to use from several threads and inside a running event loop (a notebook). Close it, or use ``with``.
    """

    def __init__(
        self, urls: str | Sequence[str] | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self._client = AsyncClient(urls, timeout_s=timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="distroml-client", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def urls(self) -> tuple[str, ...]:
        """The nodes that may be asked."""
        return self._client.urls

    def close(self) -> None:
        """End what is under way and close all connections."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()

    def submit(self, spec: JobSpec | Json | bytes, *, key: str | None = None) -> Json:
        """See ``AsyncClient.submit``."""
        return self._run(self._client.submit(spec, key=key))

    def jobs(
        self, *, status: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Json:
        """See ``AsyncClient.jobs``."""
        return self._run(self._client.jobs(status=status, limit=limit, cursor=cursor))

    def job(self, job_id: str) -> Json:
        """See ``AsyncClient.job``."""
        return self._run(self._client.job(job_id))

    def cancel(self, job_id: str, *, key: str | None = None) -> Json:
        """See ``AsyncClient.cancel``."""
        return self._run(self._client.cancel(job_id, key=key))

    def remove(self, job_id: str, *, key: str | None = None) -> Json:
        """See ``AsyncClient.remove``."""
        return self._run(self._client.remove(job_id, key=key))

    def stop(self, job_id: str, *, key: str | None = None) -> Json:
        """See ``AsyncClient.stop``."""
        return self._run(self._client.stop(job_id, key=key))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Json:
        """See ``AsyncClient.wait``."""
        return self._run(self._client.wait(job_id, timeout_s))

    def metrics(
        self,
        job_id: str,
        *,
        name: str | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        max_points: int | None = None,
    ) -> Json:
        """See ``AsyncClient.metrics``."""
        return self._run(
            self._client.metrics(
                job_id, name=name, from_step=from_step, to_step=to_step, max_points=max_points
            )
        )

    def logs(self, job_id: str, *, rank: int | None = None, tail: int | None = None) -> Json:
        """See ``AsyncClient.logs``."""
        return self._run(self._client.logs(job_id, rank=rank, tail=tail))

    def checkpoints(self, job_id: str) -> Json:
        """See ``AsyncClient.checkpoints``."""
        return self._run(self._client.checkpoints(job_id))

    def checkpoint(self, job_id: str, step: int) -> Json:
        """See ``AsyncClient.checkpoint``."""
        return self._run(self._client.checkpoint(job_id, step))

    def request_checkpoint(self, job_id: str, *, key: str | None = None) -> Json:
        """See ``AsyncClient.request_checkpoint``."""
        return self._run(self._client.request_checkpoint(job_id, key=key))

    def checkpoint_now(self, job_id: str, timeout_s: float = SAVE_TIMEOUT_S) -> Json:
        """See ``AsyncClient.checkpoint_now``."""
        return self._run(self._client.checkpoint_now(job_id, timeout_s))

    def remove_checkpoint(self, job_id: str, step: int, *, key: str | None = None) -> None:
        """See ``AsyncClient.remove_checkpoint``."""
        self._run(self._client.remove_checkpoint(job_id, step, key=key))

    def verify_checkpoint(self, job_id: str, step: int, timeout_s: float = LONG_TIMEOUT_S) -> Json:
        """See ``AsyncClient.verify_checkpoint``."""
        return self._run(self._client.verify_checkpoint(job_id, step, timeout_s))

    def export_checkpoint(
        self,
        job_id: str,
        step: int,
        target: str | Path,
        *,
        everything: bool = False,
        timeout_s: float = LONG_TIMEOUT_S,
    ) -> int:
        """See ``AsyncClient.export_checkpoint``."""
        return self._run(
            self._client.export_checkpoint(
                job_id, step, target, everything=everything, timeout_s=timeout_s
            )
        )

    def import_checkpoints(
        self,
        store: str,
        *,
        job: str | None = None,
        verify: bool = False,
        timeout_s: float = LONG_TIMEOUT_S,
    ) -> Json:
        """See ``AsyncClient.import_checkpoints``."""
        return self._run(
            self._client.import_checkpoints(store, job=job, verify=verify, timeout_s=timeout_s)
        )

    def incidents(self, job_id: str) -> Json:
        """See ``AsyncClient.incidents``."""
        return self._run(self._client.incidents(job_id))

    def stream(
        self, job_id: str, cursor: str | None = None, *, types: Sequence[str] = ()
    ) -> Iterator[Json]:
        """See ``AsyncClient.stream``."""
        events = self._client.stream(job_id, cursor, types=types)
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._run(events.aclose())

    def nodes(self) -> Json:
        """See ``AsyncClient.nodes``."""
        return self._run(self._client.nodes())

    def workers(self) -> Json:
        """See ``AsyncClient.workers``."""
        return self._run(self._client.workers())

    def resources(self) -> Json:
        """See ``AsyncClient.resources``."""
        return self._run(self._client.resources())

    def leader(self) -> Json:
        """See ``AsyncClient.leader``."""
        return self._run(self._client.leader())

    def transfer_leadership(self, node: str | None = None) -> Json:
        """See ``AsyncClient.transfer_leadership``."""
        return self._run(self._client.transfer_leadership(node))

    def drain(self, node: str, *, undo: bool = False) -> Json:
        """See ``AsyncClient.drain``."""
        return self._run(self._client.drain(node, undo=undo))

    def health(self) -> Json:
        """See ``AsyncClient.health``."""
        return self._run(self._client.health())

    def ready(self) -> Json:
        """See ``AsyncClient.ready``."""
        return self._run(self._client.ready())

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()


async def _next(events: AsyncGenerator[Json, None]) -> Json | None:
    return await anext(events, None)
