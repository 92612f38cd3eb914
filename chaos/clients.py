"""A client of the cluster that keeps a record of each operation: whom it asked, when, and what it knows of the outcome.

Writes are tried again under the same idempotency key until it is known what came of them, as a careful user would do.
Each try is a record of its own, since each may have had an effect by itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from chaos.api import Answer, Api
from chaos.records import Operation
from chaos.target import Target

READ_TIMEOUT_S = 4.0
WRITE_TIMEOUT_S = 6.0
WRITE_TRIES = 12
"""Then the outcome stays unknown."""
RETRY_S = (0.1, 0.6)
REPEATED_EVERY = 2
"""One of so many submitted jobs is submitted again under the same key."""
LIST_LIMIT = 15

Result = dict[str, Any]


class Recorder:
    """One client, named in its records, that asks nodes which it draws.

    Args:
        rng: its own, so that what it wants depends on the seed and not on the others.
    """

    def __init__(self, target: Target, api: Api, name: str, rng: random.Random) -> None:
        self.name = name
        self.rng = rng
        self._target = target
        self._api = api
        self._keys = self._submitted = 0

    def node(self) -> str:
        """A node, drawn."""
        return self.rng.choice(sorted(self._target.nodes))

    def new_key(self) -> str:
        """An idempotency key that nobody else uses in this run."""
        self._keys += 1
        return f"{self.name}-{self._keys}-{self.rng.getrandbits(32):08x}"

    # --- writes --------------------------------------------------------------------------------------------------

    async def submit(self, name: str, spec: dict[str, Any]) -> str | None:
        """Id of the new job; None where it stayed unknown whether there is one.

        Some requests are repeated though they were answered, as by a client that lost the answer: still one job.
        """

        async def once(key: str) -> Answer:
            return await self._do(
                "submit", "POST", "/api/jobs", key=key, body=spec, shown=_shown_job, name=name
            )

        key = self.new_key()
        answer = await self._insist(once, key)
        self._submitted += 1
        if answer is not None and answer.ok and self._submitted % REPEATED_EVERY == 0:
            await once(key)
        return str(answer.body["job_id"]) if answer is not None and answer.ok else None

    async def cancel(self, job_id: str) -> Answer | None:
        """Cancel a job that does not end by itself."""
        return await self._insist(
            lambda key: self._on_job("cancel", "DELETE", "?only=cancel", job_id, key)
        )

    async def stop(self, job_id: str) -> Answer | None:
        """End a job after a final checkpoint."""
        return await self._insist(lambda key: self._on_job("stop", "POST", "/stop", job_id, key))

    async def checkpoint_now(self, job_id: str) -> Answer | None:
        """Ask for a checkpoint; the answer has the number of the request."""
        return await self._insist(
            lambda key: self._on_job("checkpoint_now", "POST", "/checkpoint", job_id, key)
        )

    async def _on_job(self, kind: str, method: str, tail: str, job_id: str, key: str) -> Answer:
        return await self._do(
            kind,
            method,
            f"/api/jobs/{job_id}{tail}",
            key=key,
            shown=_shown_request if kind == "checkpoint_now" else _shown_job,
            job_id=job_id,
        )

    async def _insist(
        self, once: Callable[[str], Awaitable[Answer]], key: str = ""
    ) -> Answer | None:
        """The first answer that settles the matter; None where it stayed open."""
        key = key or self.new_key()
        for _ in range(WRITE_TRIES):
            answer = await once(key)
            refused = answer.status is not None and 400 <= answer.status < 500
            if answer.ok or (refused and answer.status not in (408, 429)):
                return answer
            await asyncio.sleep(self.rng.uniform(*RETRY_S))
        return None

    # --- reads ---------------------------------------------------------------------------------------------------

    async def read_job(self, job_id: str, *, linearizable: bool, node: str | None = None) -> Answer:
        """One job."""
        return await self._do(
            "read_job",
            "GET",
            f"/api/jobs/{job_id}",
            linearizable=linearizable,
            shown=_shown_job,
            job_id=job_id,
            node=node,
        )

    async def read_jobs(
        self, *, linearizable: bool, node: str | None = None, limit: int = LIST_LIMIT
    ) -> Answer:
        """The newest jobs."""
        return await self._do(
            "read_jobs",
            "GET",
            "/api/jobs",
            linearizable=linearizable,
            shown=_shown_jobs,
            node=node,
            limit=limit,
        )

    async def read_checkpoints(
        self, job_id: str, *, linearizable: bool, node: str | None = None
    ) -> Answer:
        """The committed checkpoints of a job."""
        return await self._do(
            "read_checkpoints",
            "GET",
            f"/api/jobs/{job_id}/checkpoints",
            linearizable=linearizable,
            shown=_shown_checkpoints,
            job_id=job_id,
            node=node,
        )

    async def _do(
        self,
        kind: str,
        method: str,
        path: str,
        *,
        shown: Callable[[Any], Result],
        key: str | None = None,
        body: Any = None,
        job_id: str | None = None,
        name: str | None = None,
        linearizable: bool = False,
        node: str | None = None,
        limit: int | None = None,
    ) -> Answer:
        node = self.node() if node is None else node
        invoked_s = self._target.clock()
        answer = await self._api.ask(
            method,
            self._target.nodes[node].url,
            path,
            key=key,
            body=body,
            params={"consistency": "linearizable" if linearizable else None, "limit": limit},
            timeout_s=READ_TIMEOUT_S if method == "GET" else WRITE_TIMEOUT_S,
        )
        result = shown(answer.body) if answer.ok and answer.body is not None else {}
        if name is not None:
            result["name"] = name
        if job_id is None and kind == "submit" and answer.ok:
            job_id = answer.body["job_id"]
        self._target.history.write(
            Operation(
                invoked_s=invoked_s,
                at_s=self._target.clock(),
                client=self.name,
                node=node,
                kind=kind,
                linearizable=linearizable,
                outcome=answer.outcome,
                job_id=job_id,
                key=key,
                log_index=answer.index,
                status=answer.status,
                result=result,
                error=answer.error,
            )
        )
        return answer


def _shown_job(view: Any) -> Result:
    """What the log alone decides of a job's view; the step is observed, not agreed on."""
    return {
        "name": view["name"],
        "state": view["status"],
        "generation": view["generation"],
        "restarts": view["restarts"],
        "incidents": view["incidents"],
        "checkpoint": view["checkpoints"]["newest_step"],
        "step": view["step"],
    }


def _shown_jobs(page: Any) -> Result:
    return {
        "jobs": {view["job_id"]: _shown_job(view) for view in page["jobs"]},
        "whole": page["next_cursor"] is None,
    }


def _shown_checkpoints(page: Any) -> Result:
    return {
        "checkpoints": {
            str(row["step"]): [row["generation"], row["status"]] for row in page["checkpoints"]
        },
        "save_request": page["save_request"],
        "saved_request": page["saved_request"],
    }


def _shown_request(view: Any) -> Result:
    return {"save_request": view["save_request"], "saved_request": view["saved_request"]}
