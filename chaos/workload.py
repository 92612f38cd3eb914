"""What clients do to the cluster while it suffers: jobs come and go, and are read, saved, stopped and followed.

First the reference jobs are played, before any fault. Then ``run_until`` keeps some training jobs going and lets clients
work beside them. What each of them wants is drawn from the seed; when and with what success is up to the cluster.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

from chaos.api import Api
from chaos.clients import Recorder
from chaos.ending import read_ended, until_ended
from chaos.following import TYPES, Follower
from chaos.records import JobEnded
from chaos.specs import TRAINED, VICTIM, spec_of
from chaos.target import Target

REFERENCE_TIMEOUT_S = 300.0
"""An undisturbed job takes seconds; this is for a machine that is busy with other things."""
READERS = 2
MAX_FOLLOWED = 4
"""Jobs whose streams are followed at the same time, three streams each."""
KNOWN_JOBS = 40
"""Readers ask for the newest of so many jobs."""
KEEPER_PAUSE_S = (0.3, 0.8)
READER_PAUSE_S = (0.15, 0.6)
SAVER_PAUSE_S = (1.5, 4.0)
VICTIM_LIFE_S = (1.0, 5.0)
VICTIM_PAUSE_S = (1.0, 4.0)
LINEARIZABLE = 0.4
"""Share of reads."""


class Workload:
    """The clients of one run.

    Args:
        jobs: training jobs that are kept going at the same time.
        specs: names in ``specs.TRAINED``; all of them come before one comes again.
        first: names of which one is to be the first.
    """

    def __init__(
        self,
        target: Target,
        seed: int,
        *,
        jobs: int = 3,
        specs: Iterable[str] = tuple(TRAINED),
        first: Iterable[str] = (),
    ) -> None:
        self._target = target
        self._seed = seed
        self._jobs = jobs
        self._names = tuple(specs)
        self._prepared = False
        self._active: dict[str, str] = {}
        """Training jobs that were not seen to end, by id: the name."""
        self._known: list[str] = []
        self._followers: dict[asyncio.Task[None], str] = {}
        self._turns = in_turns(self._names, self._rng("names"), frozenset(first))

    @property
    def known(self) -> tuple[str, ...]:
        """Ids of all jobs that were acknowledged."""
        return tuple(self._known)

    async def prepare(self, known: Iterable[JobEnded] = ()) -> list[JobEnded]:
        """Play each specification undisturbed; those in ``known`` (from an earlier run on this machine) are taken over.

        Raises:
            RuntimeError: a job did not complete, though nothing disturbed it.
        """
        references = [one for one in known if one.undisturbed and one.spec_name in self._names]
        have = {one.spec_name for one in references}
        async with Api() as api:
            client = self._client(api, "reference")
            for name in self._names:
                if name in have:
                    continue
                job_id = await client.submit(name, spec_of(name, self._target.stores))
                if job_id is None:
                    raise RuntimeError(f"the undisturbed job {name} could not be submitted")
                await until_ended(self._target, api, [job_id], REFERENCE_TIMEOUT_S)
                one = await read_ended(self._target, api, job_id, undisturbed=True)
                if one.state != "COMPLETED":
                    raise RuntimeError(f"the undisturbed job {name} is {one.state}: {one.reason}")
                references.append(one)
        for one in references:
            self._target.history.write(one)
        self._prepared = True
        return references

    async def run_until(self, stop: asyncio.Event) -> None:
        """Work until ``stop``; then no new operation begins, and streams are followed on (``finish``)."""
        if not self._prepared:
            await self.prepare()
        try:
            await self._work(stop)
        except BaseException:
            await self.finish(0.0)
            raise

    async def _work(self, stop: asyncio.Event) -> None:
        async with Api() as api, asyncio.TaskGroup() as group:
            group.create_task(self._keep_jobs(self._client(api, "keeper"), stop))
            group.create_task(self._end_jobs(self._client(api, "ender"), stop))
            group.create_task(self._save(self._client(api, "saver"), stop))
            for number in range(READERS):
                group.create_task(self._read(self._client(api, f"reader-{number}"), stop))

    async def finish(self, timeout_s: float) -> None:
        """Let the streams come to their ends, and record them all."""
        if self._followers:
            _, late = await asyncio.wait(self._followers, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.wait(self._followers)
        while self._followers:
            _settled(self._followers.popitem()[0])

    # --- clients -------------------------------------------------------------------------------------------------

    async def _keep_jobs(self, client: Recorder, stop: asyncio.Event) -> None:
        """Replace each training job that has ended by a new one."""
        while not stop.is_set():
            for job_id in list(self._active):
                answer = await client.read_job(job_id, linearizable=client.rng.random() < 0.2)
                if answer.ok and answer.body["finished_at"] is not None:
                    del self._active[job_id]
            if len(self._active) < self._jobs and not stop.is_set():
                name = next(self._turns)
                job_id_or_none = await client.submit(name, spec_of(name, self._target.stores))
                if job_id_or_none is not None:
                    self._active[job_id_or_none] = name
                    self._know(job_id_or_none)
                    self._follow(job_id_or_none)
            await _pause(stop, client.rng, KEEPER_PAUSE_S)

    async def _end_jobs(self, client: Recorder, stop: asyncio.Event) -> None:
        """Submit jobs that never end by themselves, and cancel or stop them."""
        while not stop.is_set():
            await _pause(stop, client.rng, VICTIM_PAUSE_S)
            if stop.is_set():
                return
            job_id = await client.submit(VICTIM, spec_of(VICTIM, self._target.stores))
            if job_id is None:
                continue
            self._know(job_id)
            await _pause(stop, client.rng, VICTIM_LIFE_S)
            end = client.rng.choice((client.cancel, client.stop))
            await end(job_id)

    async def _save(self, client: Recorder, stop: asyncio.Event) -> None:
        """Ask for checkpoints."""
        while not stop.is_set():
            if self._active:
                await client.checkpoint_now(client.rng.choice(list(self._active)))
            await _pause(stop, client.rng, SAVER_PAUSE_S)

    async def _read(self, client: Recorder, stop: asyncio.Event) -> None:
        rng = client.rng
        while not stop.is_set():
            linearizable = rng.random() < LINEARIZABLE
            known = self._known[-KNOWN_JOBS:]
            kind = rng.choices(("job", "jobs", "checkpoints"), (5, 2, 3))[0] if known else "jobs"
            if kind == "jobs":
                await client.read_jobs(linearizable=linearizable)
            elif kind == "job":
                await client.read_job(rng.choice(known), linearizable=linearizable)
            else:
                await client.read_checkpoints(rng.choice(known), linearizable=linearizable)
            await _pause(stop, rng, READER_PAUSE_S)

    def _know(self, job_id: str) -> None:
        if job_id not in self._known:
            self._known.append(job_id)

    def _follow(self, job_id: str) -> None:
        for task in [task for task in self._followers if task.done()]:
            del self._followers[task]
            _settled(task)
        if len(set(self._followers.values())) >= MAX_FOLLOWED:
            return
        for stream in TYPES:
            name = f"follower-{len(self._known)}-{stream}"
            follower = Follower(self._target, job_id, stream, self._rng(name), client=name)
            task = asyncio.create_task(follower.run(), name=name)
            self._followers[task] = job_id

    def _client(self, api: Api, name: str) -> Recorder:
        return Recorder(self._target, api, name, self._rng(name))

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}/{name}")


def in_turns(names: Sequence[str], rng: random.Random, first: Collection[str]) -> Iterator[str]:
    """For ever: all of them in some order before one comes again; one that is to be ``first`` is the very first."""
    order = rng.sample(names, len(names))
    leading = next((name for name in order if name in first), "")
    order.sort(key=lambda name: name != leading)  # stable
    while True:
        yield from order
        order = rng.sample(names, len(names))


def _settled(task: asyncio.Task[None]) -> None:
    """Raises what a follower died of, if it was a defect of ours."""
    if not task.cancelled():
        task.result()


async def _pause(stop: asyncio.Event, rng: random.Random, between_s: tuple[float, float]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(*between_s)):
            await stop.wait()
