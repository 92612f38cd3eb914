"""The measured leader: a whole ``distroml-node``, the only voter, with clocks around what heartbeats cost it.

Everything runs as in production: HTTP, Raft with learners, coordinator, history. Nothing of the node is replaced;
``_take_report`` and the coordinator's turn are timed, and a probe notes how late the event loop is.
"""

from __future__ import annotations

import array
import asyncio
import os
import sys
import time
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.players import take_orders
from bench.processes import until
from distroml.commands import RegisterNode, SubmitJob
from distroml.config import load
from distroml.consensus.state import encode_state
from distroml.model import Job, JobStatus
from distroml.node.composition import Node
from distroml.reports import NodeReport
from distroml.spec import Checkpointing, JobSpec, Resources

PROBE_S = 0.005
"""How often the event loop is asked whether it is late."""
PROPOSE_TIMEOUT_S = 20.0
JOB = "bench-control-plane"


class Window:
    """What was measured since the last reading."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.cpu_began_s = time.process_time()
        self.handling_s = array.array("d")
        """Of each report: from the frame's body to the end of the node's own handler."""
        self.handling_cpu_s = array.array("d")
        """The same in processor time, which other processes on the machine do not lengthen."""
        self.delay_s = array.array("d")
        """Of each report: from the moment that the agent put into it to the end of the handler."""
        self.turns_s = array.array("d")
        """Of each turn of the coordinator."""
        self.turns_cpu_s = array.array("d")
        self.barrier_cpu_s = array.array("d")
        """Processor time of each frame of a barrier, what is sent in answer included."""
        self.late_s = array.array("d")
        """Of each probe."""


class MeasuredNode(Node):
    """A node that notes what reports and turns cost."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.window = Window()
        turn = self.coordinator._turn

        def timed_turn(now: Any) -> None:
            began_s, cpu_began_s = time.perf_counter(), time.thread_time()
            turn(now)
            self.window.turns_cpu_s.append(time.thread_time() - cpu_began_s)
            self.window.turns_s.append(time.perf_counter() - began_s)

        self.coordinator._turn = timed_turn  # type: ignore[method-assign]
        take_frame = self.barriers.on_frame

        def timed_frame(peer: str, body: bytes) -> None:
            cpu_began_s = time.thread_time()
            take_frame(peer, body)
            self.window.barrier_cpu_s.append(time.thread_time() - cpu_began_s)

        self.barriers.on_frame = timed_frame  # type: ignore[method-assign]
        self.last_body = b""

    def _take_report(self, peer: str, body: bytes) -> None:
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        super()._take_report(peer, body)
        self.window.handling_cpu_s.append(time.thread_time() - cpu_began_s)
        self.window.handling_s.append(time.perf_counter() - began_s)
        self.last_body = body
        report = self.observations.report(peer)
        if report is not None:
            self.window.delay_s.append(time.time() - report.at)

    async def probe(self) -> None:
        """Note how late the loop is, until cancelled."""
        while True:
            due_s = time.monotonic() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self.window.late_s.append(time.monotonic() - due_s)


class Orders:
    """What the benchmark may ask of the leader."""

    def __init__(self, node: MeasuredNode) -> None:
        self._node = node

    async def ready(self) -> int:
        """Its process id, once it leads and is registered."""
        node = self._node
        await until(
            lambda: node.raft.is_leader and node.registration.done, "the leader to be ready"
        )
        return os.getpid()

    async def register(self, agents: list[str], slots: int) -> None:
        """Make the agents known to the log, as their own proposals would."""
        for name in agents:
            command = RegisterNode(name=name, incarnation=1, http="http://127.0.0.1:1", slots=slots)
            await self._node.proposer.propose(command, PROPOSE_TIMEOUT_S)

    async def submit(self, workers: int) -> dict[str, Any]:
        """A job of that many ranks, placed by the coordinator: its run and which ranks each agent has.

        With it goes the replicated state, in base64.
        """
        spec = JobSpec(
            name=JOB,
            resources=Resources(workers=workers),
            checkpointing=Checkpointing(enabled=False),
        )
        run_id = f"run-{JOB}"
        await self._node.proposer.propose(
            SubmitJob(job_id=JOB, run_id=run_id, spec=spec), PROPOSE_TIMEOUT_S
        )
        await until(lambda: self._job().generation is not None, "the coordinator to place the job")
        generation = self._job().generation
        assert generation is not None
        ranks: dict[str, list[int]] = {}
        for member in generation.members:
            ranks.setdefault(member.node, []).append(member.rank)
        return {
            "job_id": JOB,
            "run_id": run_id,
            "generation": generation.number,
            "ranks": ranks,
            "state": b64encode(encode_state(self._node.replica.state)).decode(),
        }

    async def until_running(self) -> None:
        """Until the coordinator has seen all ranks train."""
        await until(lambda: self._job().status is JobStatus.RUNNING, "all ranks to train")

    def _job(self) -> Job:
        return self._node.replica.state.jobs[JOB]

    async def forget(self) -> None:
        """Begin a new window."""
        self._node.window = Window()

    async def decode_alone(self, times: int) -> list[float]:
        """Seconds that each of so many decodings of the last report takes, with nothing around it."""
        decoder, body = msgspec.msgpack.Decoder(NodeReport), self._node.last_body
        taken_s = []
        for _ in range(times):
            began_s = time.perf_counter()
            decoder.decode(body)
            taken_s.append(time.perf_counter() - began_s)
        return taken_s

    async def read(self) -> dict[str, Any]:
        """What the window holds."""
        node, window = self._node, self._node.window
        job = node.replica.state.jobs.get(JOB)
        return {
            "wall_s": time.monotonic() - window.began_s,
            "cpu_s": time.process_time() - window.cpu_began_s,
            "handling_s": list(window.handling_s),
            "handling_cpu_s": list(window.handling_cpu_s),
            "turns_cpu_s": list(window.turns_cpu_s),
            "delay_s": list(window.delay_s),
            "turns_s": list(window.turns_s),
            "barrier_cpu_s": list(window.barrier_cpu_s),
            "late_s": list(window.late_s),
            "job": "" if job is None else f"{job.status} in generation {job.generation_number}",
            "barriers": node.barriers.counters,
            "links": node.links.counters,
        }


async def _main(argv: Sequence[str]) -> None:
    config = load(argv, {})
    node = MeasuredNode(config, 1)
    stop = asyncio.Event()
    running = asyncio.create_task(node.run(stop))
    probing = asyncio.create_task(node.probe())
    orders = Orders(node)
    named = ("ready", "register", "submit", "until_running", "forget", "decode_alone", "read")
    obeying = asyncio.create_task(take_orders({name: getattr(orders, name) for name in named}))
    await asyncio.wait({running, obeying}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    probing.cancel()
    await running


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
