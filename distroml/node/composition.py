"""Composition root of one node: builds the parts, wires them, starts and stops them in order. Nothing else.

::

    HTTP ──> Proposer ──> RaftNode ──> Replica(ClusterState) ──┬─> Supervisor ──> workers
                             │                                 ├─> Coordinator (leader) ──> Proposer
    PeerLinks ───────────────┴── reports, history ─────────────┴─> API, streams
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import time

from distroml.checkpoint_files import CheckpointFiles
from distroml.commands import Outcome
from distroml.config import (
    NodeConfig,
    detector_settings,
    raft_settings,
    reconciler_settings,
)
from distroml.consensus.peers import Address, Channel, PeerLinks
from distroml.consensus.proposer import Proposer
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import EntryTooLarge, NotLeader, Overloaded
from distroml.consensus.replica import Replica
from distroml.http.app import HttpServer
from distroml.model import Event
from distroml.node.endings import (
    STOP_LIMIT_S,
    NodeBroken,
    address_errors,
    directory_errors,
    leave_within,
    raise_for_dead,
)
from distroml.node.registration import FAREWELL_TIMEOUT_S, Registration
from distroml.node.tracing import trace_recoveries
from distroml.runtime.assignment import SupervisorSettings
from distroml.runtime.barrier_wire import BarrierWire
from distroml.runtime.checkpoint.stores.opening import Stores
from distroml.runtime.collecting import Collector
from distroml.runtime.coordinator import Coordinator, CoordinatorSettings
from distroml.runtime.history_sink import HistoryWriter
from distroml.runtime.observations import Observations
from distroml.runtime.replicas.copies import Copies
from distroml.runtime.report_relay import ReportRelay
from distroml.runtime.reporter import Reporter, ReporterSources
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.replication import HistoryReplicator
from distroml.runtime.supervisor import Supervisor
from distroml.runtime.worker_output import HistorySink
from distroml.services import NodeServices, Parts

CONFIRM_TIMEOUT_S = 5.0
"""How long the collector of garbage waits to learn that this node's state is up to date."""
CONVERGE_S = 1.0
"""Local workers are compared with the assignment at least this often."""
CONVERGE_PAUSE_PARTS = 3.0
"""Pause after a comparison in parts of its own duration."""

_log = logging.getLogger("distroml.node")


class Node:
    """One node from start to stop."""

    def __init__(self, config: NodeConfig, incarnation: int) -> None:
        self.config = config
        self.incarnation = incarnation
        settings = config.settings
        others = {name: at for name, at in config.voters.items() if name != config.name}
        learns = config.advertise is not None
        self.links = PeerLinks(
            name=config.name,
            incarnation=incarnation,
            cluster_id=settings.cluster_id,
            security=config.security,
            listen=config.listen or Address("127.0.0.1", 0),
            peers=others,
            advertise=config.advertise,
        )
        self.replica = Replica()
        self.raft = RaftNode(
            name=config.name,
            voters=tuple(config.voters),
            data_dir=config.data_dir,
            links=self.links,
            machine=self.replica,
            settings=raft_settings(settings),
        )
        self.proposer = Proposer(
            name=config.name,
            incarnation=incarnation,
            raft=self.raft,
            links=self.links,
            refusal=(NotLeader, Overloaded, EntryTooLarge),
        )
        self.registration = Registration(
            config, incarnation, raft=self.raft, replica=self.replica, proposer=self.proposer
        )
        self.observations = Observations(
            name=config.name,
            monotonic=time.monotonic,
            relays=frozenset(others) if learns else frozenset(),
        )
        self.relay = ReportRelay(
            links=self.links,
            learners=lambda name: name in self.links.learners,
            leads=lambda: self.raft.is_leader,
            monotonic=time.monotonic,
        )
        self.history = HistoryStore(
            config.data_dir / "history",
            active=lambda: {job.job_id for job in self.replica.state.active_jobs()},
        )
        self.writer = HistoryWriter(self.history)
        self.replicator = HistoryReplicator(
            config.name,
            self.history,
            self.links,
            peers=self.links.peers.keys,
            known_jobs=lambda: self.replica.state.jobs.keys(),
        )
        self.barriers = BarrierWire(
            node=config.name,
            links=self.links,
            raft=self.raft,
            state=lambda: self.replica.state,
            told=lambda *news: self.supervisor.tell_ranks(*news),
            monotonic=time.monotonic,
        )
        self.copies = Copies(
            node=config.name,
            voters=frozenset(config.voters),
            directory=config.store_dir,
            links=self.links,
            state=lambda: self.replica.state,
            current=lambda: self.registration.done,
            leads=lambda: self.raft.is_leader,
            shared=self.replicator.sharing.shared,
            landed=lambda path: self.collector.landed(path),
            leaving=lambda: self.stopping,
        )
        self.supervisor = Supervisor(
            SupervisorSettings(
                node=config.name,
                incarnation=incarnation,
                host=config.host,
                data_dir=config.data_dir,
                store_dir=config.store_dir,
                stores=config.stores,
                worker_threads=settings.worker_threads,
            ),
            sink=HistorySink(metrics=self.writer.take_metrics, logs=self.writer.take_logs),
            current=lambda: self.registration.done,
            changed=self._local_change,
            arrived=self.barriers.arrive,
            copies=self.copies.for_workers,
        )
        self.reporter = Reporter(
            node=config.name,
            incarnation=incarnation,
            slots=config.slots,
            peers=self.links.peers.keys,
            links=self.links,
            sources=ReporterSources(
                workers=self.supervisor.facts,
                applied_index=lambda: self.replica.state.index,
                ready=self._warm,
                workers_since=lambda: self.supervisor.workers_since,
            ),
            took=self._take_own_report,
            interval_s=settings.report_interval_ms / 1000,
        )
        stores = Stores(self.copies.store, config.stores)
        self.coordinator = Coordinator(
            node=config.name,
            raft=self.raft,
            replica=self.replica,
            observations=self.observations,
            may_decide=lambda: self.registration.done,
            is_deleting=lambda directory: self.collector.is_deleting(directory),
            propose=self.proposer.propose,
            stores=stores,
            settings=CoordinatorSettings(
                detector=detector_settings(settings),
                reconciler=reconciler_settings(settings),
            ),
        )
        self.files = CheckpointFiles(stores, config.data_dir / "exports", self.copies.bringer)
        self.collector = Collector(
            Stores(config.store_dir, config.stores),  # of "local" what is here: each node its own
            state=lambda: self.replica.state,
            leads=lambda: self.raft.is_leader,
            confirm=lambda: self.services.read_barrier(CONFIRM_TIMEOUT_S),
            grace_s=settings.orphan_grace_s,
        )
        self.stopping = False
        self.services = NodeServices(
            Parts(
                config=config,
                incarnation=incarnation,
                raft=self.raft,
                replica=self.replica,
                proposer=self.proposer,
                links=self.links,
                observations=self.observations,
                history=self.history,
                writer=self.writer,
                replicator=self.replicator,
                stopping=lambda: self.stopping,
                warm=self._warm,
                coordinator=self.coordinator,
                collector=self.collector,
                files=self.files,
                copies=self.copies,
                reporter=self.reporter,
                barriers=self.barriers,
            )
        )
        self.http = HttpServer(self.services)
        self._converge_due = asyncio.Event()
        self._broken = asyncio.Event()
        self._breakage = ""

    # --- life ---

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then say farewell and end.

        Raises:
            Reincarnate: start again with a higher incarnation.
            NodeBroken: a part stopped for good; the process should end.
            ConfigError: an address or directory cannot be used.
        """
        async with contextlib.AsyncExitStack() as stack:
            parts = await self._start(stack)
            stopped = asyncio.create_task(stop.wait(), name="stop")
            broken = asyncio.create_task(self._broken.wait(), name="broken")
            register = asyncio.create_task(
                self.registration.register(self.supervisor.workers_since), name="register"
            )
            ends = {stopped, broken, register}
            try:
                while not stop.is_set():
                    done, _ = await asyncio.wait(ends | parts, return_when=asyncio.FIRST_COMPLETED)
                    if register in done:
                        register.result()
                        ends.discard(register)
                        self._on_registered()
                    if broken in done:
                        raise NodeBroken(self._breakage)
                    raise_for_dead(parts & done)
            except NodeBroken:
                leave_within(STOP_LIMIT_S)
                raise
            finally:
                for task in (stopped, broken, register):
                    task.cancel()
            await self._farewell()

    async def _start(self, stack: contextlib.AsyncExitStack) -> set[asyncio.Task[None]]:
        """Start each part; whatever was started is stopped in reverse order, also after a failure.

        Returns the tasks without which this node must not go on.
        """
        self._wire()
        traces = trace_recoveries(self.config, self.incarnation, self.replica, os.environ)
        if traces is not None:
            stack.push_async_callback(traces.close)
        with directory_errors(self.config):
            await self.history.start()
        stack.push_async_callback(self.history.close)
        self.replicator.start()
        stack.push_async_callback(self.replicator.close)
        with address_errors("listen", self.config.listen):
            await self.links.start()
        stack.push_async_callback(self.links.close)
        with directory_errors(self.config):
            await self.raft.start()
        stack.push_async_callback(self.raft.stop)
        self.copies.start()
        stack.push_async_callback(self.copies.stop)
        with address_errors("http", self.config.http):
            await self.http.start(self.config.http.host, self.config.http.port)
        stack.push_async_callback(self.http.stop)
        with directory_errors(self.config):
            await self.supervisor.start(warm=self.config.slots > 0)
        stack.push_async_callback(self.supervisor.stop)
        stack.callback(self.barriers.close)
        self.reporter.start()
        stack.push_async_callback(self.reporter.stop)
        self.coordinator.start()
        stack.push_async_callback(self.coordinator.stop)
        self.files.remove_leftovers()
        stack.callback(self.files.close)
        self.collector.start()
        stack.push_async_callback(self.collector.stop)
        converge = asyncio.create_task(self._converge(), name="converge")
        stack.callback(converge.cancel)
        _log.info(
            "node %s, incarnation %d: API %s, %d slots, data in %s",
            self.config.name,
            self.incarnation,
            self.config.http_url,
            self.config.slots,
            self.config.data_dir,
        )
        gc.freeze()  # what was imported never becomes garbage: it need not be looked at again and again
        tasks = (
            converge,
            self.reporter.task,
            self.coordinator.task,
            self.collector.task,
            self.copies.upkeep.task,
            *self.supervisor.tasks,
        )
        return {task for task in tasks if task is not None}

    def _wire(self) -> None:
        self.links.subscribe(Channel.PROPOSE, self.proposer.on_forwarded)
        self.links.subscribe(Channel.REPORT, self._take_report)
        self.links.subscribe(Channel.BARRIER, self.barriers.on_frame)
        self.links.on_link(self._on_link)
        self.replica.listen(self.proposer.on_applied)
        self.replica.listen(self.services.events.applied)
        self.replica.listen(self.services.tally.applied)
        self.replica.listen(self._on_applied)
        self.replica.listen(lambda entry, outcome, events: self.coordinator.on_events(events))
        self.replica.listen(lambda entry, outcome, events: self.collector.on_events(events))
        self.raft.on_role(lambda status: self._on_role())

    async def _farewell(self) -> None:
        """SIGTERM: leave the cluster, hand leadership over; the exit stack then stops the workers."""
        self.stopping = True
        _log.info("stopping")
        self.reporter.draining = True
        self.reporter.kick()
        await self.registration.leave()
        leave_within(STOP_LIMIT_S)
        if self.raft.is_leader and len(self.config.voters) > 1:
            with contextlib.suppress(Exception):
                await self.raft.transfer_leadership(timeout_s=FAREWELL_TIMEOUT_S)

    def _warm(self) -> bool:
        return self.supervisor.ready or self.config.slots == 0

    # --- wiring: note and wake, never block ---

    def _on_applied(self, entry: object, outcome: Outcome, events: tuple[Event, ...]) -> None:
        self.registration.on_applied()
        self.observations.registered(self.replica.state.nodes)
        self._converge_due.set()
        self.coordinator.kick()
        self.barriers.on_applied()
        self.copies.for_workers.on_applied()
        if superseded := self.registration.superseded():
            self._break(superseded)
        if self.registration.done and entry is None:
            self.replicator.sweep()  # a snapshot came: its jobs may have been removed unseen
        for event in events:
            if event.type == "removed" and event.job_id is not None:
                self.replicator.forget(event.job_id)
                self.services.history.forget(event.job_id)

    def _on_registered(self) -> None:
        """The state has all that was acknowledged before this node began."""
        self.replicator.sweep()
        self._converge_due.set()
        self.copies.for_workers.on_applied()

    def _break(self, why: str) -> None:
        self._breakage = self._breakage or why
        self._broken.set()

    def _on_role(self) -> None:
        if self.raft.failure:
            self._break(self.raft.failure)
        self.proposer.on_leader_change()
        self.barriers.on_leader_change()
        self.coordinator.kick()

    def _on_link(self, peer: str, up: bool) -> None:
        self.observations.link(peer, up)
        if up:
            self.reporter.kick()
            self.barriers.on_link(peer)
        self.coordinator.kick()

    def _take_report(self, peer: str, body: bytes) -> None:
        received = self.observations.receive(peer, body)
        for report in received.reports:
            if report.node == peer:
                self.relay.take(report, body)
            self.supervisor.take_peer_report(report)
        if received.news:
            self.coordinator.kick()

    def _take_own_report(self, report: object) -> None:
        self.observations.take(report)  # type: ignore[arg-type]
        self.coordinator.kick()

    def _local_change(self) -> None:
        self.reporter.kick()

    async def _converge(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONVERGE_S):
                    await self._converge_due.wait()
            self._converge_due.clear()
            began_s = time.monotonic()
            try:
                self.supervisor.converge(self.replica.state)
            except Exception:  # one bad assignment must not stop the others for ever
                _log.exception("could not converge the local workers")
            # With thousands of jobs one look takes milliseconds, and each applied entry asks for one.
            await asyncio.sleep(
                min(CONVERGE_PAUSE_PARTS * (time.monotonic() - began_s), CONVERGE_S)
            )
