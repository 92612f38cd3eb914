"""A cluster of real ``distroml-node`` processes on this machine: for the demo, tests, benchmarks and chaos.

Nodes run as a user would run them, each in its own process group with its own data directory; every signal sent is
to a process that was started here. Leaving the context ends them all, whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distroml.client import AsyncClient
from distroml.errors import DistroMLError
from distroml.runtime.worker_server import socket_path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05
LOG_TAIL_LINES = 40
NODE_MODULE = "distroml.node"
_PORTS = range(20_000, 32_000)
"""Under the range from which kernels take ports of outgoing connections."""


class LocalNode:
    """One node's process, its addresses and its files; survives restarts of the process."""

    def __init__(
        self,
        name: str,
        directory: Path,
        arguments: list[str],
        http: str,
        peer_address: str,
        module: str = NODE_MODULE,
    ) -> None:
        self.name = name
        self.peer_address = peer_address
        """Where other nodes reach it."""
        self.data_dir = directory / name
        self.store_dir = self.data_dir / "store"
        """Its own part of the store ``local``."""
        self.log_path = directory / f"{name}.log"
        self.url = f"http://{http}"
        self._arguments, self._module = arguments, module
        self._environ: Mapping[str, str] = os.environ
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the last process, as of ``subprocess``."""
        return self._process.poll() if self._process else None

    def start(self, environ: Mapping[str, str] | None = None) -> None:
        """Start the process; the log file goes on where it was."""
        if self.running:
            raise RuntimeError(f"node {self.name} runs already")
        self._environ = environ or self._environ
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=dict(self._environ),
            )

    def signal(self, number: int) -> None:
        """Send a signal to the agent alone; its workers notice by themselves."""
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL and reap; nothing to do where it has ended."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def power_off(self) -> None:
        """SIGKILL to the agent and all its workers, as when the host dies.

        After ``kill`` alone the workers live on for a while, so that an agent that is started again finds them.
        """
        self.kill()
        listen = str(socket_path(self.data_dir, "forkserver")).encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and listen in (entry / "cmdline").read_bytes().split(
                    b"\0"
                ):
                    os.kill(int(entry.name), signal.SIGKILL)  # the kernel ends the workers with it

    async def stop(self) -> int | None:
        """SIGTERM, then SIGKILL if it does not end in ``STOP_TIMEOUT_S`` or nobody waits any more.

        Returns the exit code.
        """
        self.signal(signal.SIGTERM)
        try:
            for _ in range(round(STOP_TIMEOUT_S / POLL_S)):
                if not self.running:
                    break
                await asyncio.sleep(POLL_S)
        finally:
            self.kill()
        return self.exit_code

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The end of what it wrote, to explain a failure."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"


class LocalCluster:
    """``async with LocalCluster(directory, nodes=3, slots=2) as cluster: ...``

    Args:
        slots: of each node, or one number per node, learners last.
        learners: further nodes that join the voters; named l1, l2, …
        arguments: further flags of every node.
        module: what is run in place of ``distroml-node``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 3,
        learners: int = 0,
        slots: int | Iterable[int] = 2,
        arguments: Iterable[str] = (),
        environ: Mapping[str, str] | None = None,
        module: str = NODE_MODULE,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._environ = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
        voters = [chr(ord("a") + number) for number in range(nodes)]
        names = voters + [f"l{number + 1}" for number in range(learners)]
        every = [slots] * len(names) if isinstance(slots, int) else list(slots)
        ports = free_ports(2 * len(names))
        addresses = [f"127.0.0.1:{port}" for port in ports[: len(names)]]
        peers = ",".join(f"{n}={at}" for n, at in zip(voters, addresses, strict=False))
        self.nodes: dict[str, LocalNode] = {}
        for name, at, http_port, own in zip(
            names, addresses, ports[len(names) :], every, strict=True
        ):
            http = f"127.0.0.1:{http_port}"
            flags = ["--name", name, "--http", http, "--slots", str(own)]
            flags += ["--data-dir", str(directory / name)]
            if name not in voters:
                flags += ["--join", peers, "--listen", at]
            elif len(names) > 1:
                flags += ["--peers", peers]
            self.nodes[name] = LocalNode(name, directory, [*flags, *arguments], http, at, module)

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes.values()]

    def copies(self, path: str) -> list[Path]:
        """Where a file or directory of the store ``local`` is on the nodes' disks, in the order of nodes."""
        places = [node.store_dir / path for node in self.nodes.values()]
        return [place for place in places if place.exists()]

    async def __aenter__(self) -> LocalCluster:
        try:
            for node in self.nodes.values():
                node.start(self._environ)
            await self.wait_ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _end(self) -> None:
        try:
            await asyncio.gather(*(node.stop() for node in self.nodes.values()))
        finally:
            for node in self.nodes.values():
                node.kill()

    def client(self, *names: str, timeout_s: float = 15.0) -> AsyncClient:
        """A client of the named nodes, in that order; of all without names."""
        urls = [self.nodes[name].url for name in names] or self.urls
        return AsyncClient(urls, timeout_s=timeout_s)

    async def wait_ready(self, *names: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the named nodes (default: all) serve.

        Raises:
            RuntimeError: one of them has ended; with the end of its log.
            TimeoutError: as ``until``.
        """
        for name in names or self.nodes:
            node = self.nodes[name]
            async with self.client(name, timeout_s=5.0) as client:
                await self.until(
                    lambda node=node, client=client: _ready(node, client),  # type: ignore[misc]
                    lambda answer: bool(answer),
                    f"node {name} to be ready",
                    timeout_s=timeout_s,
                )

    async def leader(self, timeout_s: float = 10.0) -> str:
        """The name of the leader on which all running nodes agree."""

        async def ask() -> set[str | None]:
            names: set[str | None] = set()
            for name, node in self.nodes.items():
                if node.running:
                    async with self.client(name, timeout_s=2.0) as client:
                        names.add((await client.leader())["leader"])
            return names

        def agreed(names: set[str | None]) -> bool:
            return len(names) == 1 and all(n is not None and self.nodes[n].running for n in names)

        found = await self.until(ask, agreed, "all nodes to agree on a leader", timeout_s=timeout_s)
        return str(found.pop())

    async def until(
        self,
        ask: Callable[[], Any],
        holds: Callable[[Any], bool],
        what: str,
        *,
        timeout_s: float = 30.0,
    ) -> Any:
        """Ask until ``holds(answer)``, and return that answer.

        Raises:
            TimeoutError: names what was awaited, the last answer, and each node's log tail.
        """
        deadline = time.monotonic() + timeout_s
        answer: Any = None
        while time.monotonic() < deadline:
            try:
                answer = await ask()
                if holds(answer):
                    return answer
            except DistroMLError as error:
                answer = error
            await asyncio.sleep(POLL_S)
        raise TimeoutError(
            f"waited {timeout_s:g} s for {what}; last answer: {answer!r}\n{self.log_tails()}"
        )

    def log_tails(self, lines: int = LOG_TAIL_LINES) -> str:
        """The end of each node's log."""
        return "\n".join(
            f"--- {node.name} ({'running' if node.running else f'exit {node.exit_code}'})\n"
            f"{node.log_tail(lines)}"
            for node in self.nodes.values()
        )


async def _ready(node: LocalNode, client: AsyncClient) -> bool:
    if not node.running:
        raise RuntimeError(
            f"node {node.name} is not running (exit {node.exit_code}):\n{node.log_tail()}"
        )
    return bool(await client.ready())


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now."""
    found: list[int] = []
    candidates = random.SystemRandom().sample(_PORTS, len(_PORTS))
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports on loopback")
