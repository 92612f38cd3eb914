"""Faults of processes: killed, stopped, killed at a bad moment."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence

from chaos.cluster import ChaosNode
from chaos.faults import moments
from chaos.faults.strike import Inflict, Inflicted, Strike, TakeBack, Unfit, nodes_of, told
from chaos.processes import Process, Role


async def signal_workers(strike: Strike) -> Inflicted:
    """SIGKILL or SIGTERM of as many workers as were drawn."""
    number = signal.SIGTERM if strike.planned.kind == "worker-term" else signal.SIGKILL
    victims = await strike.workers(strike.choice("count"))
    strike.strikes_now()
    hit = [victim for victim in victims if victim.signal(number)]
    if not hit:
        raise Unfit("the workers ended before they could be hit")
    return Inflicted(
        nodes=nodes_of(hit), detail={"signal": number.name, "pids": [p.pid for p in hit]}
    )


async def stop_workers(strike: Strike) -> Inflicted:
    """SIGSTOP of workers."""
    return _stop(strike, await strike.workers(strike.choice("count")))


async def kill_forkserver(strike: Strike) -> Inflicted:
    """SIGKILL of a forkserver; the kernel ends its workers with it."""
    node = await strike.node()
    victim = strike.one_of(node.processes(Role.FORKSERVER), f"forkserver on {node.name}")
    strike.strikes_now()
    victim.kill()
    return Inflicted(nodes=(node.name,), detail={"pid": victim.pid})


async def stop_agent(strike: Strike) -> Inflicted:
    """SIGSTOP of an agent."""
    agent = (await strike.node()).agent()
    return _stop(strike, [agent] if agent else [])


async def kill_agent(strike: Strike) -> Inflicted:
    """SIGKILL or SIGTERM of an agent, which stays down for as long as was drawn."""
    node = await strike.node()
    number = signal.SIGTERM if strike.planned.kind == "agent-term" else signal.SIGKILL
    return _down(strike, [node], number)


async def node_off(strike: Strike) -> Inflicted:
    """Power failure of one node."""
    return _off(strike, [await strike.node()])


async def majority_off(strike: Strike) -> Inflicted:
    """Power failure of a majority at once."""
    nodes = list(strike.cluster.nodes.values())
    return _off(strike, strike.some_of(nodes, strike.cluster.majority, "node"))


async def all_off(strike: Strike) -> Inflicted:
    """Power failure of all nodes at once."""
    return _off(strike, list(strike.cluster.nodes.values()))


async def kill_in_recovery(strike: Strike) -> Inflicted:
    """One worker dies, and something else once its job is seen to recover."""
    (first,) = await strike.workers(1)
    first.kill()
    await moments.recovery(strike.cluster)
    return await _then(strike, "recovery", {"first": told([first])})


async def kill_in_commit(strike: Strike) -> Inflicted:
    """Something dies between the first file of a checkpoint and its commit."""
    checkpoint = await moments.checkpoint_appears(strike.cluster)
    return await _then(strike, "commit", {"checkpoint": str(checkpoint)})


async def kill_in_election(strike: Strike) -> Inflicted:
    """The leader dies, and another agent before there is a new one."""
    leader = await strike.node("leader")
    _down(strike, [leader], signal.SIGKILL)
    others = [n for n in strike.cluster.nodes.values() if n is not leader and n.running]
    try:
        await moments.election(strike.cluster, [node.name for node in others], leader.name)
        second = strike.one_of(others, "node that runs and does not lead")
    except BaseException:
        _let_go(strike, [leader])
        raise
    found = _down(strike, [leader, second], signal.SIGKILL)
    detail = {"leader": leader.name, "second": second.name}
    return Inflicted(nodes=found.nodes, detail=detail, take_back=found.take_back, during="election")


async def crash_loop(strike: Strike) -> Inflicted:
    """An agent dies shortly after each of its starts."""
    node, up_s = await strike.node(), float(strike.choice("up_s"))
    node.hold(strike.fault)
    before = node.starts
    loop = asyncio.create_task(_crash_again_and_again(node, up_s), name="crash loop")

    async def take_back() -> str:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop
        _let_go(strike, [node])
        return f"{node.starts - before} starts"

    return Inflicted(nodes=(node.name,), detail={"up_s": up_s}, take_back=take_back)


async def _crash_again_and_again(node: ChaosNode, up_s: float) -> None:
    while True:
        if agent := node.agent():
            agent.kill()
        await asyncio.sleep(moments.POLL_S)
        node.start()
        await asyncio.sleep(up_s)


async def _then(strike: Strike, during: str, detail: dict[str, object]) -> Inflicted:
    """The second blow, at what was drawn."""
    whom = strike.choice("then")
    strike.strikes_now()
    if whom == "worker":
        victims = [victim for victim in await strike.workers(1) if victim.kill()]
        if not victims:
            raise Unfit("the worker ended before it could be hit")
        then = Inflicted(nodes=nodes_of(victims), detail={"pids": [p.pid for p in victims]})
    elif whom == "node":
        then = _off(strike, [await strike.node("any")])
    else:
        node = await strike.node("leader" if whom == "leader" else "any")
        then = _down(strike, [node], signal.SIGKILL)
    return Inflicted(
        nodes=then.nodes,
        detail={**detail, "then": whom, **then.detail},
        take_back=then.take_back,
        during=during,
    )


def _stop(strike: Strike, victims: Sequence[Process]) -> Inflicted:
    strike.strikes_now()
    hit = [victim for victim in victims if victim.signal(signal.SIGSTOP)]
    if not hit:
        raise Unfit("the process ended before it could be stopped")

    async def take_back() -> str:
        gone = [victim.pid for victim in hit if not victim.signal(signal.SIGCONT)]
        return f"ended meanwhile: {gone}" if gone else ""

    detail = {"signal": "SIGSTOP", "pids": [victim.pid for victim in hit]}
    return Inflicted(nodes=nodes_of(hit), detail=detail, take_back=take_back)


def _down(strike: Strike, nodes: Sequence[ChaosNode], number: signal.Signals) -> Inflicted:
    """Signal the agents alone, and keep them down."""
    strike.strikes_now()
    agents = []
    for node in nodes:
        node.hold(strike.fault)
        if agent := node.agent():
            agent.signal(number)
            agents.append(agent)
    detail = {"signal": number.name, "pids": [agent.pid for agent in agents]}
    return Inflicted(
        nodes=tuple(node.name for node in nodes), detail=detail, take_back=_return(strike, nodes)
    )


def _off(strike: Strike, nodes: Sequence[ChaosNode]) -> Inflicted:
    """Kill everything of these nodes as nearly at once as can be, and keep them down."""
    strike.strikes_now()
    for node in nodes:
        node.hold(strike.fault)
    victims = power_off(nodes)
    return Inflicted(
        nodes=tuple(node.name for node in nodes),
        detail={"pids": [victim.pid for victim in victims]},
        take_back=_return(strike, nodes),
    )


def power_off(nodes: Sequence[ChaosNode]) -> list[Process]:
    """SIGKILL to all agents first, then to what they left; until nothing is left."""
    for node in nodes:
        if agent := node.agent():
            agent.kill()
    return [victim for node in nodes for victim in node.power_off()]


def _return(strike: Strike, nodes: Sequence[ChaosNode]) -> TakeBack:
    async def take_back() -> None:
        _let_go(strike, nodes)

    return take_back


def _let_go(strike: Strike, nodes: Sequence[ChaosNode]) -> None:
    for node in nodes:
        node.let_go(strike.fault)
        if not node.held:
            node.start()


INFLICT: dict[str, Inflict] = {
    "worker-kill": signal_workers,
    "workers-kill": signal_workers,
    "worker-term": signal_workers,
    "worker-stop": stop_workers,
    "forkserver-kill": kill_forkserver,
    "agent-kill": kill_agent,
    "agent-term": kill_agent,
    "agent-stop": stop_agent,
    "leader-kill": kill_agent,
    "leader-stop": stop_agent,
    "node-off": node_off,
    "majority-off": majority_off,
    "all-off": all_off,
    "kill-in-recovery": kill_in_recovery,
    "kill-in-commit": kill_in_commit,
    "kill-in-election": kill_in_election,
    "crash-loop": crash_loop,
}
