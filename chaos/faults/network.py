"""Faults of the network: everything that ``chaos.network`` can do to one node's links."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from chaos.faults.strike import Inflict, Inflicted, Strike
from chaos.network import Impairment


async def partition(strike: Strike) -> Inflicted:
    """No packet between one node and the others, and perhaps the clients."""
    node, clients = await strike.node(), bool(strike.choice("clients"))
    cut = Impairment(node=node.name, inbound=True, outbound=True, harness=clients)
    return await _impair(strike, [cut], {"clients": clients})


async def one_way(strike: Strike) -> Inflicted:
    """Packets of one direction are lost, clients' included."""
    node, way = await strike.node(), strike.choice("way")
    cut = Impairment(
        node=node.name, inbound=way == "inbound", outbound=way == "outbound", harness=True
    )
    return await _impair(strike, [cut], {"way": way})


async def cut_link(strike: Strike) -> Inflicted:
    """Two nodes do not reach each other."""
    node = await strike.node()
    others = [name for name in strike.cluster.nodes if name != node.name]
    other = strike.one_of(others, "second node")
    cut = Impairment(node=node.name, peers=(other,), inbound=True, outbound=True)
    found = await _impair(strike, [cut], {"between": [node.name, other]})
    return Inflicted(nodes=(node.name, other), detail=found.detail, take_back=found.take_back)


async def flap(strike: Strike) -> Inflicted:
    """A node's links are cut half of the time."""
    node, period_s = await strike.node(), float(strike.choice("period_s"))
    network, fault = strike.network, strike.fault
    cut = Impairment(node=node.name, inbound=True, outbound=True)

    async def cut_and_mend() -> None:
        while True:
            await network.impair(fault, [cut])
            await asyncio.sleep(period_s / 2)
            await network.repair(fault)
            await asyncio.sleep(period_s / 2)

    strike.strikes_now()
    flapping = asyncio.create_task(cut_and_mend(), name="flapping link")

    async def take_back() -> None:
        flapping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flapping
        await network.repair(fault)

    return Inflicted(nodes=(node.name,), detail={"period_s": period_s}, take_back=take_back)


async def delay(strike: Strike) -> Inflicted:
    """Everything that a node sends comes later, and not evenly."""
    node, delay_ms = await strike.node(), float(strike.choice("delay_ms"))
    slow = Impairment(node=node.name, delay_ms=delay_ms, jitter_ms=delay_ms / 3)
    return await _impair(strike, [slow], {"delay_ms": delay_ms, "jitter_ms": delay_ms / 3})


async def loss(strike: Strike) -> Inflicted:
    """A part of what a node sends is lost."""
    node, part = await strike.node(), float(strike.choice("loss"))
    return await _impair(strike, [Impairment(node=node.name, loss=part)], {"loss": part})


async def slow_link(strike: Strike) -> Inflicted:
    """A node sends no faster than this; who reads from it reads slowly."""
    node, rate_kbit = await strike.node(), int(strike.choice("rate_kbit"))
    slow = Impairment(node=node.name, rate_kbit=rate_kbit)
    return await _impair(strike, [slow], {"rate_kbit": rate_kbit})


async def reset(strike: Strike) -> Inflicted:
    """The next packet on each connection of a node resets it; new ones may be made."""
    node = await strike.node()
    return await _impair(strike, [Impairment(node=node.name, reset=True, harness=True)], {})


async def _impair(
    strike: Strike, impairments: Sequence[Impairment], detail: dict[str, object]
) -> Inflicted:
    network, fault = strike.network, strike.fault
    strike.strikes_now()
    await network.impair(fault, impairments)

    async def take_back() -> None:
        await network.repair(fault)

    names = tuple(one.node for one in impairments)
    return Inflicted(nodes=names, detail=detail, take_back=take_back)


INFLICT: dict[str, Inflict] = {
    "partition": partition,
    "partition-one-way": one_way,
    "link-cut": cut_link,
    "leader-isolated": partition,
    "link-flaps": flap,
    "delay": delay,
    "loss": loss,
    "slow-link": slow_link,
    "reset": reset,
}
