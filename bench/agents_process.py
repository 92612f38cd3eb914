"""Many simulated agents in one process: learners over real links, with reports or whole supervisors and workers.

Each agent has peer links of its own (four TCP connections with the leader), follows the log as far as acknowledging
it, and reports. For barriers it also has the product's supervisor and barrier wire, and its workers are connections
over the supervisor's Unix socket; only processes and training are missing.
"""

from __future__ import annotations

import array
import asyncio
import os
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from bench.players import take_orders
from bench.processes import until
from distroml.consensus.frames import Address, Channel
from distroml.consensus.messages import Append, AppendReply, decode, encode
from distroml.consensus.peers import PeerLinks
from distroml.consensus.state import ClusterState, decode_state
from distroml.local_cluster import free_ports
from distroml.reports import NodeReport, WorkerFact, WorkerPhase
from distroml.runtime.assignment import SupervisorSettings
from distroml.runtime.barrier_wire import BarrierWire
from distroml.runtime.control import (
    Arrive,
    FrameReader,
    Hello,
    Released,
    ToWorker,
    WorkerPlan,
    encode_frame,
)
from distroml.runtime.spawner import SpawnEvents
from distroml.runtime.supervisor import Supervisor
from distroml.runtime.worker_output import HistorySink

LEADER = "a"
PACE_S = 0.002
"""Reports that have become due within this time are sent one after the other."""
CLUSTER = "distroml"
CONNECT_TIMEOUT_S = 60.0


class Agent:
    """One simulated node."""

    leader = LEADER
    """As its barrier wire asks."""

    def __init__(self, name: str, leader: Address, port: int, slots: int) -> None:
        self.name = name
        here = Address("127.0.0.1", port)
        self.links = PeerLinks(
            name=name,
            incarnation=1,
            cluster_id=CLUSTER,
            listen=here,
            peers={LEADER: leader},
            advertise=here,
        )
        self.links.subscribe(Channel.RAFT, self._follow)
        self.links.subscribe(Channel.REPORT, lambda peer, body: None)
        self.links.subscribe(Channel.STORE, lambda peer, body: None)
        self.report = NodeReport(node=name, incarnation=1, sequence=0, at=0.0, slots=slots)
        self.index = 0

    def _follow(self, peer: str, body: bytes) -> None:
        """Acknowledge the log as a learner does, without keeping it."""
        message = decode(body)
        if isinstance(message, Append):
            self.index = message.prev_index + len(message.entries)
            reply = AppendReply(message.term, True, self.index + 1)
            self.links.send(peer, Channel.RAFT, encode(reply))

    def train(self, job_id: str, run_id: str, generation: int, ranks: Sequence[int]) -> None:
        """From now on its report says that these ranks train."""
        workers = tuple(
            WorkerFact(
                job_id=job_id,
                run_id=run_id,
                generation=generation,
                rank=rank,
                phase=WorkerPhase.TRAINING,
                pid=100_000 + rank,
                total_steps=1_000_000_000,
                started_at=time.time(),
            )
            for rank in ranks
        )
        self.report = replace(self.report, workers=workers)

    def send_report(self) -> bool:
        """The next one, in which each worker has completed a step more."""
        last = self.report
        self.report = replace(
            last,
            sequence=last.sequence + 1,
            at=time.time(),
            applied_index=self.index,
            workers=tuple(replace(fact, step=fact.step + 1) for fact in last.workers),
        )
        return self.links.send(LEADER, Channel.REPORT, msgspec.msgpack.encode(self.report))


class PlayedWorker(asyncio.Protocol):
    """A worker's end of the control socket: arrives when told, and notes when it is released."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._frames: FrameReader[Any] = FrameReader(ToWorker)
        self._transport: asyncio.WriteTransport | None = None
        self.arrived_s = array.array("d")
        self.released_s = array.array("d")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        plan = self._plan
        hello = Hello(
            run_id=plan.run_id,
            worker=plan.worker,
            generation=plan.join.generation if plan.join else 0,
            rank=plan.join.rank if plan.join else 0,
            pid=os.getpid(),
        )
        transport.write(encode_frame(hello))

    def arrive(self, name: str) -> None:
        """Stand at a barrier."""
        assert self._transport is not None
        generation = self._plan.join.generation if self._plan.join else 0
        self.arrived_s.append(time.monotonic())
        self._transport.write(encode_frame(Arrive(generation=generation, name=name)))

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if isinstance(message, Released):
                self.released_s.append(time.monotonic())


class PlayedSpawner:
    """In place of a forkserver: a spawned worker is a connection. No process is made, none is named or killed."""

    def __init__(self, log_path: Path, events: SpawnEvents, listen: Path) -> None:
        self.ready = True
        self.pid: int | None = None
        self.task: asyncio.Task[None] | None = None
        self.plans: list[WorkerPlan] = []

    def start(self) -> None: ...
    async def adopted(self) -> None: ...
    async def stop(self) -> None: ...
    def replace(self, why: str) -> None: ...

    def spawn(self, plan: WorkerPlan) -> None:
        self.plans.append(plan)


class Host:
    """What an agent has beside its links where its workers meet at barriers."""

    def __init__(self, agent: Agent, state: ClusterState, directory: Path) -> None:
        self._state = state
        self.wire = BarrierWire(
            node=agent.name,
            links=agent.links,
            raft=agent,
            state=lambda: state,
            told=lambda *news: self.supervisor.tell_ranks(*news),
            monotonic=time.monotonic,
        )
        spawners: list[PlayedSpawner] = []

        def spawner(log_path: Path, events: SpawnEvents, listen: Path) -> Any:
            spawners.append(PlayedSpawner(log_path, events, listen))
            return spawners[0]

        directory.mkdir()
        self.supervisor = Supervisor(
            SupervisorSettings(
                node=agent.name,
                incarnation=1,
                host="127.0.0.1",
                data_dir=directory,
                store_dir=directory / "store",
            ),
            sink=HistorySink(metrics=lambda *_: None, logs=lambda *_: None),
            current=lambda: True,
            changed=lambda: None,
            arrived=self.wire.arrive,
            spawner=spawner,
        )
        self._spawner = spawners[0]
        agent.links.subscribe(Channel.BARRIER, self.wire.on_frame)

    async def start(self) -> list[PlayedWorker]:
        """Its workers, connected and greeted."""
        await self.supervisor.start(warm=False)
        self.supervisor.converge(self._state)
        loop = asyncio.get_running_loop()
        workers = []
        for plan in self._spawner.plans:
            worker = PlayedWorker(plan)
            await loop.create_unix_connection(lambda worker=worker: worker, plan.control_path)  # type: ignore[misc]
            workers.append(worker)
        await until(
            lambda: all(f.phase is WorkerPhase.CONNECTING for f in self.supervisor.facts()),
            "the workers to be met",
        )
        return workers

    async def stop(self) -> None:
        self.wire.close()
        await self.supervisor.stop()


class Orders:
    """What the benchmark may ask of the agents."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._agents: list[Agent] = []
        self._hosts: list[Host] = []
        self._workers: list[PlayedWorker] = []
        self._interval_s = 0.2
        self._pacing: asyncio.Task[None] | None = None
        self._sent = self._dropped = 0
        self._began_s = self._cpu_began_s = 0.0

    async def connect(self, leader: str, names: list[str], slots: int) -> None:
        """Make the agents and wait for their links; they report from then on, every 200 ms."""
        address = Address.parse(leader)
        for name, port in zip(names, free_ports(len(names)), strict=True):
            agent = Agent(name, address, port, slots)
            await agent.links.start()
            self._agents.append(agent)
        await until(
            lambda: all(agent.links.connected(LEADER) for agent in self._agents),
            "all agents to be connected",
            CONNECT_TIMEOUT_S,
        )
        self._pacing = asyncio.create_task(self._pace())

    async def train(
        self, job_id: str, run_id: str, generation: int, ranks: dict[str, list[int]]
    ) -> None:
        """The reports speak of these ranks from now on."""
        for agent in self._agents:
            agent.train(job_id, run_id, generation, ranks.get(agent.name, []))

    async def report_every(self, interval_s: float) -> None:
        """Change the interval of each agent; counts begin anew."""
        self._interval_s = interval_s
        self._sent = self._dropped = 0
        self._began_s, self._cpu_began_s = time.monotonic(), time.process_time()

    async def count(self) -> dict[str, float]:
        """Reports sent and dropped since the interval was set, with the processor time of this process."""
        return {
            "sent": self._sent,
            "dropped": self._dropped,
            "wall_s": time.monotonic() - self._began_s,
            "cpu_s": time.process_time() - self._cpu_began_s,
        }

    async def employ(self, state: str) -> int:
        """Give the agents supervisors and connected workers, as the replicated state (base64) says."""
        decoded = decode_state(b64decode(state))
        for agent in self._agents:
            host = Host(agent, decoded, self._directory / agent.name)
            self._hosts.append(host)
            self._workers += await host.start()
        return len(self._workers)

    async def meet(
        self, name: str, rounds: int, first_s: float, period_s: float
    ) -> list[list[list[float]]]:
        """All workers arrive at a barrier at each of ``rounds`` monotonic times; [arrivals, releases] by worker."""
        for worker in self._workers:
            del worker.arrived_s[:], worker.released_s[:]
        for number in range(rounds):
            await asyncio.sleep(max(0.0, first_s + number * period_s - time.monotonic()))
            for worker in self._workers:
                worker.arrive(f"{name}/{number}")
            await until(
                lambda number=number: all(len(w.released_s) > number for w in self._workers),  # type: ignore[misc]
                f"all workers to pass barrier {number}",
            )
        return [[list(worker.arrived_s), list(worker.released_s)] for worker in self._workers]

    async def repeats(self) -> int:
        """How often agents had to say again that they wait."""
        return sum(host.wire.counters.get("repeats", 0) for host in self._hosts)

    async def close(self) -> None:
        if self._pacing is not None:
            self._pacing.cancel()
        for host in self._hosts:
            await host.stop()
        await asyncio.gather(*(agent.links.close() for agent in self._agents))

    async def _pace(self) -> None:
        """Each agent once per interval, evenly spread; what cannot be sent in time is not made up for."""
        due, turn = 0.0, 0
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(PACE_S)
            now_s = time.monotonic()
            due += min(now_s - last_s, self._interval_s) * len(self._agents) / self._interval_s
            last_s = now_s
            while due >= 1:
                due -= 1
                turn = (turn + 1) % len(self._agents)
                if self._agents[turn].send_report():
                    self._sent += 1
                else:
                    self._dropped += 1


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="dml-") as directory:
        orders = Orders(Path(directory))
        named = ("connect", "train", "report_every", "count", "employ", "meet", "repeats")
        try:
            await take_orders({name: getattr(orders, name) for name in named})
        finally:
            await orders.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
