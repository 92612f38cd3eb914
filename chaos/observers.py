"""Watches the cluster from outside while it runs: what each node says of itself and of the jobs, and what it uses."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from chaos.api import Answer, Api
from chaos.records import JobSeen, LeaderSeen, MemorySeen, NodeSeen
from chaos.target import Node, Target
from distroml.model import ACTIVE

HEALTH_S = 0.4
JOBS_S = 1.0
MEMORY_S = 2.0
ANSWER_S = 1.0
REPEAT_S = 10.0
"""A node that says nothing new is written down so seldom."""
LISTED_JOBS = 100
ACTIVE_STATUSES = ",".join(sorted(ACTIVE))
_PROC = Path("/proc")


class Observers:
    """One watcher per node, and one of processes."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._said: dict[str, NodeSeen] = {}
        self._led: set[tuple[str, int]] = set()
        self._jobs: dict[tuple[str, str], JobSeen] = {}
        self._active: dict[str, set[str]] = {node: set() for node in target.nodes}
        """Jobs that a node showed as active when it was last asked."""
        self._stepped: dict[str, float] = {}
        """When a job's step was last written, by id."""

    async def run_until(self, stop: asyncio.Event) -> None:
        """Watch until ``stop``: best until all has been read that remains, so that the way back is seen too."""
        async with Api() as api, asyncio.TaskGroup() as group:
            for node in self._target.nodes.values():
                group.create_task(_each(HEALTH_S, stop, lambda node=node: self._health(api, node)))
                group.create_task(_each(JOBS_S, stop, lambda node=node: self._list(api, node)))
            group.create_task(_each(MEMORY_S, stop, self._memory))

    # --- nodes ---------------------------------------------------------------------------------------------------

    async def _health(self, api: Api, node: Node) -> None:
        answer = await api.get(node.url, "/health", timeout_s=ANSWER_S)
        seen = _said(self._target.clock(), node.name, answer)
        before = self._said.get(node.name)
        if (
            before is None
            or seen.at_s - before.at_s >= REPEAT_S
            or seen != replace(before, at_s=seen.at_s, applied_index=seen.applied_index)
        ):
            self._said[node.name] = seen
            self._target.history.write(seen)
        if seen.role == "leader" and (node.name, seen.term) not in self._led:
            self._led.add((node.name, seen.term))
            self._target.history.write(LeaderSeen(at_s=seen.at_s, node=node.name, term=seen.term))

    # --- jobs ----------------------------------------------------------------------------------------------------

    async def _list(self, api: Api, node: Node) -> None:
        """All active jobs, and a last look at each that is active no more."""
        answer = await api.get(
            node.url, "/api/jobs", timeout_s=ANSWER_S, limit=LISTED_JOBS, status=ACTIVE_STATUSES
        )
        if not answer.ok:
            return
        active = {view["job_id"] for view in answer.body["jobs"]}
        for view in answer.body["jobs"]:
            self._look(node, view, answer.index)
        for job_id in self._active[node.name] - active:
            last = await api.get(node.url, f"/api/jobs/{job_id}", timeout_s=ANSWER_S)
            if last.ok:
                self._look(node, last.body, last.index)
            else:
                active.add(job_id)  # it is looked for again
        self._active[node.name] = active

    def _look(self, node: Node, view: dict[str, Any], index: int | None) -> None:
        seen = _job(self._target.clock(), node.name, view, index)
        before = self._jobs.get((node.name, seen.job_id))
        if before is not None and before == replace(
            seen, at_s=before.at_s, step=before.step, log_index=before.log_index
        ):
            stepped = seen.step != before.step
            if not stepped or seen.at_s - self._stepped.get(seen.job_id, 0.0) < JOBS_S:
                return
        self._stepped[seen.job_id] = seen.at_s
        self._jobs[node.name, seen.job_id] = seen
        self._target.history.write(seen)

    # --- processes -----------------------------------------------------------------------------------------------

    async def _memory(self) -> None:
        for node in self._target.nodes.values():
            if (pid := node.pid) is not None:
                with suppress(OSError, ValueError):  # it is just ending
                    self._target.history.write(measured(self._target.clock(), node.name, pid))


def measured(at_s: float, node: str, pid: int) -> MemorySeen:
    """What a process uses now.

    Raises:
        OSError, ValueError: it is gone, or going.
    """
    place = _PROC / str(pid)
    fields = dict(
        line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line
    )
    return MemorySeen(
        at_s=at_s,
        node=node,
        pid=pid,
        rss_bytes=int(fields.get("VmRSS", "x").split()[0]) * 1024,
        files=len(os.listdir(place / "fd")),
        threads=int(fields["Threads"]),
    )


def _said(at_s: float, node: str, answer: Answer) -> NodeSeen:
    if not answer.ok:
        return NodeSeen(at_s=at_s, node=node, answers=False, reason=answer.error)
    health = answer.body
    return NodeSeen(
        at_s=at_s,
        node=node,
        answers=True,
        role=str(health["role"]),
        term=health["term"],
        leader=health["leader"],
        applied_index=health["applied_index"],
        incarnation=health["details"].get("incarnation", 0),
        reason=health["reason"],
    )


def _job(at_s: float, node: str, view: dict[str, Any], index: int | None) -> JobSeen:
    generation = view["current_generation"]
    return JobSeen(
        at_s=at_s,
        node=node,
        job_id=view["job_id"],
        name=view["name"],
        state=view["status"],
        generation=view["generation"],
        step=view["step"],
        restarts=view["restarts"],
        log_index=index,
        planned=bool(generation and generation["planned"]),
        checkpoint=view["checkpoints"]["newest_step"],
    )


async def _each(period_s: float, stop: asyncio.Event, once: Any) -> None:
    """Call ``once`` every ``period_s`` (later where it takes longer) until ``stop``."""
    while not stop.is_set():
        await once()
        with suppress(TimeoutError):
            async with asyncio.timeout(period_s):
                await stop.wait()
