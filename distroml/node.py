"""Composition root of one node: builds the parts, wires them, starts and stops them in order. Nothing else.

::

    HTTP ──> Proposer ──> RaftNode ──> Replica(ClusterState) ──┬─> Supervisor ──> workers
                             │                                 ├─> Coordinator (leader) ──> Proposer
    PeerLinks ───────────────┴── reports, history ─────────────┴─> API, streams
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from distroml.commands import Outcome, RegisterNode, SetNodeStatus
from distroml.config import NodeConfig, load
from distroml.consensus.peers import Address, Channel, PeerLinks
from distroml.consensus.proposer import Proposer
from distroml.consensus.raft import RaftNode
from distroml.consensus.raft_types import (
    ConsensusError,
    EntryTooLarge,
    NotLeader,
    Overloaded,
    RaftSettings,
)
from distroml.consensus.replica import Replica
from distroml.errors import ConfigError, DistroMLError
from distroml.http.app import HttpServer
from distroml.model import Event, NodeStatus
from distroml.runtime.checkpoint.store import LocalStore
from distroml.runtime.coordinator import Coordinator, CoordinatorSettings
from distroml.runtime.facts import ReconcilerSettings
from distroml.runtime.failure_detector import DetectorSettings
from distroml.runtime.history_sink import HistoryWriter
from distroml.runtime.identity import DataDirectory
from distroml.runtime.observations import Observations
from distroml.runtime.reporter import Reporter, ReporterSources
from distroml.runtime.store.history import HistoryStore
from distroml.runtime.store.replication import HistoryReplicator
from distroml.runtime.supervisor import HistorySink, Supervisor, SupervisorSettings
from distroml.services import NodeServices, Parts

FAREWELL_TIMEOUT_S = 2.0
"""How long a node that stops tries to tell the cluster before it just goes."""
REGISTER_TIMEOUT_S = 5.0
CONVERGE_S = 1.0
"""Local workers are compared with the assignment at least this often."""

_log = logging.getLogger("distroml.node")


class Reincarnate(Exception):
    """The cluster knows a higher incarnation of this node than its data directory does."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the cluster has seen incarnation {at_least - 1}")
        self.at_least = at_least


class NodeBroken(Exception):
    """An invariant of consensus does not hold in this process; what is on disk is sound, so start it again."""


class Node:
    """One node from start to stop."""

    def __init__(self, config: NodeConfig, incarnation: int) -> None:
        self.config = config
        self.incarnation = incarnation
        settings = config.settings
        others = {name: at for name, at in config.voters.items() if name != config.name}
        self.links = PeerLinks(
            name=config.name,
            incarnation=incarnation,
            cluster_id=settings.cluster_id,
            listen=config.listen or Address("127.0.0.1", 0),
            peers=others,
        )
        self.replica = Replica()
        election_s = settings.election_timeout_ms / 1000
        self.raft = RaftNode(
            name=config.name,
            voters=tuple(config.voters),
            data_dir=config.data_dir,
            links=self.links,
            machine=self.replica,
            settings=RaftSettings(
                election_min_s=election_s,
                election_max_s=election_s * 2,
                heartbeat_s=settings.heartbeat_ms / 1000,
                compaction_entries=settings.snapshot_entries,
            ),
        )
        self.proposer = Proposer(
            name=config.name,
            incarnation=incarnation,
            raft=self.raft,
            links=self.links,
            refusal=(NotLeader, Overloaded, EntryTooLarge),
        )
        self.observations = Observations(name=config.name, monotonic=time.monotonic)
        self.history = HistoryStore(
            config.data_dir / "history",
            active=lambda: {job.job_id for job in self.replica.state.active_jobs()},
        )
        self.writer = HistoryWriter(self.history)
        self.replicator = HistoryReplicator(
            config.name,
            self.history,
            self.links,
            peers=lambda: others.keys(),
            known_jobs=lambda: self.replica.state.jobs.keys(),
        )
        self.supervisor = Supervisor(
            SupervisorSettings(
                node=config.name,
                incarnation=incarnation,
                host=config.host,
                data_dir=config.data_dir,
                store_dir=config.store_dir,
                worker_threads=settings.worker_threads,
            ),
            sink=HistorySink(metrics=self.writer.take_metrics, logs=self.writer.take_logs),
            changed=self._local_change,
        )
        self.reporter = Reporter(
            node=config.name,
            incarnation=incarnation,
            slots=config.slots,
            peers=others,
            links=self.links,
            sources=ReporterSources(
                workers=self.supervisor.facts,
                applied_index=lambda: self.replica.state.index,
                ready=self._warm,
            ),
            took=self._take_own_report,
            interval_s=settings.report_interval_ms / 1000,
        )
        self.coordinator = Coordinator(
            node=config.name,
            raft=self.raft,
            replica=self.replica,
            observations=self.observations,
            propose=self.proposer.propose,
            store=LocalStore(config.store_dir),
            settings=CoordinatorSettings(
                detector=DetectorSettings(silence_s=settings.node_timeout_ms / 1000),
                reconciler=ReconcilerSettings(start_deadline_s=settings.start_timeout_ms / 1000),
            ),
        )
        self.registered = False
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
            )
        )
        self.http = HttpServer(self.services)
        self._converge_due = asyncio.Event()
        self._broken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # --- life ---

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then say farewell and end.

        Raises:
            Reincarnate: start again with a higher incarnation.
            NodeBroken: consensus stopped for good; the process should end.
            ConfigError: an address cannot be used.
        """
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            tasks = {
                asyncio.create_task(self._register(), name="register"),
                asyncio.create_task(self._broken.wait(), name="broken"),
                asyncio.create_task(stop.wait(), name="stop"),
            }
            try:
                while not stop.is_set():
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    if self._broken.is_set():
                        raise NodeBroken(self.raft.failure)
            finally:
                for task in tasks:
                    task.cancel()
            await self._farewell()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Start each part; whatever was started is stopped in reverse order, also after a failure."""
        self._wire()
        await self.history.start()
        stack.push_async_callback(self.history.close)
        self.replicator.start()
        stack.push_async_callback(self.replicator.close)
        await self.links.start()
        stack.push_async_callback(self.links.close)
        await self.raft.start()
        stack.push_async_callback(self.raft.stop)
        try:
            await self.http.start(self.config.http.host, self.config.http.port)
        except OSError as error:
            raise ConfigError(
                f"http {self.config.http} cannot be used: {error.strerror}.", field="http"
            ) from None
        stack.push_async_callback(self.http.stop)
        await self.supervisor.start(warm=self.config.slots > 0)
        stack.push_async_callback(self.supervisor.stop)
        self.reporter.start()
        stack.push_async_callback(self.reporter.stop)
        self.coordinator.start()
        stack.push_async_callback(self.coordinator.stop)
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

    def _wire(self) -> None:
        self.links.subscribe(Channel.PROPOSE, self.proposer.on_forwarded)
        self.links.subscribe(Channel.REPORT, self._take_report)
        self.links.on_link(self._on_link)
        self.replica.listen(self.proposer.on_applied)
        self.replica.listen(self.services.events.applied)
        self.replica.listen(self._on_applied)
        self.replica.listen(lambda entry, outcome, events: self.coordinator.on_events(events))
        self.raft.on_role(lambda status: self._on_role())

    async def _register(self) -> None:
        """Tell the cluster of this incarnation; until then it gets no ranks."""
        command = RegisterNode(
            name=self.config.name,
            incarnation=self.incarnation,
            http=self.config.http_url,
            slots=self.config.slots,
        )
        while not self.registered:
            try:
                outcome = await self.proposer.propose(command, REGISTER_TIMEOUT_S)
            except DistroMLError as error:
                _log.info("not registered yet: %s", error)
                continue
            if outcome.error:
                state = self.replica.state
                seen = state.nodes.get(self.config.name)
                proposer = state.proposers.get(self.config.name)
                known = max(
                    seen.incarnation if seen else 0, proposer.incarnation if proposer else 0
                )
                raise Reincarnate(max(known, self.incarnation) + 1)
            self.registered = True
            self.replicator.sweep()

    async def _farewell(self) -> None:
        """SIGTERM: leave the cluster, hand leadership over; the exit stack then stops the workers."""
        self.stopping = True
        _log.info("stopping")
        self.reporter.draining = True
        leave = SetNodeStatus(
            name=self.config.name,
            incarnation=self.incarnation,
            status=NodeStatus.LEFT,
            reason="stopped by request",
        )
        with contextlib.suppress(DistroMLError):
            await self.proposer.propose(leave, FAREWELL_TIMEOUT_S)
        if self.raft.is_leader and len(self.config.voters) > 1:
            with contextlib.suppress(Exception):
                await self.raft.transfer_leadership(timeout_s=FAREWELL_TIMEOUT_S)

    def _warm(self) -> bool:
        return self.supervisor.ready or self.config.slots == 0

    # --- wiring: note and wake, never block ---

    def _on_applied(self, entry: object, outcome: Outcome, events: tuple[Event, ...]) -> None:
        for event in events:
            if event.type == "removed" and event.job_id is not None:
                self.replicator.forget(event.job_id)
                self.services.history.forget(event.job_id)
        self._converge_due.set()
        self.coordinator.kick()

    def _on_role(self) -> None:
        if self.raft.failure:
            self._broken.set()
        self.proposer.on_leader_change()
        self.coordinator.kick()

    def _on_link(self, peer: str, up: bool) -> None:
        self.observations.link(peer, up)
        if up:
            self.reporter.kick()
        self.coordinator.kick()

    def _take_report(self, peer: str, body: bytes) -> None:
        report = self.observations.receive(peer, body)
        if report is not None:
            self.supervisor.take_peer_report(report)
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
            try:
                self.supervisor.converge(self.replica.state)
            except Exception:  # one bad assignment must not stop the others for ever
                _log.exception("could not converge the local workers")


async def _serve(config: NodeConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    directory = DataDirectory(
        config.data_dir, name=config.name, cluster_id=config.settings.cluster_id
    )
    at_least = 1
    try:
        while not stop.is_set():
            try:
                await Node(config, directory.next_incarnation(at_least)).run(stop)
            except Reincarnate as again:
                _log.warning("starting anew: %s", again)
                at_least = again.at_least
    finally:
        directory.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``distroml-node``."""
    try:
        config = load(sys.argv[1:] if argv is None else argv, os.environ)
        logging.basicConfig(
            level=config.settings.log_level.upper(),
            format=f"%(asctime)s %(levelname)-7s {config.name} %(name)s: %(message)s",
            stream=sys.stderr,
        )
        asyncio.run(_serve(config))
    except ConfigError as error:
        print(f"distroml-node: {error.detail}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (NodeBroken, ConsensusError) as error:
        print(f"distroml-node: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
