"""The cluster under test: real nodes, each with a network namespace and a small disk of its own where root allows it.

Nodes are ``distroml-node`` processes with failpoints (``chaos.under_test``). One that ends by itself is started again, as
an init system would do it; one that a fault holds down stays down until the fault lets go. Whatever happens to the harness,
the end of the context, or else the start of the next run, removes all processes, namespaces, mounts and directories.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from chaos import leftovers
from chaos.network import HARNESS, Network, missing_for_namespaces
from chaos.objects import NoObjects, ObjectStore, missing_for_objects, with_credentials
from chaos.processes import MARK, NODE, Process, Role, environ_of, marked, own_mark, start_time
from chaos.records import HistoryWriter
from chaos.specs import FILE, OBJECTS
from chaos.storage import Disk
from chaos.under_test import edits, failpoints
from distroml.client_async import AsyncClient
from distroml.credentials import new_key
from distroml.errors import DistroMLError

PEER_PORT, HTTP_PORT = 7101, 8101
NODE_DISK_MIB, STORE_DISK_MIB = 192, 1024
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 45.0
POLL_S = 0.05
KEEP_POLL_S = 0.1
RESTART_PAUSE_S = 1.0
"""Between the end of a node and its next start, as an init system waits."""
ASK_TIMEOUT_S = 1.5

_log = logging.getLogger(__name__)


class CannotStart(Exception):
    """The cluster under test did not come up; with what its nodes said."""


class ChaosNode:
    """One node: its addresses, its files, its process."""

    def __init__(self, name: str, disk: Disk, url: str, command: list[str], log_path: Path) -> None:
        self.name = name
        self.url = url
        self.disk = disk
        self.data_dir = disk.path / "data"
        self.store_dir = self.data_dir / "store"
        """Its own part of the store ``local``."""
        self.failpoints_path = log_path.with_suffix(".failpoints.json")
        self.log_path = log_path
        self.starts = 0
        self.environ: dict[str, str] = {}
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._holders: set[int] = set()
        self._failures: dict[int, failpoints.Failpoints] = {}
        self._ended_s: float | None = None

    @property
    def running(self) -> bool:
        """Whether the agent's process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the agent, while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def held(self) -> bool:
        """Whether a fault keeps the node down."""
        return bool(self._holders)

    def hold(self, fault: int) -> None:
        """It is not started again until this fault lets go."""
        self._holders.add(fault)

    def let_go(self, fault: int) -> None:
        """This fault keeps the node down no longer."""
        self._holders.discard(fault)

    def fail(self, fault: int, wanted: failpoints.Failpoints) -> None:
        """Have this node's processes fail in this way, besides what other faults want."""
        self._failures[fault] = wanted
        self._write_failpoints()

    def heal(self, fault: int) -> None:
        """This fault wants no failures any longer."""
        if self._failures.pop(fault, None) is not None:
            self._write_failpoints()

    def _write_failpoints(self) -> None:
        every = self._failures.values()
        together = failpoints.Failpoints(
            syncs=tuple(sync for one in every for sync in one.syncs),
            wall_offset_s=sum(one.wall_offset_s for one in every),
        )
        failpoints.write(self.failpoints_path, together)

    def start(self) -> None:
        """Start the agent; nothing to do where it runs."""
        if self.running:
            return
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environ,
                cwd=self.log_path.parent,
            )
        self.starts += 1
        self._ended_s = None

    def look_after(self, now_s: float) -> None:
        """Start it again where it ended by itself a moment ago."""
        if self.running or self.held:
            self._ended_s = None
        elif self._ended_s is None:
            self._ended_s = now_s
        elif now_s - self._ended_s >= RESTART_PAUSE_S:
            _log.info("node %s ended (%s); it is started again", self.name, self._returncode)
            self.start()

    @property
    def _returncode(self) -> int | None:
        return self._process.poll() if self._process else None

    def processes(self, *roles: Role) -> list[Process]:
        """What runs of this node now, in these roles (none: any)."""
        mark = self.environ[MARK]
        return [p for p in marked(mark) if p.node == self.name and (not roles or p.role in roles)]

    def agent(self) -> Process | None:
        """The agent's process."""
        pid = self.pid
        started = start_time(pid) if pid is not None else None
        if pid is None or started is None:
            return None
        return Process(pid, started, self.environ[MARK], self.name, Role.AGENT)

    def power_off(self) -> list[Process]:
        """SIGKILL to everything of this node, as when a host dies; what was killed."""
        victims = self.processes()
        for victim in sorted(victims, key=lambda p: list(Role).index(p.role)):
            victim.kill()
        if self._process is not None:
            self._process.wait()
        return victims

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left."""
        if self.running and self._process is not None:
            for process in self.processes():
                process.signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + STOP_TIMEOUT_S
            while self.running and time.monotonic() < deadline_s:  # noqa: ASYNC110 - a process tells nobody
                await asyncio.sleep(POLL_S)

    def log_tail(self, lines: int = 20) -> str:
        """The end of what it said."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"


class Cluster:
    """``async with Cluster(folder, nodes=3) as cluster: ...``

    Args:
        folder: of the run; gets ``history.jsonl``, ``nodes/NAME.log`` and, while it lasts, the disks.
        slots: workers that may run on each node.
        mutant: edits of the product, for mutants.
        namespaces: where possible; False: loopback addresses.
        objects: whether there is an object store, where possible.

    Raises (on entering):
        CannotStart: with the logs of the nodes.
        NetworkUnusable: the machine refuses namespaces, though it has all they need.
        NoObjects: the object store did not come up, though all that it needs is installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        slots: int = 3,
        mutant: Sequence[edits.Edit] = (),
        namespaces: bool = True,
        objects: bool = True,
        flags: Sequence[str] = (),
    ) -> None:
        folder = folder.absolute()  # nodes have other working directories
        self.folder = folder
        self.history = HistoryWriter(folder)
        self.nodes: dict[str, ChaosNode] = {}
        self.without = missing_for_namespaces() if namespaces else "they were switched off"
        """Why there are no namespaces; empty where there are."""
        self.without_objects = missing_for_objects() if objects else "no job of this run has one"
        """Why there is no object store; empty where there is."""
        self.objects: ObjectStore | None = None
        self.lost_directories: set[str] = set()
        """Nodes that lost files of their data directory in this run; never more than a minority."""
        self._mark = own_mark()
        self._names = [chr(ord("a") + number) for number in range(nodes)]
        self._slots = slots
        self._mutant = tuple(mutant)
        self._flags = list(flags)
        self._began_s = time.monotonic()
        self._keeper: asyncio.Task[None] | None = None
        self.network = Network(self._mark, self._names) if not self.without else None
        self.store_disk = Disk(f"chaos-{self._mark}-store", folder / "disks/store", STORE_DISK_MIB)
        self.store_dir = self.store_disk.path / "store"

    @property
    def stores(self) -> dict[str, str]:
        """URLs of the stores that all nodes see."""
        objects = {} if self.objects is None else {OBJECTS: self.objects.url}
        return {FILE: self.store_dir.as_uri(), **objects}

    @property
    def store_dirs(self) -> list[Path]:
        """All directories that checkpoints are in: the one that all nodes see, and each node's own part of ``local``."""
        return [self.store_dir, *(node.store_dir for node in self.nodes.values())]

    def clock(self) -> float:
        """Seconds since the run began; ``at_s`` of all records."""
        return time.monotonic() - self._began_s

    def client(self, node: str | None = None, *, timeout_s: float = 15.0) -> AsyncClient:
        """A client of one node, or of all where none is named; the caller closes it."""
        urls = [self.nodes[node].url] if node else [one.url for one in self.nodes.values()]
        return AsyncClient(urls, timeout_s=timeout_s)

    @property
    def majority(self) -> int:
        """Number of voters that make one."""
        return len(self.nodes) // 2 + 1

    # --- life ---

    async def __aenter__(self) -> Cluster:
        try:
            await leftovers.remove_of_dead_harnesses()
            await self._start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._end()

    async def _start(self) -> None:
        if self.network is not None:
            await self.network.set_up()
        self.store_disk.make()
        self.store_dir.mkdir()
        logs = self.folder / "nodes"
        logs.mkdir()
        key = self.folder / "nodes/cluster.key"
        key.touch(mode=0o600)
        key.write_text(new_key())
        hosts = self._hosts()
        peers = ",".join(f"{name}={host}:{PEER_PORT}" for name, host in hosts.items())
        for name, host in hosts.items():
            disk = Disk(f"chaos-{self._mark}-{name}", self.folder / "disks" / name, NODE_DISK_MIB)
            disk.make()
            command = [*self.network.inside(name)] if self.network else []
            command += [sys.executable, "-m", "chaos.under_test.node"]
            command += ["--name", name, "--peers", peers, "--http", f"{host}:{HTTP_PORT}"]
            command += ["--slots", str(self._slots)]
            command += ["--data-dir", str(disk.path / "data"), "--cluster-key-file", str(key)]
            command += (["--insecure"] if self.network else []) + self._flags
            url = f"http://{host}:{HTTP_PORT}"
            node = ChaosNode(name, disk, url, command, logs / f"{name}.log")
            node.environ = self._environ(node)
            self.nodes[name] = node
            node.start()
        self._keeper = asyncio.create_task(self._look_after_nodes(), name="keeper")
        await self._start_objects()
        await self.wait_warm()

    async def _start_objects(self) -> None:
        if self.without_objects:
            _log.info("no job keeps its checkpoints in s3://: %s", self.without_objects)
            return
        host = self.network.harness if self.network else f"{self._loopback}.{HARNESS}"
        self.objects = ObjectStore(self._mark, host, self.folder / "object-server.log")
        await self.objects.start()

    @property
    def _loopback(self) -> str:
        """Three parts of the addresses of this harness, where it has no namespaces."""
        return f"127.0.{int(self._mark.partition('-')[0]) % 250 + 1}"

    def _hosts(self) -> dict[str, str]:
        if self.network is not None:
            return dict(self.network.addresses)
        return {
            name: f"{self._loopback}.{number}" for number, name in enumerate(self._names, start=1)
        }

    def _environ(self, node: ChaosNode) -> dict[str, str]:
        environ = {
            **environ_of(self._mark, with_credentials(os.environ)),
            "OMP_NUM_THREADS": "1",
            NODE: node.name,
            failpoints.VARIABLE: str(node.failpoints_path),
        }
        if self._mutant:
            environ[edits.VARIABLE] = msgspec.json.encode(self._mutant).decode()
        return environ

    async def _look_after_nodes(self) -> None:
        while True:
            for node in self.nodes.values():
                node.look_after(time.monotonic())
            await asyncio.sleep(KEEP_POLL_S)

    async def stop_nodes(self) -> None:
        """End all nodes as their operator would, and the object store; what they leave behind can then be looked for.

        Raises:
            NoObjects: the object store had ended by itself.
        """
        if self._keeper is not None:
            self._keeper.cancel()
        await asyncio.gather(*(node.stop() for node in self.nodes.values()))
        if self.objects is not None:
            await self.objects.stop()

    async def _end(self) -> None:
        try:
            if self._keeper is not None:
                self._keeper.cancel()
            if self.objects is not None:
                with contextlib.suppress(NoObjects):
                    await self.objects.stop()
            await leftovers.remove_of(self._mark)
        finally:
            shutil.rmtree(self.folder / "disks", ignore_errors=True)
            (self.folder / "nodes/cluster.key").unlink(missing_ok=True)
            self.history.close()

    # --- what there is ---

    async def wait_warm(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every node that is not held serves and can fork workers.

        Raises:
            CannotStart: not within the time.
        """
        deadline_s = time.monotonic() + timeout_s
        for node in self.nodes.values():
            while not (node.held or await self._is_warm(node.name)):
                if time.monotonic() > deadline_s:
                    raise CannotStart(
                        f"node {node.name} was not ready within {timeout_s:g} s:\n{node.log_tail()}"
                    )
                await asyncio.sleep(POLL_S)

    async def _is_warm(self, name: str) -> bool:
        found = await self.health(name)
        return found is not None and bool(found["ready"] and found["details"]["warm"])

    async def health(self, name: str) -> dict[str, Any] | None:
        """What a node says of itself; None where it says nothing soon."""
        if not self.nodes[name].running:
            return None
        async with self.client(name, timeout_s=ASK_TIMEOUT_S) as client:
            with contextlib.suppress(DistroMLError, OSError):
                return await client.health()
        return None

    async def leader(self) -> str | None:
        """Who leads in the newest term that anybody knows; None while nobody does."""
        asked = await asyncio.gather(*(self.health(name) for name in self.nodes))
        leading = [(found["term"], found["node"]) for found in asked if found and found["role"] == "leader"]  # fmt: skip
        return max(leading)[1] if leading else None
