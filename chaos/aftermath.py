"""When all faults have been taken back: how the cluster comes back, and what its jobs came to.

``settle`` is called once the last fault has ended, with all nodes running. It measures how soon there is a leader and
how soon each job trains on, lets the jobs end, and reads all that the checkers compare. Jobs that were played undisturbed
are read once more with the others: what they came to must have survived.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from chaos.api import Api
from chaos.clients import Recorder
from chaos.ending import END_TIMEOUT_S, TERMINAL, read_ended, read_incidents, somewhere, until_ended
from chaos.following import Follower
from chaos.observers import ACTIVE_STATUSES
from chaos.records import Settled, StateDigest
from chaos.specs import VICTIM
from chaos.target import Target
from chaos.workload import Workload

LEADER_LIMIT_S = 30.0
PROGRESS_LIMIT_S = 60.0
POLL_S = 0.1
STREAM_END_S = 20.0
REFERENCE_STREAM_S = 30.0
DIGEST_LIMIT_S = 20.0
MAX_JOBS = 1000
READ_AT_ONCE = 6

Json = dict[str, Any]


async def settle(
    target: Target,
    workload: Workload,
    *,
    warm: Callable[[], Awaitable[None]] | None = None,
    end_timeout_s: float = END_TIMEOUT_S,
) -> None:
    """Measure the way back, wait for the end of all jobs, and write down what became of them.

    Args:
        warm: waits until the nodes can have workers again: how long a node that was off needs for that is up to the
            machine, and no job can train before.
        end_timeout_s: after which a job that has not ended is cancelled, and told as it was.
    """
    async with Api() as api:
        leader_s = await _until_led(target, api)
        if warm is not None:
            await warm()
        progress_s = await _until_progress(target, api)
        target.history.write(Settled(at_s=target.clock(), leader_s=leader_s, progress_s=progress_s))
        client = Recorder(target, api, "aftermath", random.Random("aftermath"))
        listed = await _listed(client)
        if listed is None:
            await workload.finish(STREAM_END_S)
            return  # it never came back: what was measured says so
        await _end_victims(client, listed)
        await until_ended(target, api, listed, end_timeout_s)
        await workload.finish(STREAM_END_S)
        few = asyncio.Semaphore(READ_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for job_id in await _listed(client) or listed:
                group.create_task(_read(target, api, client, job_id, few))
        await _digests(target, api)


async def _read(
    target: Target, api: Api, client: Recorder, job_id: str, few: asyncio.Semaphore
) -> None:
    """All that remains of one job."""
    async with few:
        for incident in await read_incidents(target, api, job_id):
            target.history.write(incident)
        one = await read_ended(target, api, job_id)
        target.history.write(one)
        if one.spec_name != VICTIM:
            await _reference_streams(target, job_id)
        if one.state not in TERMINAL:
            await client.cancel(job_id)


async def _until_led(target: Target, api: Api) -> float | None:
    """Seconds until some node answered a linearizable read and named the leader."""
    began = target.clock()
    while target.clock() - began < LEADER_LIMIT_S:
        answers = await asyncio.gather(
            *(
                api.get(node.url, "/api/cluster/leader", timeout_s=1.0, consistency="linearizable")
                for node in target.nodes.values()
            )
        )
        if any(answer.ok and answer.body["leader"] for answer in answers):
            return round(target.clock() - began, 3)
        await asyncio.sleep(POLL_S)
    return None


async def _until_progress(target: Target, api: Api) -> dict[str, float | None]:
    """Seconds until each job that was under way when the faults ended completed a step, or ended."""
    began = target.clock()
    took: dict[str, float | None] = {}
    last: dict[str, tuple[int, int] | None] = {}
    views = await _under_way(target, api)
    while views and target.clock() - began < PROGRESS_LIMIT_S:
        for view in views:
            job_id, place = view["job_id"], _place(view)
            took.setdefault(job_id, None)
            if view["status"] in TERMINAL or _moved(last.get(job_id), place):
                took[job_id] = round(target.clock() - began, 3)
            last[job_id] = place
        waiting = [job_id for job_id, took_s in took.items() if took_s is None]
        if not waiting:
            break
        await asyncio.sleep(POLL_S)
        views = [
            answer.body
            for job_id in waiting
            if (answer := await somewhere(target, api, f"/api/jobs/{job_id}")).ok
        ] or views
    return took


def _moved(before: tuple[int, int] | None, now: tuple[int, int] | None) -> bool:
    """Whether a step was completed within one generation."""
    return before is not None and now is not None and now[0] == before[0] and now[1] > before[1]


def _place(view: Json) -> tuple[int, int] | None:
    """Generation and step, once all ranks of the generation are there; None before."""
    ranks = view["workers"]
    there = bool(ranks) and all(rank["pid"] is not None for rank in ranks)
    return (view["generation"], view["step"]) if there else None


async def _under_way(target: Target, api: Api) -> list[Json]:
    """The training jobs that have their slots, or had them when they were struck."""
    answer = await somewhere(
        target, api, "/api/jobs", consistency="linearizable", status=ACTIVE_STATUSES, limit=MAX_JOBS
    )
    jobs: list[Json] = answer.body["jobs"] if answer.ok else []
    return [view for view in jobs if view["status"] != "QUEUED" and view["name"] != VICTIM]


async def _end_victims(client: Recorder, listed: Mapping[str, Json]) -> None:
    """Jobs that nobody knew the id of, or that were not cancelled in time."""
    for job_id, view in listed.items():
        if view["name"] == VICTIM and view["state"] not in TERMINAL:
            await client.cancel(job_id)


async def _listed(client: Recorder) -> dict[str, Json] | None:
    """All jobs, by a linearizable read; None where no node answers one for ``LEADER_LIMIT_S``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LEADER_LIMIT_S):
            while True:
                answer = await client.read_jobs(linearizable=True, limit=MAX_JOBS)
                if answer.ok:
                    return {
                        view["job_id"]: {"name": view["name"], "state": view["status"]}
                        for view in answer.body["jobs"]
                    }
                await asyncio.sleep(POLL_S)
    return None


async def _reference_streams(target: Target, job_id: str) -> None:
    """The streams as they are now, each in one go from one node."""
    node = sorted(target.nodes)[0]
    async with asyncio.TaskGroup() as group:
        for stream in ("metrics", "logs"):
            rng = random.Random(job_id)
            follower = Follower(target, job_id, stream, rng, client="aftermath", restless=False)
            group.create_task(_to_the_end(follower, node))


async def _to_the_end(follower: Follower, node: str) -> None:
    with suppress(TimeoutError):  # then it is recorded as not ended
        async with asyncio.timeout(REFERENCE_STREAM_S):
            await follower.run(reference_node=node)


async def _digests(target: Target, api: Api) -> None:
    """The digest of each node's state, at the same index where they come to one."""
    deadline = target.clock() + DIGEST_LIMIT_S
    while True:
        found: dict[str, StateDigest] = {}
        for node in target.nodes.values():
            answer = await api.get(
                node.url, "/api/cluster/digest", timeout_s=5.0, consistency="linearizable"
            )
            if answer.ok:
                found[node.name] = StateDigest(
                    at_s=target.clock(),
                    node=node.name,
                    log_index=answer.body["index"],
                    sha256=answer.body["sha256"],
                )
        alike = len(found) == len(target.nodes) and len({d.log_index for d in found.values()}) == 1
        if alike or target.clock() >= deadline:
            break
        await asyncio.sleep(POLL_S)
    for digest in found.values():
        target.history.write(digest)
