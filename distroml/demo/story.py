"""What happens in the demo, in order; every wait has a name, and the whole has one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from msgspec import Struct, field

from distroml.cli.progress import JobProgress
from distroml.cli.watch import follow
from distroml.client import AsyncClient, Json
from distroml.demo.leftovers import Mark, kill
from distroml.errors import DistroMLError, Unavailable
from distroml.local_cluster import LocalCluster
from distroml.model import TERMINAL, NodeStatus

WORKERS = 4
EVERY_N_STEPS = 50
POLL_S = 0.1
CALL_TIMEOUT_S = 10.0
WORKER_FAULT_AT = 0.2
LEADER_FAULT_AT = 0.45
"""Shares of all steps after which the faults come."""

Say = Callable[[str], None]


class DemoFailed(Exception):
    """The story cannot go on; says why."""


class Facts(Struct):
    """Everything that the demo saw; ``report`` prints and judges it."""

    started_at: float
    seed: int
    steps: int
    job: Json = field(default_factory=dict)
    checkpoints: list[Json] = field(default_factory=list)
    incidents: list[Json] = field(default_factory=list)
    killed_worker: Json | None = None
    killed_leader: str | None = None
    new_leader: str | None = None
    node_back: bool = False
    timings_s: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0


class Story:
    """One run of the demo.

    Args:
        cluster: not yet started.
        mark: on all its processes.
        facts: filled in on the way, so that a failure leaves what was known.
        say: shows one line to the person who watches.
        watch: is given the job's progress when there is one, and draws it from then on.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        mark: Mark,
        facts: Facts,
        say: Say,
        watch: Callable[[JobProgress, Json], None],
    ) -> None:
        self._cluster = cluster
        self._mark = mark
        self._facts = facts
        self._say = say
        self._watch = watch
        self._client = AsyncClient(cluster.urls, timeout_s=CALL_TIMEOUT_S)
        self._killed: set[str] = set()
        self.awaited = "all nodes to be ready"

    async def run(self) -> None:
        """Start to finish.

        Raises:
            DemoFailed: something did not come about; TimeoutError is the caller's, ``awaited`` says for what.
        """
        begun = time.monotonic()
        async with self._cluster, self._client:
            await self._greet(begun)
            job = await self._submit()
            progress = JobProgress(job)
            following = asyncio.create_task(self._follow(progress))
            try:
                await self._hurt_worker(progress)
                await self._hurt_leader(progress)
                await self._until("the job's end", lambda: self._ended(progress))
            finally:
                if self._facts.job["status"] not in TERMINAL:
                    self._facts.job = {**progress.job, "status": progress.status}
                following.cancel()
                with suppress(asyncio.CancelledError, DistroMLError):
                    await following
            await self._collect()

    async def _greet(self, begun: float) -> None:
        leader = await self._until("a leader", self._leader)
        self._took("nodes_ready", begun)
        self._say(f"Three nodes serve at {', '.join(self._cluster.urls)}; {leader} leads")

    async def _submit(self) -> Json:
        begun = time.monotonic()
        job = await self._client.submit(spec(self._facts.steps, self._facts.seed))
        self._facts.job = job
        self._say(f"Submitted job {job['job_id']}: {WORKERS} workers, {self._facts.steps} steps")
        job_id = job["job_id"]

        async def training() -> Json | None:
            now = await self._client.job(job_id)
            return now if now["step"] > 0 else None

        running: Json = await self._until("the first step", training)
        self._took("submit_to_first_step", begun)
        return running

    async def _hurt_worker(self, progress: JobProgress) -> None:
        await self._reach(WORKER_FAULT_AT, progress, saved_after=0)
        leader = await self._leader()
        job = await self._client.job(progress.job["job_id"])
        # not the leader's: the two faults shall have nothing in common
        victim = next(
            (w for w in reversed(job["workers"]) if w["pid"] and w["node"] != leader), None
        )
        if victim is None or not self._mark.on(victim["pid"]):
            raise DemoFailed(f"There is no worker to kill: {job['workers']}")
        self._facts.killed_worker = victim
        self._say(
            f"Kill 1: SIGKILL to worker {victim['rank']} (pid {victim['pid']}) on {victim['node']}"
        )
        begun = time.monotonic()
        kill(victim["pid"])
        await self._until(
            "the recovery from the worker's death", lambda: self._recovered(1, progress)
        )
        self._took("worker_recovered", begun)

    async def _hurt_leader(self, progress: JobProgress) -> None:
        newest = (await self._client.job(progress.job["job_id"]))["checkpoints"]["newest_step"]
        await self._reach(LEADER_FAULT_AT, progress, saved_after=newest or 0)
        leader = await self._until("a leader", self._leader)
        job = await self._client.job(progress.job["job_id"])
        ranks = [w for w in job["workers"] if w["node"] == leader and w["pid"]]
        self._facts.killed_leader = leader
        self._say(
            f"Kill 2: SIGKILL to the leader, node {leader}, with its workers "
            f"({', '.join(str(w['rank']) for w in ranks) or 'none'})"
        )
        begun = time.monotonic()
        # at once, as if the host lost power
        self._killed.add(leader)
        self._cluster.nodes[leader].kill()
        for pid in [worker["pid"] for worker in ranks if self._mark.on(worker["pid"])]:
            kill(pid)

        async def another() -> str | None:
            name = await self._leader()
            return name if name != leader else None

        self._facts.new_leader = await self._until("a new leader", another)
        self._took("new_leader", begun)
        self._say(f"Node {self._facts.new_leader} leads now")
        await self._until(
            "the recovery from the leader's death", lambda: self._recovered(2, progress)
        )
        self._took("leader_recovered", begun)
        await self._bring_back(leader)

    async def _bring_back(self, name: str) -> None:
        before = (await self._node(name))["incarnation"]
        begun = time.monotonic()
        self._cluster.nodes[name].start()
        self._killed.discard(name)
        self._say(f"Started node {name} again")

        async def back() -> bool:
            node = await self._node(name)
            if node["status"] != NodeStatus.ALIVE or node["incarnation"] <= before:
                return False
            async with self._cluster.client(name, timeout_s=1.0) as client:
                return bool(await client.ready())

        await self._until(f"node {name} to come back", back)
        self._facts.node_back = True
        self._took("node_back", begun)
        self._say(f"Node {name} is back")

    async def _collect(self) -> None:
        job_id = self._facts.job["job_id"]
        self._facts.job = await self._client.job(job_id)
        self._facts.checkpoints = (await self._client.checkpoints(job_id))["checkpoints"]
        self._facts.incidents = (await self._client.incidents(job_id))["incidents"]

    # -- what is waited for; each answers something true once it has come about

    async def _leader(self) -> str | None:
        answer = await self._client.leader()
        return str(answer["leader"]) if answer["leader"] else None

    async def _node(self, name: str) -> Json:
        nodes: list[Json] = (await self._client.nodes())["nodes"]
        return next(node for node in nodes if node["name"] == name)

    async def _recovered(self, count: int, progress: JobProgress) -> bool:
        answer = await self._client.incidents(progress.job["job_id"])
        self._facts.incidents = answer["incidents"]
        done = [one for one in self._facts.incidents if one["recovered_at"] is not None]
        if len(done) < count:
            await self._still_active(progress)
        return len(done) >= count

    async def _reach(self, share: float, progress: JobProgress, *, saved_after: int) -> None:
        """Wait for a share of the steps, and for a checkpoint beyond the step ``saved_after``."""
        step = int(share * self._facts.steps)

        async def reached() -> bool:
            job = await self._still_active(progress)
            saved = job["checkpoints"]["newest_step"] or 0
            return bool(job["step"] >= step and saved > saved_after)

        await self._until(f"step {step} and a checkpoint after step {saved_after}", reached)

    async def _still_active(self, progress: JobProgress) -> Json:
        job = await self._client.job(progress.job["job_id"])
        if job["status"] in TERMINAL:
            self._facts.job = job
            raise DemoFailed(
                f"The job is {job['status']} ({job['reason']}) while the demo waited for {self.awaited}"
            )
        return job

    async def _ended(self, progress: JobProgress) -> bool:
        self._facts.job = await self._client.job(progress.job["job_id"])
        return bool(self._facts.job["status"] in TERMINAL)

    async def _until(
        self,
        what: str,
        condition: Callable[[], Awaitable[Any]],
    ) -> Any:
        self.awaited = what
        while True:
            for node in self._cluster.nodes.values():
                if not node.running and node.name not in self._killed:
                    raise DemoFailed(f"Node {node.name} ended by itself, exit {node.exit_code}")
            # an election may be on: the client has then tried all nodes already
            with suppress(Unavailable):
                if answer := await condition():
                    return answer
            await asyncio.sleep(POLL_S)

    async def _follow(self, progress: JobProgress) -> None:
        await follow(self._client, progress, self._watch)

    def _took(self, name: str, begun: float) -> None:
        self._facts.timings_s[name] = round(time.monotonic() - begun, 3)


def spec(steps: int, seed: int) -> Json:
    """The demo's job: a small convolutional network on real handwritten digits."""
    return {
        "name": "digits-demo",
        "model": "cnn",
        "dataset": "digits",
        "resources": {"workers": WORKERS},
        "hyperparameters": {"batch_size": 64, "lr": 0.001, "epochs": 1_000_000},
        "steps": steps,
        "checkpointing": {"every_n_steps": EVERY_N_STEPS},
        "max_restarts": 10,
        "seed": seed,
    }
