"""The client of the HTTP API on aiohttp: a method for each call.

Any node answers for the cluster, so a call goes to one node and moves on to the next when that one cannot be
reached, does not answer in time, or has no leader (``client_transport``, ``failover``). Every write carries an
``Idempotency-Key`` that stays the same over its retries, so it takes effect once.

Answers are the API's JSON documents as ``dict``; refusals are the exceptions of ``distroml.errors``. No torch here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from distroml.client_transport import DEFAULT_TIMEOUT_S, Json, Transport
from distroml.errors import Conflict, Unavailable
from distroml.failover import DEFAULT_URL
from distroml.model import TERMINAL
from distroml.spec import JobSpec

__all__ = ["AsyncClient", "Json"]

WAIT_POLL_S = 0.25
SAVE_TIMEOUT_S = 300.0
"""How long a checkpoint that was asked for is waited for."""
LONG_TIMEOUT_S = 4 * 3600.0
"""Bound of calls that read whole checkpoints; a node that says nothing is given up much earlier."""

_TERMINAL_NAMES = frozenset(status.value for status in TERMINAL)


class AsyncClient:
    """Talks to a cluster through whichever of ``urls`` answers.

    Args:
        urls: base URLs, or one comma-separated string; default: ``DISTROML_URL``, then http://127.0.0.1:8101.
        timeout_s: bound of each call, all retries included.

    Raises (all methods):
        Unavailable: no node answered in time; names all URLs tried. OutcomeUnknown where a write may have happened.
        DistroMLError: the subclass for the problem document that a node answered with.
    """

    def __init__(
        self, urls: str | Sequence[str] | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        if urls is None:
            urls = os.environ.get("DISTROML_URL") or DEFAULT_URL
        named = [urls] if isinstance(urls, str) else urls
        self._transport = Transport(named, timeout_s)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def urls(self) -> tuple[str, ...]:
        """The nodes that may be asked."""
        return self._transport.urls

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    # -- jobs

    async def submit(self, spec: JobSpec | Json | bytes, *, key: str | None = None) -> Json:
        """Submit a job; the answer is the new job.

        Args:
            spec: a JobSpec, its JSON document, or that as bytes.
            key: an Idempotency-Key of your own, to retry across processes; default: a fresh one.
        """
        body = spec if isinstance(spec, bytes) else msgspec.json.encode(spec)
        return await self._transport.call("POST", "/api/jobs", body=body, key=key or _new_key())

    async def jobs(
        self, *, status: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Json:
        """One page of jobs: ``{"jobs": [...], "next_cursor": ...}``."""
        return await self._transport.call(
            "GET", "/api/jobs", params={"status": status, "limit": limit, "cursor": cursor}
        )

    async def job(self, job_id: str) -> Json:
        """One job with its workers and result."""
        return await self._transport.call("GET", _path(job_id))

    async def cancel(self, job_id: str, *, key: str | None = None) -> Json:
        """End an active job now.

        Raises:
            Conflict: the job is already COMPLETED or FAILED (``remove`` forgets it).
        """
        return await self._delete(job_id, "cancel", key)

    async def remove(self, job_id: str, *, key: str | None = None) -> Json:
        """Forget a finished job.

        Raises:
            Conflict: the job is still active (``cancel`` ends it).
        """
        return await self._delete(job_id, "remove", key)

    async def stop(self, job_id: str, *, key: str | None = None) -> Json:
        """End an active job after a final checkpoint."""
        return await self._transport.call("POST", _path(job_id, "stop"), key=key or _new_key())

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Json:
        """The job once it is COMPLETED, FAILED or CANCELLED; outages on the way are sat out.

        Raises:
            TimeoutError: it was not finished within ``timeout_s`` (None: no bound).
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        status, trouble = "unknown", ""
        while deadline is None or time.monotonic() < deadline:
            try:
                job = await self.job(job_id)
            except Unavailable as error:
                trouble = f"; last trouble: {error.detail}"
            else:
                status, trouble = str(job.get("status")), ""
                if status in _TERMINAL_NAMES:
                    return job
            await asyncio.sleep(WAIT_POLL_S)
        raise TimeoutError(
            f"Job {job_id} was not finished after {timeout_s:g} s; its status was {status}{trouble}."
        )

    # -- what a job left behind

    async def metrics(
        self,
        job_id: str,
        *,
        name: str | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        max_points: int | None = None,
    ) -> Json:
        """Series of a job's metrics, thinned to ``max_points``."""
        params = {
            "name": name, "from_step": from_step, "to_step": to_step, "max_points": max_points,
        }  # fmt: skip
        return await self._transport.call("GET", _path(job_id, "metrics"), params=params)

    async def logs(self, job_id: str, *, rank: int | None = None, tail: int | None = None) -> Json:
        """The last ``tail`` lines that the workers (or one rank) wrote."""
        params = {"rank": rank, "tail": tail}
        return await self._transport.call("GET", _path(job_id, "logs"), params=params)

    async def checkpoints(self, job_id: str) -> Json:
        """The checkpoints of a job that are in the log and kept."""
        return await self._transport.call("GET", _path(job_id, "checkpoints"))

    async def checkpoint(self, job_id: str, step: int) -> Json:
        """One checkpoint with its files and tensors."""
        return await self._transport.call("GET", _path(job_id, "checkpoints", str(step)))

    async def request_checkpoint(self, job_id: str, *, key: str | None = None) -> Json:
        """Have a running job save a checkpoint at the next step boundary; does not wait for it.

        Raises:
            Conflict: the job does not run, or saves no checkpoints.
        """
        return await self._transport.call(
            "POST", _path(job_id, "checkpoint"), key=key or _new_key()
        )

    async def checkpoint_now(self, job_id: str, timeout_s: float = SAVE_TIMEOUT_S) -> Json:
        """Have a running job save a checkpoint, and wait for its commit; the checkpoint.

        Where the job ends meanwhile, its final checkpoint is the answer.

        Raises:
            Conflict: the job does not run, saves no checkpoints, or ended without one.
            TimeoutError: none was committed within ``timeout_s``; it may be later.
        """
        deadline = time.monotonic() + timeout_s
        request = (await self.request_checkpoint(job_id))["save_request"]
        trouble = ""
        while time.monotonic() < deadline:
            try:
                job, page = await self.job(job_id), await self.checkpoints(job_id)
            except Unavailable as error:
                trouble = f"; last trouble: {error.detail}"
            else:
                ended = job["status"] in _TERMINAL_NAMES
                if (found := _answering(page, job, request, ended=ended)) is not None:
                    return found
                if ended:
                    raise Conflict(
                        f"Job {job_id} is {job['status']} and saved no checkpoint meanwhile: {job['reason']}",
                        status=job["status"],
                    )
            await asyncio.sleep(WAIT_POLL_S)
        raise TimeoutError(
            f"Job {job_id} has not committed a checkpoint within {timeout_s:g} s{trouble}; it goes on trying."
        )

    async def remove_checkpoint(self, job_id: str, step: int, *, key: str | None = None) -> None:
        """Forget a checkpoint; its files are deleted soon.

        Raises:
            Conflict: it is the newest of a job that goes on, or another checkpoint or job needs it.
        """
        path = _path(job_id, "checkpoints", str(step))
        await self._transport.call("DELETE", path, key=key or _new_key())

    async def verify_checkpoint(
        self, job_id: str, step: int, timeout_s: float = LONG_TIMEOUT_S
    ) -> Json:
        """Have a node compare every byte with what was committed: ``{"ok": …, "files": […]}``."""
        path = _path(job_id, "checkpoints", str(step), "verify")
        return await self._transport.call("POST", path, timeout_s=timeout_s)

    async def export_checkpoint(
        self,
        job_id: str,
        step: int,
        target: str | Path,
        *,
        everything: bool = False,
        timeout_s: float = LONG_TIMEOUT_S,
    ) -> int:
        """Fetch one plain, verified safetensors file; its size in bytes.

        Args:
            everything: the optimizer's tensors too, under the prefix ``optimizer.``.

        Raises:
            OSError: ``target`` cannot be written.
        """
        path = _path(job_id, "checkpoints", str(step), "export")
        params = {"all": "true" if everything else None}
        return await self._transport.download(
            path, Path(target), params=params, timeout_s=timeout_s
        )

    async def import_checkpoints(
        self,
        store: str,
        *,
        job: str | None = None,
        verify: bool = False,
        timeout_s: float = LONG_TIMEOUT_S,
    ) -> Json:
        """Register the checkpoints that a store has, as those of jobs which have ended; may be repeated.

        Args:
            store: as in a spec's ``checkpointing.store``.
            job: only this one's.
            verify: read every byte first, and leave out what does not match.
        """
        body = msgspec.json.encode({"store": store, "job": job, "verify": verify})
        return await self._transport.call(
            "POST", "/api/checkpoints/import", body=body, timeout_s=timeout_s
        )

    async def incidents(self, job_id: str) -> Json:
        """What failed, why, and how long each recovery took."""
        return await self._transport.call("GET", _path(job_id, "incidents"))

    def stream(
        self, job_id: str, cursor: str | None = None, *, types: Sequence[str] = ()
    ) -> AsyncGenerator[Json, None]:
        """Events of a job, through the end event; goes on at another node when one dies.

        Args:
            cursor: of the last event seen, to go on after it; ``now``: the present state, then only what is new;
                None: all that is kept.
            types: of metric, state, log, checkpoint and resource; all by default. ``end`` always comes.

        Raises:
            Unavailable: no node could be reached for ``timeout_s``.
        """
        return self._transport.stream(_path(job_id), cursor, types)

    # -- the cluster

    async def nodes(self) -> Json:
        """All nodes that the cluster knows."""
        return await self._transport.call("GET", "/api/cluster/nodes")

    async def workers(self) -> Json:
        """All worker processes."""
        return await self._transport.call("GET", "/api/cluster/workers")

    async def resources(self) -> Json:
        """Slots, memory and processor use of each node."""
        return await self._transport.call("GET", "/api/cluster/resources")

    async def leader(self) -> Json:
        """Who leads: ``{"leader": name or None, "term": ...}``."""
        return await self._transport.call("GET", "/api/cluster/leader")

    async def transfer_leadership(self, node: str | None = None) -> Json:
        """Hand leadership to ``node``, by default to any other voter; answers like ``leader``.

        Raises:
            NotFound: there is no such node.
            Conflict: it does not vote, or did not take over in time.
        """
        body = msgspec.json.encode({"node": node})
        return await self._transport.call("POST", "/api/cluster/leader", body=body)

    async def drain(self, node: str, *, undo: bool = False) -> Json:
        """Have the ranks of ``node`` moved elsewhere after a whole step, or let it have some again; all nodes.

        Raises:
            NotFound: there is no such node.
            Conflict: it is to be drained and is lost or has left.
        """
        body = msgspec.json.encode({"drain": not undo})
        path = f"/api/cluster/nodes/{quote(node, safe='')}/drain"
        return await self._transport.call("POST", path, body=body)

    async def health(self) -> Json:
        """Health of the node that answers."""
        return await self._transport.call("GET", "/health")

    async def ready(self) -> Json:
        """Readiness of the first node that is ready; Unavailable while none is."""
        return await self._transport.call("GET", "/ready")

    # -- one call

    async def _delete(self, job_id: str, only: str, key: str | None) -> Json:
        """DELETE alone means cancel or forget by the job's state: say which."""
        return await self._transport.call(
            "DELETE", _path(job_id), params={"only": only}, key=key or _new_key()
        )


def _answering(page: Json, job: Json, request: int, *, ended: bool) -> Json | None:
    """The first checkpoint that answers a request for one; of a job that ended its final one does."""
    rows: list[Json] = [row for row in page["checkpoints"] if row["status"] == "COMMITTED"]
    if page["saved_request"] >= request:
        return next((row for row in rows if row["save_request"] >= request), rows[-1])
    final = (job.get("result") or {}).get("checkpoint_step")
    return next((row for row in rows if ended and row["step"] == final), None)


def _path(job_id: str, *parts: str) -> str:
    return "/".join(("/api/jobs", quote(job_id, safe=""), *parts))


def _new_key() -> str:
    return secrets.token_hex(16)
