"""The commands of a script: one function each, found in `COMMANDS` by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from distroml.consensus.messages import NO_OP
from distroml.consensus.raft_log import FIRST_INDEX, LogImage
from distroml.consensus.raft_types import ConsensusError, RaftSettings, Role
from tests.golden import wording
from tests.golden.world import Node, World

_SAID: Final = re.compile(r"\S+ gets from |  \S+ -> |after |\S+ starts as |(lost|held|twice): ")
"""Lines that `quietly` leaves out."""
ELECTION_MS: Final = 2_000
"""Time that one `elect` may take, at most."""


class BadCommand(ValueError):
    """A line that the interpreter does not understand; says why."""


def _running(world: World, name: str) -> Node:
    if name not in world.nodes:
        raise BadCommand(f"{name!r} does not run; running: {', '.join(world.nodes) or 'nobody'}")
    return world.nodes[name]


def _names(world: World, words: list[str]) -> list[str]:
    known = [*world.voters, *world.learners]
    if words == ["all"]:
        return known
    for word in words:
        if word not in known:
            raise BadCommand(f"{word!r} is no node; nodes: {', '.join(known)}")
    return words


def _chosen(world: World, words: list[str]) -> list[int]:
    """Places in `flight` of what goes from the first to the second node; `*` is anyone, and a number
    takes only so many."""
    if len(words) not in (2, 3):
        raise BadCommand("give source and target, each a node or *, and maybe a number")
    source, target = words[:2]
    _names(world, [word for word in words[:2] if word != "*"])
    places = [
        place
        for place, (a, b, _) in enumerate(world.flight)
        if source in ("*", a) and target in ("*", b)
    ]
    return places[: int(words[2])] if len(words) == 3 else places


def _take(world: World, words: list[str]) -> list[tuple[str, str, Any]]:
    places = set(_chosen(world, words))
    taken = [item for place, item in enumerate(world.flight) if place in places]
    if not taken:
        raise BadCommand(f"nothing is in flight from {words[0]} to {words[1]}")
    world.flight = [item for place, item in enumerate(world.flight) if place not in places]
    return taken


# --- the cluster -----------------------------------------------------------------------------------------------


def voters(world: World, words: list[str]) -> None:
    """voters NAME... [learners NAME...] [SETTING=VALUE...]: the cluster, nothing of it running yet"""
    if world.disks:
        raise BadCommand("the cluster is there already")
    given = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    voting, _, learning = " ".join(names).partition("learners")
    try:
        settings = msgspec.convert(given, RaftSettings, strict=False)
        unknown = given.keys() - set(RaftSettings.__struct_fields__)
    except msgspec.ValidationError as error:
        raise BadCommand(str(error)) from None
    if unknown:
        raise BadCommand(f"no such setting: {', '.join(sorted(unknown))}")
    world.found(voting.split(), learning.split(), settings)


def given(world: World, words: list[str]) -> None:
    """given NAME terms=1,1,2 term=3 [vote=NAME]: its log holds entries of these terms, from index 2 on"""
    name, *rest = words
    _names(world, [name])
    facts = dict(word.split("=", 1) for word in rest)
    terms = [int(term) for term in facts["terms"].split(",") if term]
    entries = [(NO_OP, FIRST_INDEX, 0)]
    entries += [
        (b"\x00e%dt%d" % (index, term), index, term)
        for index, term in enumerate(terms, FIRST_INDEX + 1)
    ]
    world.give(name, LogImage(entries, int(facts["term"]), facts.get("vote"), True))


def start(world: World, words: list[str]) -> None:
    """start NAME...|all: the nodes start from what their disks hold, and connect"""
    for name in _names(world, words):
        if name in world.nodes:
            raise BadCommand(f"{name} runs already")
        world.start(name)


def crash(world: World, words: list[str]) -> None:
    """crash NAME...: the processes die; their peers see the connections break"""
    for name in words:
        _running(world, name)
        world.crash(name)


def wipe(world: World, words: list[str]) -> None:
    """wipe NAME: the disk of a node that is down is emptied"""
    (name,) = _names(world, words)
    if name in world.nodes:
        raise BadCommand(f"{name} runs; crash it first")
    world.wipe(name)


# --- time ------------------------------------------------------------------------------------------------------


def tick(world: World, words: list[str]) -> None:
    """tick NAME...|all DURATION: the clocks of these nodes move on, such as by 60ms"""
    *names, duration = words
    match = re.fullmatch(r"(\d+)ms", duration)
    if match is None:
        raise BadCommand(f"{duration!r} is no duration, such as 60ms")
    for name in names if names != ["all"] else list(world.nodes):
        world.tick(_running(world, name), int(match[1]) / 1000)


def draw(world: World, words: list[str]) -> None:
    """draw NAME SHARE: its random numbers are this share of their range, from 0 up to 1"""
    name, share = words
    _running(world, name).draws.share = float(share)


# --- the network -----------------------------------------------------------------------------------------------


def deliver(world: World, words: list[str]) -> None:
    """deliver SOURCE TARGET [COUNT]: what is in flight now arrives, a turn for each; * is anyone"""
    for item in _take(world, words):
        world.deliver(*item)


def settle(world: World, words: list[str]) -> None:
    """settle: delivers all in the order of sending, and all that this causes"""
    if words:
        raise BadCommand("settle takes nothing")
    world.settle()


def drop(world: World, words: list[str]) -> None:
    """drop SOURCE TARGET [COUNT]: what is in flight is lost; `drop * *` may find nothing"""
    anything = world.flight or words != ["*", "*"]
    _list(world, "lost", _take(world, words) if anything else [])


def repeat(world: World, words: list[str]) -> None:
    """repeat SOURCE TARGET [COUNT]: what is in flight will arrive once more"""
    copies = [world.flight[place] for place in _chosen(world, words)]
    world.flight += copies
    _list(world, "twice", copies)


def hold(world: World, words: list[str]) -> None:
    """hold SOURCE TARGET [COUNT]: what is in flight is set aside until `release`"""
    taken = _take(world, words)
    world.held += taken
    _list(world, "held", taken)


def release(world: World, words: list[str]) -> None:
    """release: what was held is in flight again, behind everything else"""
    if words or not world.held:
        raise BadCommand("release takes nothing, and something must be held")
    _list(world, "in flight again", world.held)
    world.flight += world.held
    world.held = []


def isolate(world: World, words: list[str]) -> None:
    """isolate NAME...: their connections with all others break"""
    _names(world, words)
    for one in words:
        for other in sorted({*world.voters, *world.learners} - {*words}):
            world.cut.add((min(one, other), max(one, other)))
            world.unlink(one, other, told=(one, other))


def heal(world: World, words: list[str]) -> None:
    """heal: every two nodes that run are connected again"""
    if words:
        raise BadCommand("heal takes nothing")
    world.cut.clear()
    for one in sorted(world.nodes):
        for other in sorted(world.nodes):
            if one < other:
                world.link(one, other)


def elect(world: World, words: list[str]) -> None:
    """elect NAME [by NAME...]: its clock moves on and all is delivered until it leads and all is said; with voters
    named, only what goes among it and them is delivered, the rest lost, until it leads: its first words are then in flight"""
    node, voters = _running(world, words[0]), set(words[2:])
    if words[1:2] not in ([], ["by"]) or (len(words) > 1 and not voters):
        raise BadCommand("say who is elected, or who by whom")
    among = {node.name, *_names(world, words[2:])} if voters else {*world.nodes}
    for _ in range(ELECTION_MS // 10):
        world.tick(node, 0.01)
        while world.flight and not (voters and node.core.role is Role.LEADER):
            source, target, message = world.flight.pop(0)
            if {source, target} <= among:
                world.deliver(source, target, message)
        if node.core.role is Role.LEADER:
            break
    else:
        raise BadCommand(f"{node.name} is not elected within {ELECTION_MS} ms")
    world.story = []
    status(world, sorted(among) if voters else [])


# --- what users do ---------------------------------------------------------------------------------------------


def propose(world: World, words: list[str]) -> None:
    """propose NAME ENTRY...: submits entries to this node, in one turn"""
    node = _running(world, words[0])
    for word in words[1:]:
        node.core.check_append(word.encode())
    world.turn(node, lambda: [node.core.submit(word.encode()) for word in words[1:]])


def read(world: World, words: list[str]) -> None:
    """read NAME: asks this node for a linearizable read"""
    node = _running(world, words[0])
    world.reads += 1
    token = world.reads
    world.turn(node, lambda: node.core.request_read(token))


def transfer(world: World, words: list[str]) -> None:
    """transfer NAME [TARGET]: asks the leader to hand over"""
    node, target = _running(world, words[0]), words[1] if len(words) > 1 else None
    world.turn(node, lambda: node.core.transfer(target))


def compact(world: World, words: list[str]) -> None:
    """compact NAME: it takes a snapshot of all it applied"""
    node = _running(world, words[0])
    world.turn(node, node.core.raft.compact)


# --- looking ---------------------------------------------------------------------------------------------------


def status(world: World, words: list[str]) -> None:
    """status [NAME...]: role, term, vote, log and state of each node"""
    for name in _names(world, words or ["all"]):
        if name not in world.nodes:
            world.story.append(f"{name} is down")
            continue
        raft = world.nodes[name].core.raft
        role, commit = wording.View(world.nodes[name].core).role_line(), raft.commit_index
        end = f"log ends at {raft.log.last_index}/{raft.log.last_term}"
        world.story.append(f"{name} is {role}; {end}, committed {commit}")


def log(world: World, words: list[str]) -> None:
    """log NAME...: the entries of each node"""
    for name in _names(world, words):
        world.story.append(f"{name} {wording.View(_running(world, name).core).log_line()}")


def state(world: World, words: list[str]) -> None:
    """state NAME...: what each node has applied"""
    for name in _names(world, words):
        applied = b" ".join(_running(world, name).ledger.entries).decode()
        world.story.append(f"{name} has applied: {applied or 'nothing'}")


def flight(world: World, words: list[str]) -> None:
    """flight: what is in flight"""
    _list(world, "in flight", world.flight)


def quietly(world: World, words: list[str]) -> None:
    """quietly COMMAND: shows what nodes become, not what they say"""
    run(world, words)
    world.story = [line for line in world.story if not _SAID.match(line)]


def _list(world: World, what: str, items: list[tuple[str, str, Any]]) -> None:
    for source, target, message in items:
        world.story.append(f"{what}: {source} -> {target}: {wording.message(message)}")


COMMANDS: Final[dict[str, Callable[[World, list[str]], None]]] = {
    command.__name__: command
    for command in (
        voters, given, start, crash, wipe, tick, draw, deliver, settle, drop, repeat, hold,
        release, isolate, heal, elect, propose, read, transfer, compact, status, log, state, flight,
        quietly,
    )
}  # fmt: skip


def run(world: World, words: list[str]) -> None:
    """Raises BadCommand for what cannot be done, Violated for what must never happen."""
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        raise BadCommand(f"no such command; there are: {', '.join(sorted(COMMANDS))}")
    try:
        command(world, words[1:])
    except ConsensusError as error:
        world.story.append(f"  refused: {error}")
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, BadCommand):
            raise
        raise BadCommand(f"{error}; usage: {command.__doc__}") from error
