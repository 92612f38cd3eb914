"""The network between the nodes under test: a namespace per node, joined by a bridge in a namespace of its own.

::

    chaos-PID-START-a ── eth0 ⇄ a ──┐
    chaos-PID-START-b ── eth0 ⇄ b ──┼─ bridge in chaos-PID-START-hub ── h ⇄ chPID (the harness)
    chaos-PID-START-c ── eth0 ⇄ c ──┘

Everything hangs on the namespaces: deleting them deletes all links, also the harness's end. The faults are a set of
``Impairment``; a change of the set rewrites what each node has, as a whole, so that faults may overlap and end in any order.
Packets are dropped and connections reset by one nftables table per node; rates are bounded by ``tc``, and where the kernel
has netem delay, jitter and loss are its work as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from chaos.processes import environ_of

TABLE = "inet chaos"
HARNESS = 254
"""Last part of the harness's address."""
COMMAND_TIMEOUT_S = 10.0
_UNKNOWN = ""
_NAMESPACES = Path("/var/run/netns")
QUEUE_LATENCY_MS = 400
BURST_BYTES = 32 * 1024


class NetworkUnusable(Exception):
    """What the machine does not allow, and what would help."""


class Impairment(Struct, frozen=True, kw_only=True):
    """One fault of the network, as seen by one node.

    ``peers`` empty: all others, and the harness where ``harness`` says so.
    """

    node: str
    peers: tuple[str, ...] = ()
    inbound: bool = False
    """Packets of the peers to the node are dropped."""
    outbound: bool = False
    """Packets of the node to the peers are dropped."""
    reset: bool = False
    """Connections between node and peers are reset with their next packet."""
    harness: bool = False
    """The harness (clients) counts as one of the peers."""
    loss: float = 0.0
    """Part of what the node sends that is lost."""
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    rate_kbit: int = 0
    """Most that the node sends; 0: unbounded."""


class Shape(Struct, frozen=True):
    """What ``tc`` does with what a node sends: all its impairments together."""

    loss: float = 0.0
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    rate_kbit: int = 0


def shape_of(impairments: Iterable[Impairment]) -> Shape:
    """Delays add up, the slowest rate counts, and a packet passes only where no loss takes it."""
    passes, delay_ms, jitter_ms, rates = 1.0, 0.0, 0.0, []
    for one in impairments:
        passes *= 1 - one.loss
        delay_ms += one.delay_ms
        jitter_ms += one.jitter_ms
        rates += [one.rate_kbit] if one.rate_kbit else []
    return Shape(1 - passes, delay_ms, jitter_ms, min(rates, default=0))


def ruleset(
    impairments: Sequence[Impairment], addresses: dict[str, str], harness: str, *, netem: bool
) -> str:
    """The nftables program of one node, which takes the place of the one before.

    Args:
        addresses: of the other nodes, by name.
        netem: loss is netem's work and needs no rule.
    """
    inbound, outbound = [], []
    for one in impairments:
        peers = [addresses[name] for name in one.peers or addresses] + [harness] * one.harness
        whom = "{ " + ", ".join(sorted(set(peers))) + " }"
        if one.reset:
            established = "tcp flags & (syn | rst) == 0 reject with tcp reset"
            inbound.append(f"ip saddr {whom} {established}")
            outbound.append(f"ip daddr {whom} {established}")
        if one.inbound:
            inbound.append(f"ip saddr {whom} drop")
        if one.outbound:
            outbound.append(f"ip daddr {whom} drop")
    if not netem and (loss := shape_of(impairments).loss):
        outbound.append(f"oifname eth0 numgen random mod 10000 < {round(loss * 10000)} drop")
    lines = [f"table {TABLE}", f"delete table {TABLE}"]
    if inbound or outbound:
        lines.append(f"table {TABLE} {{")
        for hook, rules in (("input", inbound), ("output", outbound)):
            lines.append(f"  chain {hook} {{ type filter hook {hook} priority 0; policy accept;")
            lines += [f"    {rule}" for rule in rules]
            lines.append("  }")
        lines.append("}")
    return "\n".join(lines) + "\n"


class Network:
    """The namespaces of one run.

    Args:
        mark: of the harness, ``processes.own_mark``; the names carry it.
    """

    def __init__(self, mark: str, names: Sequence[str]) -> None:
        self.mark = mark
        self._names = list(names)
        self._hub = f"chaos-{mark}-hub"
        self._link = _link_of(mark)
        self._impairments: dict[int, tuple[Impairment, ...]] = {}
        self._programs: dict[str, str] = {}
        self._shapes: dict[str, Shape | None] = {}
        self._changing = asyncio.Lock()
        self._delayers: dict[str, asyncio.subprocess.Process] = {}
        """Where there is no netem: what delays the packets of a node."""
        self.addresses: dict[str, str] = {}
        self.harness = ""
        self.netem = False
        """Whether this kernel delays packets; else ``chaos.delayer`` does."""

    def namespace(self, name: str) -> str:
        """Of one node."""
        return f"chaos-{self.mark}-{name}"

    def inside(self, name: str) -> list[str]:
        """What goes before a command that is to run as if on this node."""
        return ["nsenter", f"--net={_NAMESPACES / self.namespace(name)}"]

    async def set_up(self) -> None:
        """Make all namespaces and links.

        Raises:
            NetworkUnusable: the machine refuses; what was made is left to ``tear_down``.
        """
        subnet = await _free_subnet(self.mark)
        self.harness = f"{subnet}.{HARNESS}"
        hub = ["ip", "-n", self._hub]
        await _run("ip", "netns", "add", self._hub)
        await _run(*hub, "link", "add", "dev", "bridge", "type", "bridge")
        await _run(*hub, "link", "set", "dev", "bridge", "up")
        await _run("ip", "link", "add", "dev", self._link, "type", "veth", "peer", "name", "h", "netns", self._hub)  # fmt: skip
        await _run(*hub, "link", "set", "dev", "h", "master", "bridge", "up")
        await _run("ip", "addr", "add", f"{self.harness}/24", "dev", self._link)
        await _run("ip", "link", "set", "dev", self._link, "up")
        for number, name in enumerate(self._names, start=1):
            space = self.namespace(name)
            await _run("ip", "netns", "add", space)
            await _run(*hub, "link", "add", "dev", name, "type", "veth", "peer", "name", "eth0", "netns", space)  # fmt: skip
            await _run(*hub, "link", "set", "dev", name, "master", "bridge", "up")
            self.addresses[name] = f"{subnet}.{number}"
            await _run("ip", "-n", space, "addr", "add", f"{subnet}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                await _run("ip", "-n", space, "link", "set", "dev", device, "up")
        self.netem = await has_netem(self._hub)

    async def tear_down(self) -> None:
        """Delete all of it; nothing to do where there is nothing."""
        while self._delayers:
            await _end(self._delayers.popitem()[1])
        await remove_namespaces(self.mark)

    async def impair(self, fault: int, impairments: Iterable[Impairment]) -> None:
        """Inflict these on behalf of a fault; they take the place of its earlier ones."""
        async with self._changing:
            self._impairments[fault] = tuple(impairments)
            await self._apply()

    async def repair(self, fault: int) -> None:
        """Take back what a fault inflicted; also what an earlier repair that was broken off has left."""
        async with self._changing:
            self._impairments.pop(fault, None)
            await self._apply()

    async def _apply(self) -> None:
        for name in self._names:
            mine = [one for ones in self._impairments.values() for one in ones if one.node == name]
            others = {other: at for other, at in self.addresses.items() if other != name}
            program = ruleset(mine, others, self.harness, netem=self.netem)
            if program != self._programs.get(name, ruleset((), {}, "", netem=True)):
                self._programs[name] = _UNKNOWN  # should this be cancelled in the middle
                await _run(*self.inside(name), "nft", "-f", "-", text=program)
                self._programs[name] = program
            if (shape := shape_of(mine)) != self._shapes.get(name, Shape()):
                self._shapes[name] = None
                await self._shape(name, shape)
                self._shapes[name] = shape

    async def _shape(self, name: str, shape: Shape) -> None:
        qdisc = qdisc_of(shape, netem=self.netem)
        tc = [*self.inside(name), "tc", "qdisc"]
        await _run(*tc, "del", "dev", "eth0", "root", check=False)
        if qdisc:
            await _run(*tc, "add", "dev", "eth0", "root", *qdisc)
        if not self.netem:
            await self._delay(name, shape)

    async def _delay(self, name: str, shape: Shape) -> None:
        """Have a process of its own delay what a node sends, for as long as the shape says so."""
        if (former := self._delayers.pop(name, None)) is not None:
            await _end(former)
        if shape.delay_ms:
            self._delayers[name] = await start_delayer(
                self.inside(name), self.mark, "eth0", shape.delay_ms, shape.jitter_ms
            )


def qdisc_of(shape: Shape, *, netem: bool) -> list[str]:
    """The arguments of ``tc qdisc`` for a shape; empty where it needs none."""
    if netem and (shape.loss or shape.delay_ms):
        words = ["netem"]
        if shape.delay_ms:
            words += ["delay", f"{shape.delay_ms:g}ms", f"{shape.jitter_ms:g}ms"]
        if shape.loss:
            words += ["loss", f"{shape.loss * 100:g}%"]
        return words + (["rate", f"{shape.rate_kbit}kbit"] if shape.rate_kbit else [])
    if shape.rate_kbit:
        latency = f"{QUEUE_LATENCY_MS}ms"
        return ["tbf", "rate", f"{shape.rate_kbit}kbit", "burst", str(BURST_BYTES), "latency", latency]  # fmt: skip
    return []


def missing_for_namespaces() -> str:
    """Why this machine and user can have no namespaces, with what helps; empty where they can be tried."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    needed = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux"}
    if missing := sorted({pack for word, pack in needed.items() if shutil.which(word) is None}):
        return (
            f"network namespaces need {' and '.join(missing)} (apt-get install {' '.join(missing)})"
        )
    return ""


async def remove_namespaces(mark: str) -> list[str]:
    """Delete the namespaces that carry a mark; returns their names."""
    found = [name for name in _namespaces() if name.startswith(f"chaos-{mark}-")]
    if found:  # the kernel takes its time to delete what hangs on a namespace
        await _run("ip", "link", "del", "dev", _link_of(mark), check=False)
    for name in found:
        await _run("ip", "netns", "del", name, check=False)
    return found


def _link_of(mark: str) -> str:
    """The harness's end of its link to the hub."""
    return f"ch{mark.partition('-')[0]}"


def marks_of_namespaces() -> set[str]:
    """The marks of all harnesses that have namespaces now, whether or not they live."""
    return {name.removeprefix("chaos-").rpartition("-")[0] for name in _namespaces()}


def _namespaces() -> list[str]:
    found = _NAMESPACES.glob("chaos-*") if _NAMESPACES.is_dir() else ()
    return sorted(path.name for path in found)


async def _free_subnet(mark: str) -> str:
    """Three parts of a /24 that no address of this machine is in."""
    taken = await _run("ip", "-4", "-o", "addr")
    first = int(mark.partition("-")[0])
    for offset in range(250):
        subnet = f"10.213.{(first + offset) % 250}"
        if f" {subnet}." not in taken:
            return subnet
    raise NetworkUnusable("all of 10.213.0.0/16 is in use on this machine")


async def start_delayer(
    inside: Sequence[str], mark: str, device: str, delay_ms: float, jitter_ms: float
) -> asyncio.subprocess.Process:
    """Start ``chaos.delayer`` inside a namespace, and wait until packets are delayed.

    Raises:
        NetworkUnusable: it does not work here.
    """
    process = await asyncio.create_subprocess_exec(
        *(*inside, sys.executable, "-m", "chaos.delayer", device, str(delay_ms), str(jitter_ms)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environ_of(mark),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            if await process.stdout.readline():
                return process
            told = (await process.stderr.read()).decode(errors="replace").splitlines()
        raise NetworkUnusable(f"packets cannot be delayed: {told[-1] if told else 'no reason'}")
    except BaseException:
        await _end(process)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, which has it take its filter away; SIGKILL where that takes too long."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def probe(mark: str) -> str:
    """Why packets cannot be delayed here, tried in a namespace of its own; empty where they can.

    Raises:
        NetworkUnusable: no namespace can be made.
    """
    space = f"chaos-{mark}-probe"
    await _run("ip", "netns", "add", space)
    try:
        if not await has_netem(space):
            inside = ["nsenter", f"--net={_NAMESPACES / space}"]
            await _end(await start_delayer(inside, mark, "lo", 1.0, 0.0))
    except NetworkUnusable as error:
        return str(error)
    finally:
        await _run("ip", "netns", "del", space)
    return ""


async def has_netem(namespace: str) -> bool:
    """Whether packets can be delayed there."""
    tried = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "lo", "root", "netem"]
    try:
        await _run(*tried, "delay", "1ms")
    except NetworkUnusable:
        return False
    await _run(*tried[:6], "del", "dev", "lo", "root")
    return True


async def _run(*command: str, text: str = "", check: bool = True) -> str:
    """Raises NetworkUnusable where the command fails and that matters."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, err = await process.communicate(text.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if check and process.returncode:
        told = next(iter(err.decode(errors="replace").splitlines()), f"status {process.returncode}")
        raise NetworkUnusable(f"{' '.join(command)}: {told}")
    return out.decode(errors="replace")
