"""All that remains of a job once it is over, read through the API: its result, losses, checkpoints and incidents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any

from chaos.api import Answer, Api
from chaos.records import Incident, JobEnded
from chaos.target import Target

END_TIMEOUT_S = 120.0
READ_TIMEOUT_S = 30.0
"""In which a cluster that is whole again must answer a read, tries included."""
VERIFY_TIMEOUT_S = 20.0
POLL_S = 0.25
MAX_POINTS = 10_000
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")


async def until_ended(
    target: Target, api: Api, job_ids: Iterable[str], timeout_s: float
) -> dict[str, str]:
    """The state of each job once all have ended, or as they are after ``timeout_s``."""
    deadline = target.clock() + timeout_s
    states = dict.fromkeys(job_ids, "")
    while waiting := [job_id for job_id, state in states.items() if state not in TERMINAL]:
        for job_id in waiting:
            answer = await somewhere(target, api, f"/api/jobs/{job_id}")
            if answer.ok:
                states[job_id] = str(answer.body["status"])
        if target.clock() >= deadline:
            break
        await asyncio.sleep(POLL_S)
    return states


async def read_ended(
    target: Target, api: Api, job_id: str, *, undisturbed: bool = False
) -> JobEnded:
    """What remains of a job; what could not be read is told in ``error``."""
    ask = _Patient(target, api)
    job = await ask(f"/api/jobs/{job_id}", consistency="linearizable")
    if job is None:
        return JobEnded(
            at_s=target.clock(),
            job_id=job_id,
            spec_name="",
            undisturbed=undisturbed,
            state="",
            losses={},
            samples={},
            model_sha256=None,
            error=ask.error,
        )
    view, index = job
    result = view["result"] or {}
    completed = view["status"] == "COMPLETED"
    page = await ask(f"/api/jobs/{job_id}/checkpoints", consistency="linearizable")
    rows = page[0]["checkpoints"] if page else []
    verified, samples = await _examined(ask, job_id, rows)
    if completed:
        samples[int(result["step"])] = str(result["sample_digest"])
    return JobEnded(
        at_s=target.clock(),
        job_id=job_id,
        spec_name=view["name"],
        undisturbed=undisturbed,
        state=view["status"],
        losses=await _losses(ask, job_id),
        samples=samples,
        model_sha256=str(result["state_digest"]) if completed else None,
        checkpoints=verified,
        error=ask.error,
        total_steps=view["total_steps"],
        checkpoint_generations={row["step"]: row["generation"] for row in rows},
        corrupt={row["step"]: row["reason"] for row in rows if row["status"] != "COMMITTED"},
        save_request=page[0]["save_request"] if page else 0,
        reason=view["reason"],
        log_index=index,
    )


async def read_incidents(target: Target, api: Api, job_id: str) -> list[Incident]:
    """The recoveries of a job, placed on the clock of the run."""
    ask = _Patient(target, api)
    page = await ask(f"/api/jobs/{job_id}/incidents")
    now_s = target.clock()
    return [
        incident_of(job_id, one, now_s, now_s - time.time())
        for one in (page[0]["incidents"] if page else [])
    ]


def incident_of(job_id: str, view: dict[str, Any], now_s: float, offset_s: float) -> Incident:
    """An incident of the API as a record.

    Its marks are of the nodes' clocks. Where one of these had jumped out of the run, how long it took cannot be told.

    Args:
        now_s: on the clock of the run; ``offset_s``: that clock less Unix time.
    """
    at_s = _unix(view["observed_at"]) + offset_s
    total_ms = view["phases_ms"].get("total")
    plausible = 0.0 <= at_s <= now_s and (total_ms or 0.0) <= 1000 * now_s
    phases_ms = {name: took for name, took in view["phases_ms"].items() if name != "total"}
    return Incident(
        at_s=round(at_s, 3) if 0.0 <= at_s <= now_s else now_s,
        job_id=job_id,
        generation=view["generation"],
        reason=view["reason"],
        phases_ms=phases_ms if plausible else {},
        total_ms=total_ms if plausible else None,
        steps_lost=view["steps_lost"],
        next_generation=view["next_generation"],
        resume_step=view["resume_step"],
        highest_step=view["highest_step"],
        culprit=_culprit(view["cause"]),
        recovered=total_ms is not None,
    )


def _culprit(cause: dict[str, Any]) -> str:
    node, pid = cause["node"], cause["pid"]
    return "" if node is None or pid is None else f"process {pid} of node {node}"


async def _examined(
    ask: _Patient, job_id: str, rows: list[dict[str, Any]]
) -> tuple[dict[int, str], dict[int, str]]:
    """What is wrong with each checkpoint ("": nothing), and which samples each stands for."""
    verified: dict[int, str] = {}
    samples: dict[int, str] = {}
    for row in rows:
        step, path = int(row["step"]), f"/api/jobs/{job_id}/checkpoints/{row['step']}"
        verified[step] = await ask.verdict(f"{path}/verify")
        if not verified[step] and (detail := await ask(path)) is not None:
            samples[step] = str(detail[0]["sample_digest"])
    return verified, samples


async def _losses(ask: _Patient, job_id: str) -> dict[int, str]:
    page = await ask(f"/api/jobs/{job_id}/metrics", name="loss", max_points=MAX_POINTS)
    series = page[0]["series"] if page else []
    return {
        int(step): "nan" if value is None else float(value).hex()
        for one in series
        for step, value in zip(one["steps"], one["values"], strict=True)
    }


class _Patient:
    """Reads that go on, from node to node, until one answers; remembers what could not be had."""

    def __init__(self, target: Target, api: Api) -> None:
        self._target = target
        self._api = api
        self.error = ""

    async def __call__(self, path: str, **params: Any) -> tuple[Any, int | None] | None:
        """Body and log index of the answer."""
        answer = await self._until(lambda url: self._api.get(url, path, **params))
        if not answer.ok:
            self.error = f"{path}: {answer.error}"
            return None
        return answer.body, answer.index

    async def verdict(self, path: str) -> str:
        """What a verification found; "" where every byte is right."""
        answer = await self._until(
            lambda url: self._api.ask("POST", url, path, timeout_s=VERIFY_TIMEOUT_S)
        )
        if not answer.ok:
            return answer.error or "it could not be verified"
        wrong = [
            f"{one['path']}: {one['problem']}" for one in answer.body["files"] if one["problem"]
        ]
        return "" if answer.body["ok"] else "; ".join(wrong) or "it does not verify"

    async def _until(self, once: Callable[[str], Awaitable[Answer]]) -> Answer:
        deadline = self._target.clock() + READ_TIMEOUT_S
        while True:
            for name in sorted(self._target.nodes):
                answer = await once(self._target.nodes[name].url)
                settled = answer.status is not None and answer.status < 500
                if settled and answer.status not in (404, 429):
                    return answer
            if self._target.clock() >= deadline:
                return answer
            await asyncio.sleep(POLL_S)


async def somewhere(target: Target, api: Api, path: str, **params: Any) -> Answer:
    """The answer of the first node that has one; else the last node's."""
    for name in sorted(target.nodes):
        answer = await api.get(target.nodes[name].url, path, timeout_s=2.0, **params)
        if answer.ok:
            break
    return answer


def _unix(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
